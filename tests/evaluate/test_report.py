"""The report: marks judged as set, JSON that is plain and complete, checksums that notice a changed byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from training.benchmark.targets import TARGETS, judge
from training.evaluate.report import data_checksum, machine, provenance, write_json


def report(**values: float) -> dict:
    def entry(name: str) -> dict:
        return {"redshift": {"value": values.get(name, 0.0)}}

    return {
        "simulated": {"zero_shot": {"tuned": {"image->image": entry("aligned")}}},
        "unaligned": {"zero_shot": {"tuned": {"image->image": entry("unaligned")}}},
        "supervised": {"resnet": {"test": entry("supervised")}},
        "real": {"redshift": {"desi": {"z<0.6": {"knn": {"sigma_nmad": {"value": values.get("nmad", 1.0)}}}}}},
    }


def verdict(given: dict, part: str, without: str = "(no such)") -> dict:
    (found,) = [mark for mark in judge(given) if part in mark["name"] and without not in mark["name"]]
    return found


def test_marks_pass_at_the_mark_and_fail_beyond_it():
    assert verdict(report(nmad=0.005), "z < 0.6: sigma_NMAD", "second")["passed"] is True
    assert verdict(report(nmad=0.0051), "z < 0.6: sigma_NMAD", "second")["passed"] is False
    exact = [m for m in judge(report(aligned=0.71)) if m["name"] == "redshift R2, image"][0]
    below = [m for m in judge(report(aligned=0.709)) if m["name"] == "redshift R2, image"][0]
    assert exact["passed"] is True and below["passed"] is False


def test_comparisons_subtract_the_other_encoder():
    given = report(aligned=0.70, unaligned=0.72, supervised=0.71)
    less_own = verdict(given, "redshift R2, aligned less unaligned")
    assert less_own["passed"] is False and abs(less_own["value"] + 0.02) < 1e-9
    assert verdict(given, "redshift R2, aligned image encoder less supervised")["passed"] is True


def test_what_was_not_measured_is_neither_passed_nor_failed():
    assert all(mark["passed"] is None and mark["value"] is None for mark in judge({}))
    assert len(judge({})) == len(TARGETS) == len({target.name for target in TARGETS})


def test_json_is_plain_whatever_numpy_gives(tmp_path: Path):
    given = {
        "a": np.float32(1 / 3),
        "b": float("nan"),
        "c": np.arange(3),
        "d": (True, None),
        "e": {1: np.int64(4)},
    }
    write_json(tmp_path / "deep" / "r.json", given)
    read = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert read == {"a": 0.333333, "b": None, "c": [0, 1, 2], "d": [True, None], "e": {"1": 4}}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_checksum_notices_content_and_ignores_the_folder(tmp_path: Path):
    def survey(root: Path, last: bytes) -> list[Path]:
        paths = []
        for number, content in ((1, b"one"), (2, last)):
            path = root / f"healpix={number:04d}" / "001-of-001.hdf5"
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
            paths.append(path)
        return paths

    first = survey(tmp_path / "a", b"two")
    assert data_checksum(first) == data_checksum(reversed(survey(tmp_path / "b", b"two")))
    assert data_checksum(first) != data_checksum(survey(tmp_path / "c", b"twO"))


def test_provenance_names_machine_and_command_without_absolute_paths(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("sys.argv", ["/some/bin/astroclip", "evaluate", "--data", str(Path.cwd() / "data")])
    got = provenance(seed=3, started=0.0)
    assert got["command"] == "astroclip evaluate --data data" and got["seed"] == 3
    assert machine()["cores"] >= 1 and "numpy" in got["machine"]["packages"]


def test_a_pool_of_another_size_is_not_the_one_asked_for():
    def retrieval(size: int) -> dict:
        return {"image->spectrum": {"pool_size": size, "recall@10": {"value": 0.7, "lo": 0.6, "hi": 0.8}}}

    given = {"simulated": {"retrieval": retrieval(500), "retrieval_2000": retrieval(2000)}}
    assert verdict(given, "pools of 1,000")["passed"] is None
    found = verdict(given, "pools of 2,000")
    assert found["passed"] is True and (found["value"], found["lo"], found["hi"]) == (0.7, 0.6, 0.8)
