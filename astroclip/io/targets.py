"""Which of a file's objects to read, and plain numbers out of header and table cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from astroclip.io.options import SpectrumOptions
from astroclip.io.refusal import over_limit, refusal
from astroclip.limits import ReaderLimits
from astroclip.types import Flag, Spectrum

__all__ = ["check_samples", "finite_or_none", "select_rows", "text_or_none", "without_empty"]


def select_rows(ids: Sequence[str | None], options: SpectrumOptions, limits: ReaderLimits) -> list[int]:
    """Rows to read: all, or the one `options.target` names (an id first, an index from 0 second)."""
    target = options.target
    if target is not None:
        if str(target) in ids:
            return [ids.index(str(target))]
        if str(target).isdecimal() and int(target) < len(ids):
            return [int(target)]
        shown = ", ".join(str(i) for i in ids[:5])
        raise refusal(
            "no_such_target",
            found=f"no target {target!r} among {len(ids)} (first: {shown})",
            wanted=f"an id of the file or an index from 0 to {len(ids) - 1}",
            mend="List the ids with any FITS viewer.",
            field="target",
        )
    if len(ids) > limits.max_targets:
        raise over_limit(
            "too_many_targets",
            what="a file",
            found=len(ids),
            limit=limits.max_targets,
            unit="targets",
            mend="Name one with `target`, or run `astroclip embed` on the file.",
        )
    return list(range(len(ids)))


def check_samples(samples: int, limits: ReaderLimits) -> None:
    """Refuse a file whose wanted objects hold more samples in all than one request should. Raises LimitError."""
    if samples > limits.max_file_samples:
        raise over_limit(
            "too_many_samples",
            what="a file",
            found=samples,
            limit=limits.max_file_samples,
            unit="samples in all its spectra",
            mend="Split it, or name one object with `target`.",
        )


def without_empty(spectra: list[Spectrum], options: SpectrumOptions) -> list[Spectrum]:
    """Without the targets that hold no good sample (broken fibres), unless `options.keep_empty`."""
    dead = [s for s in spectra if s.mask.all()]
    if not dead or options.keep_empty:
        return spectra
    if len(dead) == len(spectra):
        raise refusal(
            "zero_ivar",
            found=f"{len(dead)} targets, none with a good sample",
            wanted="samples with ivar > 0",
            mend="Check the ivar and mask arrays: the fibres may be broken.",
            field="ivar",
        )
    ids = ", ".join(str(s.object_id) for s in dead[:5])
    note = Flag("targets_left_out", f"{len(dead)} of {len(spectra)} targets of the file hold no good sample: {ids}.")
    return [replace(s, quality=s.quality.with_flags(note)) for s in spectra if not s.mask.all()]


def finite_or_none(value: Any) -> float | None:
    """`value` as a float, or None where it is absent, not a number, or not finite."""
    if value is None or isinstance(value, (str, bool)) or np.ndim(value) > 0 or not np.isfinite(value):
        return None
    return float(value)


def text_or_none(value: Any) -> str | None:
    """`value` stripped, or None where it is no text or blank."""
    return value.strip() or None if isinstance(value, str) else None
