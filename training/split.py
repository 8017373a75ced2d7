"""Which shards of a survey train a model, tune it, and test it: one rule for training and evaluation.

Whole shards are split, never rows: a shard is one HEALPix pixel, so objects that share a field (and, in the
simulation, neighbours painted from the same pool) cannot fall on both sides. Shards are ordered by a hash of
their number, so neither their position on the sky nor the order in which they were written enters, and every
machine finds the same split whatever folder the survey lies in.

`python -m training.split SURVEY --part train --shards 21` prints the shards of a part, for the shell.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Split", "shard_number", "split_shards"]

_PIXEL = re.compile(r"healpix=(\d+)")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Split:
    """Three disjoint lists of shard files; together they are all shards given."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...]

    def names(self) -> dict[str, list[str]]:
        """`train`, `val`, `test` as folder/file names, for a report that another machine can compare."""
        return {part: ["/".join(path.parts[-2:]) for path in getattr(self, part)] for part in ("train", "val", "test")}


def shard_number(path: str | Path) -> int:
    """The shard's number: NNNN of `healpix=NNNN/...`, else the first number in the file's name."""
    path = Path(path)
    found = _PIXEL.search("/".join(path.parts[-2:])) or _DIGITS.search(path.stem)
    if found is None:
        raise ValueError(
            f"shard {path.name!r} carries no number; wanted healpix=NNNN/001-of-001.hdf5; rename the shard so"
        )
    return int(found.group(1))


def split_shards(paths: Iterable[str | Path], val_fraction: float = 0.05, test_fraction: float = 0.1) -> Split:
    """Split shards in the order of a hash of their number: the last are test, those before validation.

    Counts are rounded to the nearest shard; a part whose fraction is above 0 gets at least one shard, and so
    does train, whence at least as many shards as parts are needed.
    Raises ValueError for fractions outside [0, 1) or summing to 1 or more, and for too few shards.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction {val_fraction}, test_fraction {test_fraction}: wanted both in [0, 1), sum below 1"
        )
    shards = sorted({Path(path) for path in paths}, key=_order)
    wanted = 1 + (val_fraction > 0) + (test_fraction > 0)
    if len(shards) < wanted:
        raise ValueError(f"{len(shards)} shards cannot be split into {wanted} parts; simulate more shards")
    n_val = _count(len(shards), val_fraction)
    n_test = min(_count(len(shards), test_fraction), len(shards) - 1 - n_val)
    n_train = len(shards) - n_val - n_test
    return Split(tuple(shards[:n_train]), tuple(shards[n_train : n_train + n_val]), tuple(shards[n_train + n_val :]))


def _order(path: Path) -> tuple[str, str, str]:
    digest = hashlib.sha256(str(shard_number(path)).encode()).hexdigest()
    return digest, path.name, str(path)


def _count(n: int, fraction: float) -> int:
    return max(1, round(n * fraction)) if fraction > 0 else 0


def main() -> None:
    """Print the first shards of one part of a survey folder, a path a line."""
    parser = argparse.ArgumentParser(description="Print the shards of one part of a survey.")
    parser.add_argument("survey", type=Path)
    parser.add_argument("--part", choices=("train", "val", "test"), default="train")
    parser.add_argument("--shards", type=int, default=None, help="at most so many")
    arguments = parser.parse_args()
    shards = split_shards(p for p in arguments.survey.rglob("*.hdf5") if not p.name.startswith("."))
    for path in getattr(shards, arguments.part)[: arguments.shards]:
        print(path)


if __name__ == "__main__":
    main()
