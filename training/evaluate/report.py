"""What every result carries: where its numbers come from; and how it is written.

A result can be repeated from what it holds: command line, seeds, model and data checksums, the split's shards, and the
machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["BENCHMARK_VERSION", "FORMAT_VERSION", "data_checksum", "machine", "plain", "provenance", "write_json"]

FORMAT_VERSION = 2  # 2: tasks of every encoder alike, release and division, marks with intervals
BENCHMARK_VERSION = "1.0"


def machine() -> dict[str, Any]:
    """What the numbers were made on: processor, cores, memory, accelerator, Python and library versions."""
    packages = ("numpy", "torch", "torchvision", "transformers", "scikit-learn", "h5py")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerator": _accelerator(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
    }


def data_checksum(shards: Iterable[Path]) -> str:
    """SHA-256 over every shard's name, size and digest: the same survey gives the same value anywhere."""
    total = hashlib.sha256()
    for path in sorted(shards, key=lambda p: p.parts[-2:]):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{'/'.join(path.parts[-2:])} {path.stat().st_size} {digest}\n".encode())
    return total.hexdigest()


def provenance(*, seed: int, started: float) -> dict[str, Any]:
    """The part of a report that is the same for every kind of result. `started` is a time.perf_counter()."""
    return {
        "format": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *_relative(sys.argv[1:])]),
        "seconds": round(time.perf_counter() - started, 1),
        "seed": seed,
        "machine": machine(),
    }


def write_json(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write `report` aside and rename; numbers to six significant digits, NaN and infinities as null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(plain(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def plain(value: Any) -> Any:
    """Nested plain Python; floats to six digits; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _relative(words: Sequence[str]) -> list[str]:
    """Arguments, absolute paths among them made relative: a report shows no one's folders."""
    return [os.path.relpath(word) if os.path.isabs(word) else word for word in words]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (OSError, ValueError):
        return None


def _accelerator() -> str | None:
    """Name of the GPU where torch is loaded and sees one; torch is not imported for this."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name(0)) if torch is not None and torch.cuda.is_available() else None
