"""The README's tables are what the committed results say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "readme_tables.py"


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script
    spec = importlib.util.spec_from_file_location("readme_tables", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


def report() -> dict:
    def value(x: float) -> dict:
        return {"value": x, "lo": x - 0.01, "hi": x + 0.01}

    properties = {name: value(0.5) for name in ("redshift", "log_stellar_mass", "log_metallicity", "age_gyr")}
    numbers = {key: value(0.004) for key in ("sigma_nmad", "bias", "r2", "outliers_0.05", "outliers_0.15")}
    near = {"image->image": properties}
    return {
        "created": "2026-01-02T03:04:05+00:00",
        "command": "astroclip evaluate",
        "machine": {"cores": 2, "processor": "a processor", "accelerator": None},
        "model": {"id": "demo", "sha256": "0123456789abcdef"},
        "data": {"objects": {"train": 34000, "val": 2000, "test": 4000}},
        "marks": [
            {"name": "one", "sense": ">=", "wanted": 0.5, "value": 0.612, "passed": True},
            {"name": "two", "sense": "<=", "wanted": 0.005, "value": 0.0081, "passed": False},
            {"name": "three", "sense": ">=", "wanted": 0.5, "value": None, "passed": None},
        ],
        "simulated": {
            "near": {"zero_shot": {"tuned": near}, "retrieval": {}},
            "zero_shot": {
                "tuned": {"image->image": {**properties, "log_ssfr": value(0.7312)}},
                "upstream": {"image->spectrum": properties},
            },
            "retrieval": {
                "image->spectrum": {
                    "pool_size": 1000,
                    "median_rank": value(7.0),
                    **{f"recall@{k}": value(0.123) for k in (1, 5, 10)},
                }
            },
        },
        "supervised": {
            "resnet": {"test": properties},
            "redshift": {"test": {"r2": value(0.991)}},
        },
        "real": {
            "redshift": {"desi": {"z<0.6": {"n": 47, "knn": numbers, "by_snr": []}}},
            "pairs": {
                "names": ["a"],
                "image->spectrum": {"pool_size": 4005, "rank": [3, 12], "rank_among_pairs": [1, 2]},
            },
            "out_of_class": {
                "QSO": {
                    "n": 29,
                    "auc_real_galaxies": 0.91,
                    "detected_at_5pct_real": 0.5,
                    "detected_at_5pct_simulated": 0.6,
                }
            },
        },
    }


def test_marked_tables_are_replaced_and_the_rest_is_left(tables: ModuleType, tmp_path: Path):
    (tmp_path / "evaluation.json").write_text(json.dumps(report()))
    text = "before\n<!-- table:marks -->\nold\n<!-- /table:marks -->\nafter\n"
    new = tables.update(text, tmp_path)
    assert new.startswith("before\n<!-- table:marks -->\n| mark") and new.endswith("<!-- /table:marks -->\nafter\n")
    assert "old" not in new and tables.update(new, tmp_path) == new
    assert "| one | ≥ 0.5 | 0.612 | yes |" in new and "| two | ≤ 0.005 | 0.0081 | **no** |" in new
    assert "| three | ≥ 0.5 | – | not measured |" in new


def test_every_table_renders_with_its_numbers(tables: ModuleType, tmp_path: Path):
    (tmp_path / "evaluation.json").write_text(json.dumps(report()))
    zero = tables.render("evaluation", tmp_path)
    assert "0.731 (±0.010)" in zero and "| spectrum | supervised 1-D CNN | 0.991 (±0.010) | – |" in zero
    assert "| image | aligned, k chosen on validation, z < 0.6 only | 0.500" in zero
    assert "4,000 held-out" in zero and "`astroclip evaluate`" in zero
    assert "| image → spectrum | all | 1,000 | 0.123 (±0.010) |" in tables.render("retrieval", tmp_path)
    real = tables.render("real-sky", tmp_path)
    assert "| DESI, z<0.6 | 47 | k-NN, aligned | 0.004 (±0.010) |" in real and "3, 12" in real
    assert "| QSO | 29 | 0.910 |" in real
    for table in (zero, real):
        for block in table.split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.count("|") for line in lines}) <= 1  # every row has every column


def test_steps_are_rows_in_the_order_of_training(tables: ModuleType, tmp_path: Path):
    (tmp_path / "steps").mkdir()
    names = [name for name, _ in re.findall(r'mark\["([^"]+)"\](\))', SCRIPT.read_text(encoding="utf-8"))]
    for i, file in enumerate(tables.STEPS.values()):
        entry = report()
        entry["marks"] = [{"name": name, "value": 0.1 * (i + 1)} for name in names]
        entry["real"]["pairs"]["image->spectrum"]["median_rank"] = 7.0
        entry["real"]["out_of_class"]["STAR"] = {"detected_at_5pct_real": 0.25}
        (tmp_path / file).write_text(json.dumps(entry))
    lines = tables.render("steps", tmp_path).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["0.100", "0.200", "0.300"]
    assert all(line.endswith("| 0.500 | 0.250 | 7 of 4,005 |") for line in lines)


def test_missing_results_are_said_and_unknown_tables_refused(tables: ModuleType, tmp_path: Path):
    for name in (*tables.TABLES, *tables.OF_SEVERAL):
        assert tables.render(name, tmp_path) == "_Not measured yet._"
    with pytest.raises(KeyError):
        tables.update("<!-- table:nothing -->\n<!-- /table:nothing -->", tmp_path)


def test_the_readme_is_in_step(tables: ModuleType):
    text = (SCRIPT.parents[1] / "README.md").read_text(encoding="utf-8")
    assert tables.update(text) == text, "run python benchmarks/readme_tables.py"
    assert not re.search(r"^[A-Z_]{4,}$", text, re.MULTILINE), "a place left to fill"
