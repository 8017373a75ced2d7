"""Survey-wide lists: right by brute force, resumed to the same bytes, refused when stale or damaged."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from parts_fixture import write_parts
from typer.testing import CliRunner

from astroclip.errors import IndexFileError, InputError, ProvenanceError
from index import SurveyIndex, append_index, build_index, lists_join
from index.cli import lists as lists_command
from index.cli import register
from index.lists import KINDS, RECORD, Lists, lists_folder
from index.lists_build import DEFAULT_LIMIT, MAX_LIMIT, THRESHOLD, build_lists
from index.typical import conformal_p

TIGHT = 0.98  # of the toy survey


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(lists_join, "QUERIES", 100)
    monkeypatch.setattr(lists_join, "_BLOCK", 128)


@pytest.fixture
def root(toy, tmp_path):
    out = tmp_path / "index"
    build_index(toy.parts, out, survey="Toy")
    return out


def vectors(index, modality):
    table = index.tables[modality]
    return table.block(0, len(table)), table.rows


def ids(index, rows):
    return np.array(index.catalog.object_ids.take(rows).to_pylist())


def read(root):
    index = SurveyIndex.open(root)
    return Lists.read(index.folder, index.manifest_sha256)


def test_isolated_objects_are_those_of_brute_force(root):
    made = build_lists(root, ["isolated"], limit=20)
    index = SurveyIndex.open(root)
    for modality in ("image", "spectrum"):
        all_vectors, rows = vectors(index, modality)
        scores = all_vectors @ all_vectors.T
        np.fill_diagonal(scores, -np.inf)
        kth = np.sort(scores, axis=1)[:, -index.kth]
        order = np.argsort(kth)[:20]
        table = made.select("isolated", modality).to_pydict()
        assert table["rank"] == list(range(1, 21))
        assert table["object_id"] == ids(index, rows[order]).tolist()
        np.testing.assert_allclose(table["score"], kth[order], atol=1e-6)
        assert table["nearest_id"] == ids(index, rows[scores[order].argmax(axis=1)]).tolist()
        np.testing.assert_allclose(table["nearest_score"], scores[order].max(axis=1), atol=1e-6)
        assert table["p"][0] == pytest.approx(conformal_p(index.kth_table(modality), kth[order[0]]))
    assert made.entries["isolated"].found == sum(len(t) for t in index.tables.values())


def test_disagreeing_pairs_carry_their_ranks(root):
    made = build_lists(root, ["disagreeing"], limit=30)
    index = SurveyIndex.open(root)
    (image, image_rows), (spectrum, spectrum_rows) = (vectors(index, m) for m in ("image", "spectrum"))
    scores = image @ spectrum.T
    rows = np.intersect1d(image_rows, spectrum_rows)
    i, s = np.searchsorted(image_rows, rows), np.searchsorted(spectrum_rows, rows)
    own = scores[i, s]
    order = np.argsort(own)[:30]
    table = made.tables["disagreeing"].to_pydict()
    assert table["object_id"] == ids(index, rows[order]).tolist()
    np.testing.assert_allclose(table["score"], own[order], atol=1e-6)
    assert table["nearer_spectra"] == [int((scores[i[j]] > own[j] + 1e-6).sum()) for j in order]
    assert table["nearer_images"] == [int((scores[:, s[j]] > own[j] + 1e-6).sum()) for j in order]
    assert table["nearest_spectrum_id"] == ids(index, spectrum_rows[scores[i[order]].argmax(axis=1)]).tolist()
    assert table["nearest_image_id"] == ids(index, image_rows[scores[:, s[order]].argmax(axis=0)]).tolist()
    first = (1 + table["nearer_spectra"][0]) / len(spectrum) * (1 + table["nearer_images"][0]) / len(image)
    assert table["disagreement"][0] == pytest.approx(first**0.5)
    assert made.entries["disagreeing"].found == len(rows)


def test_exchanged_partners_come_first(tmp_path):
    """Spectra of two far galaxies exchanged: both head the list, and each names the other."""
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    write_parts(tmp_path / "parts", 300, lacking=0.0, per_part=300)
    path = tmp_path / "parts" / "part-00000.parquet"
    table = pq.read_table(path)
    spectrum = table.column("spectrum_embedding").combine_chunks()
    order = np.arange(300)
    z = table.column("redshift").to_numpy().copy()
    z[150] = np.nan  # the object without either
    a, b = int(np.nanargmin(z)), int(np.nanargmin(np.abs(z - 0.5)))
    order[[a, b]] = order[[b, a]]
    at = table.column_names.index("spectrum_embedding")
    pq.write_table(table.set_column(at, "spectrum_embedding", spectrum.take(pa.array(order))), path)
    done = path.with_suffix(".done.json")
    marker = {**json.loads(done.read_text()), "parquet_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    done.write_text(json.dumps(marker))
    build_index(tmp_path / "parts", tmp_path / "index", survey="Swapped")
    found = build_lists(tmp_path / "index", ["disagreeing"], limit=2).tables["disagreeing"].to_pylist()
    assert {row["object_id"] for row in found} == {f"obj-{a:06d}", f"obj-{b:06d}"}
    assert min(row["disagreement"] for row in found) > 0.1


def test_duplicates_are_close_in_all_that_both_have(root):
    made = build_lists(root, ["duplicates"], threshold=TIGHT, limit=MAX_LIMIT)
    index = SurveyIndex.open(root)
    has, cosine = {}, {}
    for modality in ("image", "spectrum"):
        full = np.full((len(index), index.dim), np.nan, np.float32)
        found, rows = vectors(index, modality)
        full[rows] = found
        cosine[modality], has[modality] = full @ full.T, ~np.isnan(full[:, 0])
    least = np.fmin(cosine["image"], cosine["spectrum"])
    wanted = {(a, b) for a, b in zip(*np.nonzero(least >= TIGHT), strict=True) if a < b}
    name = {object_id: row for row, object_id in enumerate(index.catalog.object_ids.to_pylist())}
    rows = made.tables["duplicates"].to_pylist()
    pairs = [tuple(sorted((name[r["object_id"]], name[r["partner_id"]]))) for r in rows]
    assert set(pairs) == wanted and len(pairs) == len(wanted) == made.entries["duplicates"].found > 50
    assert any(r["image_score"] is None for r in rows) and any(r["spectrum_score"] is None for r in rows)
    for row, (a, b) in zip(rows, pairs, strict=True):
        assert row["score"] == pytest.approx(least[a, b], abs=1e-6)
        assert 0 <= row["separation_arcsec"] <= 180 * 3600
    assert_components(rows, pairs)
    only = made.select("duplicates", "image").to_pydict()["image_score"]
    assert len(only) == sum(r["image_score"] is not None for r in rows)


def assert_components(rows, pairs):
    """Groups are the connected components, sizes their objects, best pair first."""
    group = {}
    for row, pair in zip(rows, pairs, strict=True):
        group.setdefault(row["group"], set()).update(pair)
    members = [member for objects in group.values() for member in objects]
    assert len(members) == len(set(members))
    assert all(row["group_size"] == len(group[row["group"]]) for row in rows)
    assert [row["group"] for row in rows] == sorted(row["group"] for row in rows)
    best = [max(r["score"] for r in rows if r["group"] == g) for g in sorted(group)]
    assert best == sorted(best, reverse=True)


def test_the_number_of_pairs_is_bounded(root, monkeypatch):
    monkeypatch.setattr(lists_join, "MAX_PAIRS", 40)
    kept = []
    save = lists_join._save
    monkeypatch.setattr(
        lists_join, "_save", lambda state, *rest: kept.append(len(getattr(state, "left", ()))) or save(state, *rest)
    )
    made = build_lists(root, ["duplicates"], threshold=TIGHT, limit=MAX_LIMIT)
    entry = made.entries["duplicates"]
    assert entry.rows <= 80 < entry.found  # 40 of each join; `found` says that there are more
    assert max(kept) <= 80  # and on the way


def test_limit_and_kinds(root):
    made = build_lists(root, ["isolated", "disagreeing"], limit=7)
    assert made.tables["isolated"].num_rows == 14 and made.tables["disagreeing"].num_rows == 7
    assert set(build_lists(root, ["duplicates"]).entries) == set(KINDS)  # the others are kept
    assert [f.name for f in lists_folder(resolved(root)).glob(".joins")] == []


def resolved(root):
    return SurveyIndex.open(root).folder


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"kinds": ["lonely"]}, "kinds"),
        ({"kinds": []}, "kinds"),
        ({"limit": 0}, "limit"),
        ({"limit": MAX_LIMIT + 1}, "limit"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.01}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
    ],
)
def test_bad_parameters_are_refused(root, given, field):
    with pytest.raises(InputError) as caught:
        build_lists(root, **given)
    assert caught.value.field == field


# --- killed and resumed ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from index import lists_join
from index.lists_build import build_lists
lists_join.QUERIES, lists_join._BLOCK = 100, 128
said = 0
def progress(name, done, total):
    global said
    said += 1
    if said == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
build_lists(sys.argv[1], threshold=0.98, progress=progress)
"""


def digests(root):
    return {path.name: path.read_bytes() for path in lists_folder(resolved(root)).glob("*.parquet")}


@pytest.mark.parametrize("at", [3, 9, 16])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(root, at):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(root), str(at)], env=environment)
    assert done.returncode == -signal.SIGKILL
    begun = []
    build_lists(root, threshold=TIGHT, progress=lambda name, done, total: begun.append((name, done)))
    resumed = digests(root)
    assert len(resumed) == 3
    assert any(done > 0 for name, done in dict(reversed(begun)).items()), "began anew"
    shutil.rmtree(lists_folder(resolved(root)))
    build_lists(root, threshold=TIGHT)
    assert digests(root) == resumed


def test_a_damaged_checkpoint_is_begun_anew(root):
    def stop(name, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_lists(root, ["isolated"], progress=stop)
    (state,) = (lists_folder(resolved(root)) / ".joins").glob("*.npz")
    content = state.read_bytes()
    for damage in (content[:-40], content[: len(content) // 2], b"", b"x" * 1000):
        state.write_bytes(damage)
        with pytest.raises(KeyboardInterrupt):
            build_lists(root, ["isolated"], progress=stop)
    build_lists(root, ["isolated"])


def test_other_parameters_do_not_resume(root):
    def stop(name, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_lists(root, ["duplicates"], threshold=0.5, progress=stop)
    first = []
    build_lists(root, ["duplicates"], threshold=TIGHT, progress=lambda name, done, total: first.append(done))
    assert first[0] == 0


# --- beside the index ------------------------------------------------------------------------------------------------


def test_the_index_stays_as_it_is(root):
    before = {p: p.read_bytes() for p in resolved(root).rglob("*") if p.is_file()}
    build_lists(root)
    assert {p: p.read_bytes() for p in resolved(root).rglob("*") if p.is_file()} == before
    assert lists_folder(resolved(root)) == root / "lists" / "v000001"
    SurveyIndex.open(root)


def test_a_new_version_has_no_lists_until_they_are_made(root, tmp_path):
    build_lists(root, ["isolated"])
    for round_ in range(2):
        write_parts(tmp_path / f"more-{round_}", 40, prefix=f"more{round_}")
        append_index(root, tmp_path / f"more-{round_}", heads="never")
    assert not read(root).entries
    build_lists(root, ["isolated"])
    assert read(root).entries["isolated"].rows > 0
    assert [path.name for path in (root / "lists").iterdir()] == ["v000003"]  # version 1 is gone, and its lists


def test_lists_of_another_manifest_are_refused_and_replaced(root, toy, tmp_path):
    plain = tmp_path / "plain"
    build_index(toy.parts, plain, survey="Toy", index_id="plain", plain=True)
    build_lists(root)
    shutil.copytree(lists_folder(resolved(root)), plain / "lists")
    with pytest.raises(ProvenanceError, match="run `astroclip index lists` again") as caught:
        read(plain)
    assert caught.value.code == "stale_lists"
    SurveyIndex.open(plain)
    assert set(build_lists(plain, ["isolated"]).entries) == {"isolated"}
    assert len(list((plain / "lists").glob("*.parquet"))) == 1


def test_a_damaged_list_is_refused_by_name(root):
    build_lists(root)
    folder = lists_folder(resolved(root))
    rng = np.random.default_rng(2)
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".parquet", ".json")):
        content = path.read_bytes()
        damages = [content[:-1], content + b"\n", b""]
        for _ in range(5):
            flipped = bytearray(content)
            flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
            damages.append(bytes(flipped))
        for damage in damages:
            path.write_bytes(damage)
            with pytest.raises(IndexFileError, match=f"list file {path.name}") as caught:
                read(root)
            assert caught.value.field == path.name
        if path.name != RECORD:
            path.unlink()
            with pytest.raises(IndexFileError, match=path.name):
                read(root)
        path.write_bytes(content)
    read(root)


def test_two_makers_do_not_meet(root):
    def second(name, done, total):
        with pytest.raises(InputError, match="one at a time"):
            build_lists(root)

    build_lists(root, ["isolated"], progress=second)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run():
    app = typer.Typer()
    register(app)
    return lambda *args: CliRunner().invoke(app, ["index", *map(str, args)])


def test_command_and_verify(root, run):
    made = run("lists", root, "--kinds", "isolated,duplicates", "--limit", "5", "--threshold", "0.98")
    assert made.exit_code == 0 and "isolated" in made.output and "image to image" in made.stderr
    assert set(read(root).entries) == {"isolated", "duplicates"}
    assert run("lists", root, "-q", "--kinds", "isolated").stderr == ""
    verified = json.loads(run("verify", root, "--json").output)
    assert verified["ok"] and sum(row["file"].startswith("lists: ") for row in verified["files"]) == 3
    (path,) = lists_folder(resolved(root)).glob("isolated-*.parquet")
    path.write_bytes(b"nothing")
    answer = run("verify", root, "--json")
    assert answer.exit_code == 1 and path.name in answer.output


def test_the_commands_defaults_are_the_librarys():
    given = {name: parameter.default for name, parameter in inspect.signature(lists_command).parameters.items()}
    assert given["kinds"].split(",") == list(KINDS)
    assert (given["limit"], given["threshold"]) == (DEFAULT_LIMIT, THRESHOLD)
