"""Bodies for schemathesis where the document says no more than "bytes": files of that kind, and random ones."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import strategies as st

from benchmarks.chaos.mutations import TYPES, seeds

for kind, media_type in TYPES.items():
    if kind in ("json", "gz"):
        continue
    files = [seed.body for seed in seeds().values() if seed.kind == kind]
    schemathesis.openapi.media_type(media_type, st.sampled_from(files) | st.binary(max_size=200))


@schemathesis.serializer(*{media_type for kind, media_type in TYPES.items() if kind != "json"})
def as_it_is(context: Any, value: Any) -> bytes:
    """The body itself; what schemathesis makes up against the document (a number, an object) as its text."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
