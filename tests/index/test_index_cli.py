"""The `index` commands."""

from __future__ import annotations

import json

import pytest
import typer
from parts_fixture import write_parts
from typer.testing import CliRunner

from index.cli import register


@pytest.fixture
def run():
    app = typer.Typer()
    register(app)
    return lambda *args: CliRunner().invoke(app, ["index", *map(str, args)])


def test_build_append_verify_info(toy, tmp_path, run):
    out = tmp_path / "i"
    built = run(
        "build",
        toy.parts,
        "--out",
        out,
        "--survey",
        "Toy",
        "--id",
        "toy",
        "--previews",
        toy.survey,
        "--cite",
        "Toy 2026",
    )
    assert built.exit_code == 0 and "599" in built.output and "Toy 2026" in built.output
    write_parts(tmp_path / "new", 40, prefix="new")
    assert run("append", out, tmp_path / "new", "-q").exit_code == 0
    record = json.loads(run("info", out, "--json").output)
    assert record["counts"]["objects"] == 638 and record["version"] == 2 and record["index_id"] == "toy"
    shown = run("info", out).output
    assert "638" in shown and "calibrated on" in shown
    verified = run("verify", out, "--json")
    assert verified.exit_code == 0 and json.loads(verified.output)["ok"] is True


def test_verify_names_every_damaged_file(toy, tmp_path, run):
    out = tmp_path / "i"
    run("build", toy.parts, "--out", out, "--plain")
    for name in ("catalog.parquet", "vectors-image.npy"):
        content = bytearray((out / name).read_bytes())
        content[-5] ^= 4
        (out / name).write_bytes(content)
    answer = run("verify", out, "--json")
    problems = {f["file"] for f in json.loads(answer.output)["files"] if f["problem"]}
    assert answer.exit_code == 1 and problems == {"catalog.parquet", "vectors-image.npy"}
    assert run("verify", out).exit_code == 1


def test_properties_and_wrong_usage(toy, tmp_path, run):
    out = tmp_path / "i"
    assert run("build", toy.parts, "--out", out, "--property", "ra=deg", "--float32", "--hnsw", "never").exit_code == 0
    record = json.loads(run("info", out, "--json").output)
    assert {"name": "ra", "unit": "deg"} in record["properties"] and record["vector_dtype"] == "float32"
    assert run("build", toy.parts, "--out", out, "--hnsw", "maybe").exit_code == 2
    assert run("build", toy.parts, "--out", out, "--property", "ra").exit_code == 2


def test_backends_by_name(toy, tmp_path, run):
    out = tmp_path / "i"
    assert run("build", toy.parts, "--out", out, "--backend", "tree").exit_code == 2
    for given, found in ((["--backend", "ivf-sq8"], "ivf-sq8"), (["--hnsw", "always"], "hnsw"), ([], None)):
        assert run("build", toy.parts, "--out", out, "--no-heads", *given).exit_code == 0
        backends = json.loads(run("info", out, "--json").output)["backends"]
        assert [list(record) for record in backends.values()] == ([[found]] * 2 if found else [])
        shown = run("info", out).output
        assert (f"{found}; from image: breadth" if found else "exact") in shown.replace("\n", " ")
    assert run("verify", out).exit_code == 0
