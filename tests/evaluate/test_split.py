"""The split: whole shards, disjoint, complete, and the same on every machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.split import shard_number, split_shards

KNOWN_TEST = [20, 111]
KNOWN_VAL = [33]


def shards(n: int, root: str = "survey") -> list[Path]:
    return [Path(root) / f"healpix={pixel:04d}" / "001-of-001.hdf5" for pixel in range(7, 7 + 13 * n, 13)]


def test_parts_are_disjoint_complete_and_of_the_asked_size():
    paths = shards(80)
    split = split_shards(paths)
    assert (len(split.train), len(split.val), len(split.test)) == (68, 4, 8)
    assert sorted(split.train + split.val + split.test) == sorted(paths)


def test_same_split_whatever_the_order_given_and_the_folder():
    here, there = split_shards(shards(40)), split_shards(reversed(shards(40, "/elsewhere/data")))
    assert here.names() == there.names()


def test_a_known_split_never_changes():
    """Weights were trained on this rule: a changed hash would leak test objects into training unseen."""
    split = split_shards(shards(10), 0.1, 0.2)
    assert [shard_number(p) for p in split.test] == KNOWN_TEST
    assert [shard_number(p) for p in split.val] == KNOWN_VAL


def test_order_of_the_sky_does_not_enter():
    split = split_shards(shards(60))
    numbers = [shard_number(p) for p in split.test]
    assert max(numbers) - min(numbers) > 13 * 20


def test_smallest_splits_and_refusals():
    split = split_shards(shards(3))
    assert (len(split.train), len(split.val), len(split.test)) == (1, 1, 1)
    with pytest.raises(ValueError, match="simulate more"):
        split_shards(shards(2))
    assert len(split_shards(shards(5), 0, 0).train) == 5
    with pytest.raises(ValueError, match="below 1"):
        split_shards(shards(5), 0.5, 0.5)
    with pytest.raises(ValueError, match="no number"):
        split_shards([Path("a/b.hdf5")])
