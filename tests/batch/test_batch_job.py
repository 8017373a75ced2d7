"""The batch job: what goes in, what comes out, deaths and resumptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from sky import make_image, make_spectrum

from astroclip.batch import embed_catalog
from astroclip.errors import InputError, ProvenanceError
from astroclip.preprocess.statistics import STATISTICS
from astroclip.types import Image

REPOSITORY = Path(__file__).resolve().parents[2]


def write_shard(path: Path, n: int, seed: int = 0, spoil: Sequence[int] = ()) -> Path:
    """A survey shard of `n` rows of the synthetic sky; images of the rows in `spoil` are NaN."""
    rng = np.random.default_rng(seed)
    images = [make_image(rng, size=100) for _ in range(n)]
    redshifts = rng.uniform(0.05, 0.6, n)
    spectra = [make_spectrum(rng, z) for z in redshifts]
    pixels = np.stack([i.pixels for i in images])
    pixels[list(spoil)] = np.nan
    with h5py.File(path, "w") as file:
        file["object_id"] = np.array([f"{path.stem}-{i:04d}" for i in range(n)], dtype="S")
        file["ra"], file["dec"] = np.linspace(10, 20, n), np.linspace(-5, 5, n)
        file["Z"], file["redshift"] = redshifts.astype("f4"), redshifts.astype("f4")
        file["log_stellar_mass"] = rng.normal(10.5, 0.5, n)
        file["target_class"] = np.array([b"BGS"] * n)
        file["image_array"] = pixels
        file["image_band"] = np.array([[b"DES-G", b"DES-R", b"DES-Z"]] * n)
        file["image_scale"] = np.full((n, 3), 0.262, "f4")
        for name, values in (("lambda", "wave"), ("flux", "flux"), ("ivar", "ivar"), ("mask", "mask")):
            file[f"spectrum_{name}"] = np.stack([getattr(s, values) for s in spectra])
    return path


def write_cutout(path: Path, image: Image) -> Path:
    header = fits.Header({"BANDS": "grz", "SURVEY": "LegacySurvey", "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"})
    header.update(CRVAL1=150.0, CRVAL2=2.0, CRPIX1=76.5, CRPIX2=76.5, CD1_1=-0.262 / 3600, CD2_2=0.262 / 3600)
    fits.PrimaryHDU(image.pixels, header).writeto(path)
    return path


def write_spectrum(path: Path, rng: np.random.Generator) -> Path:
    spectrum = make_spectrum(rng)
    rows = np.column_stack([spectrum.wave, spectrum.flux, spectrum.ivar])
    np.savetxt(path, rows[::4], delimiter=",", header="wave,flux,ivar", comments="", fmt="%.6g")
    return path


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.name != ".lock"}


def table(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(p) for p in sorted(out.glob("part-*.parquet"))])


# --- what comes out -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("shards") / "a.hdf5", 70, spoil=(3,))


def test_a_shard_becomes_parts(tmp_path, shard, tiny_embedder):
    seen = []
    report = embed_catalog([shard], tmp_path, tiny_embedder, part_rows=64, advance=lambda *counts: seen.append(counts))
    assert (report.rows, report.failed, report.parts, report.parts_skipped) == (70, 1, 2, 0)
    assert seen[-1][1:] == (70, 70)
    rows = table(tmp_path)
    assert rows["object_id"].to_pylist() == [f"a-{i:04d}" for i in range(70)]
    assert rows["source"][69].as_py() == "a.hdf5#69"
    assert {"redshift", "log_stellar_mass", "target_class"} <= set(rows.column_names)
    assert "Z" not in rows.column_names and "z" not in rows.column_names
    assert rows.schema.field("image_embedding").type == pa.list_(pa.float32(), tiny_embedder.dim)
    for modality, names in STATISTICS.items():
        assert rows.schema.field(f"{modality}_statistics").metadata == {b"names": ",".join(names).encode()}
        measured = rows[f"{modality}_statistics"]
        assert measured.is_valid().equals(rows[f"{modality}_embedding"].is_valid())
        assert len(measured[0].as_py()) == len(names)
    assert json.loads((tmp_path / "embedding.json").read_text())["model_sha256"] == tiny_embedder.model_sha256
    marker = json.loads((tmp_path / "part-00000.done.json").read_text())
    assert marker["rows"] == 64 and marker["failed"] == 1 and marker["inputs"][0]["rows"] == [0, 64]


def test_vectors_are_those_of_the_embedder(tmp_path, shard, tiny_embedder):
    from astroclip.io.mmu import iter_mmu

    embed_catalog([shard], tmp_path, tiny_embedder, limit=12)
    rows, objects = table(tmp_path), list(iter_mmu(shard, 0, 12))
    assert len(rows) == 12
    wanted = tiny_embedder.embed([o.spectrum for o in objects])
    np.testing.assert_allclose(np.stack(rows["spectrum_embedding"].to_pylist()), wanted, atol=1e-5)
    images = {i: o.image for i, o in enumerate(objects) if o.image is not None}
    wanted = tiny_embedder.embed(list(images.values()))
    found = [rows["image_embedding"][i].as_py() for i in images]
    np.testing.assert_allclose(np.stack(found), wanted, atol=1e-5)


def test_a_bad_image_keeps_its_row_and_its_spectrum(tmp_path, shard, tiny_embedder):
    embed_catalog([shard], tmp_path, tiny_embedder, limit=5)
    row = table(tmp_path).slice(3, 1).to_pylist()[0]
    assert row["image_embedding"] is None and row["spectrum_embedding"] is not None
    assert row["error"].startswith("no_finite_pixels: ") and row["redshift"] is not None


def test_index_accepts_the_parts(tmp_path, shard, tiny_embedder):
    parts = pytest.importorskip("index.parts")
    embed_catalog([shard], tmp_path, tiny_embedder, part_rows=64)
    read = list(parts.read_parts(tmp_path, parts.read_info(tmp_path)))
    assert [len(p.catalog) for p in read] == [64, 6]
    assert [len(p.vectors["image"]) for p in read] == [63, 6]


# --- what goes in -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, rng) -> Path:
    """A folder of loose files: good, bad, and no objects at all."""
    root = tmp_path / "sky"
    (root / "deep").mkdir(parents=True)
    write_cutout(root / "b.fits", make_image(rng))
    write_cutout(root / "deep" / "c.fits", make_image(rng))
    write_spectrum(root / "d.csv", rng)
    np.save(root / "e.npy", make_image(rng).pixels)
    (root / "f.fits").write_bytes(b"wave,flux\n")
    (root / "notes.csv").write_text("name,who\nx,y\n")
    (root / ".hidden.fits").write_bytes(b"")
    return root


def test_a_folder_of_files(tmp_path, folder, tiny_embedder):
    report = embed_catalog([folder], tmp_path / "out", tiny_embedder)
    rows = table(tmp_path / "out").to_pylist()
    assert [r["source"] for r in rows] == [
        "sky/b.fits#0",
        "sky/d.csv#0",
        "sky/deep/c.fits#0",
        "sky/e.npy#0",
        "sky/f.fits#0",
    ]
    assert [r["object_id"] for r in rows] == ["b", "d", "c", "e", None]
    assert [bool(r["image_embedding"]) for r in rows] == [True, False, True, True, False]
    assert rows[1]["spectrum_embedding"] and rows[4]["error"].startswith("media_type_mismatch: ")
    assert "image:assumed_bands" in rows[3]["quality_flags"] and np.isclose(rows[0]["ra"], 150.0)
    assert report.skipped_files == ("sky/notes.csv",) and report.failed == 1


@pytest.mark.parametrize("suffix", [".csv", ".fits", ".parquet", ".vot"])
def test_a_catalogue_of_files(tmp_path, folder, tiny_embedder, suffix):
    rows = {
        "name": ["one", "two", "three"],
        "RA": [1.0, 2.0, 3.0],
        "Dec": [4.0, 5.0, 6.0],
        "image": ["b.fits", "deep/c.fits", "gone.fits"],
        "spectrum": ["d.csv", "", "d.csv"],
        "mag_r": [17.5, 18.5, 19.5],
        "Z": [0.1, 0.2, 0.3],
        "pixel_scale_arcsec": [0.262, 0.5, 0.262],
    }
    path = folder / f"list{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    else:
        Table(rows).write(path, format={".csv": "ascii.csv", ".fits": "fits", ".vot": "votable"}[suffix])
    report = embed_catalog([path], tmp_path / "out", tiny_embedder)
    found = table(tmp_path / "out").to_pylist()
    assert (report.rows, report.failed) == (3, 1)
    assert [r["object_id"] for r in found] == ["one", "two", "three"]
    assert [r["redshift"] for r in found] == [0.1, 0.2, 0.3] and [r["mag_r"] for r in found] == [17.5, 18.5, 19.5]
    assert (found[1]["ra"], found[1]["dec"]) == (2.0, 5.0)
    assert [bool(r["image_embedding"]) for r in found] == [True, True, False]
    assert [bool(r["spectrum_embedding"]) for r in found] == [True, False, True]
    assert "image:resampled" in found[1]["quality_flags"] and "image:resampled" not in found[0]["quality_flags"]
    assert found[2]["error"].startswith("no_such_file: ") and "gone.fits" in found[2]["error"]


def test_hats_rows_with_struct_columns(tmp_path, rng, tiny_embedder):
    image, spectrum = make_image(rng, size=100), make_spectrum(rng)
    rows = {
        "object_id": ["x1", "x2"],
        "ra": [1.0, 2.0],
        "dec": [3.0, 4.0],
        "image": [
            {"array": image.pixels.tolist(), "filter": ["DES-G", "DES-R", "DES-Z"], "pixel_size": [0.262] * 3},
            None,
        ],
        "spectrum": [
            {"lambda": s.wave.tolist(), "flux": s.flux.tolist(), "ivar": s.ivar.tolist()} for s in [spectrum] * 2
        ],
    }
    folder = tmp_path / "hats" / "Norder=0"
    folder.mkdir(parents=True)
    pq.write_table(pa.table(rows), folder / "Npix=0.parquet", row_group_size=1)
    embed_catalog([tmp_path / "hats"], tmp_path / "out", tiny_embedder)
    found = table(tmp_path / "out").to_pylist()
    assert [r["object_id"] for r in found] == ["x1", "x2"] and [r["error"] for r in found] == [None, None]
    np.testing.assert_allclose(found[0]["image_embedding"], tiny_embedder.embed([image])[0], atol=1e-5)
    np.testing.assert_allclose(found[1]["spectrum_embedding"], tiny_embedder.embed([spectrum])[0], atol=1e-5)


def test_a_damaged_shard_among_good_ones_is_one_row(tmp_path, shard, tiny_embedder):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(shard, folder / "good.hdf5")
    (folder / "bad.hdf5").write_bytes(shard.read_bytes()[:5000])
    (folder / "bad.parquet").write_bytes(b"PAR1")
    report = embed_catalog([folder], tmp_path / "out", tiny_embedder, limit=4)
    rows = table(tmp_path / "out").to_pylist()
    assert [r["source"] for r in rows] == ["in/bad.hdf5#0", "in/bad.parquet#0", "in/good.hdf5#0", "in/good.hdf5#1"]
    assert [(r["error"] or "").split(":")[0] for r in rows] == ["damaged_hdf5", "damaged_file", "", ""]
    assert report.failed == 2


def test_nothing_to_embed(tmp_path, tiny_embedder):
    (tmp_path / "empty").mkdir()
    for given, code in (("empty", "no_inputs"), ("gone", "no_such_file")):
        with pytest.raises(InputError) as caught:
            embed_catalog([tmp_path / given], tmp_path / "out", tiny_embedder)
        assert caught.value.code == code


# --- the model fails ----------------------------------------------------------------------------------------


class Poisoned:
    """An embedder whose model fails on images brighter than any other, whatever shares their batch."""

    def __init__(self, embedder, threshold: float) -> None:
        self.embedder, self.threshold = embedder, threshold

    def __getattr__(self, name):
        return getattr(self.embedder, name)

    def encode(self, prepared):
        if hasattr(prepared[0], "pixels") and max(p.pixels.max() for p in prepared) > self.threshold:
            raise RuntimeError("poison")
        return self.embedder.encode(prepared)


def test_one_poisoned_object_fails_alone(tmp_path, rng, tiny_embedder):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(6):
        write_cutout(folder / f"{i}.fits", make_image(rng, flux=3000.0 if i == 2 else 30.0))
    embed_catalog([folder], tmp_path / "clean", tiny_embedder)
    embed_catalog([folder], tmp_path / "out", Poisoned(tiny_embedder, threshold=5.0))
    clean, found = table(tmp_path / "clean").to_pylist(), table(tmp_path / "out").to_pylist()
    assert [bool(r["error"]) for r in found] == [False, False, True, False, False, False]
    assert found[2]["error"].startswith("model_failed: image: RuntimeError: poison")
    for i in (0, 1, 3, 4, 5):
        np.testing.assert_allclose(found[i]["image_embedding"], clean[i]["image_embedding"], atol=1e-6)


def test_a_broken_model_stops_the_job_instead_of_failing_every_row(tmp_path, shard, tiny_embedder):
    with pytest.raises(RuntimeError, match="poison"):
        embed_catalog([shard], tmp_path, Poisoned(tiny_embedder, threshold=-1.0))
    assert not list(tmp_path.glob("part-*"))


# --- death and resumption -----------------------------------------------------------------------------------


class Dying:
    """An embedder that dies after some batches, as a machine does."""

    def __init__(self, embedder, batches: int) -> None:
        self.embedder, self.left = embedder, batches

    def __getattr__(self, name):
        return getattr(self.embedder, name)

    def encode(self, prepared):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.embedder.encode(prepared)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("many")
    return [write_shard(folder / f"s{i}.hdf5", 40, seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards, tiny_embedder) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    embed_catalog(shards, out, tiny_embedder, part_rows=40)
    return contents(out)


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 5])
def test_a_job_that_died_resumes_to_the_same_bytes(tmp_path, shards, undisturbed, tiny_embedder, batches):
    with pytest.raises(KeyboardInterrupt):
        embed_catalog(shards, tmp_path, Dying(tiny_embedder, batches), part_rows=40)
    assert len(list(tmp_path.glob("part-*.parquet"))) == batches // 2  # a part takes two batches
    report = embed_catalog(shards, tmp_path, tiny_embedder, part_rows=40)
    assert report.parts_skipped == batches // 2 and report.rows == 120
    assert contents(tmp_path) == undisturbed


def test_the_number_of_readers_changes_nothing(tmp_path, shards, undisturbed, tiny_embedder):
    embed_catalog(shards, tmp_path, tiny_embedder, part_rows=40, workers=5)
    assert contents(tmp_path) == undisturbed


def test_reading_in_processes_changes_nothing(tmp_path, shards, undisturbed, tiny_embedder):
    embed_catalog(shards, tmp_path, tiny_embedder, part_rows=40, processes=True)
    assert contents(tmp_path) == undisturbed


def test_a_finished_job_does_nothing_again(tmp_path, shards, tiny_embedder):
    embed_catalog(shards, tmp_path, tiny_embedder, part_rows=40)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("part-*")}
    report = embed_catalog(shards, tmp_path, Dying(tiny_embedder, 0), part_rows=40)
    assert report.parts_skipped == report.parts == 3 and report.rows == 120
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("part-*")} == before


@pytest.mark.parametrize("harm", ["truncate", "flip", "no marker", "bad marker", "input touched"])
def test_what_is_damaged_or_outdated_is_made_again(tmp_path, shards, undisturbed, tiny_embedder, harm):
    inputs = [Path(shutil.copy2(s, tmp_path / s.name)) for s in shards]
    out = tmp_path / "out"
    embed_catalog(inputs, out, tiny_embedder, part_rows=40)
    part, marker = out / "part-00001.parquet", out / "part-00001.done.json"
    content = bytearray(part.read_bytes())
    if harm == "truncate":
        part.write_bytes(content[:-50])
    elif harm == "flip":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif harm == "no marker":
        marker.unlink()
    elif harm == "bad marker":
        marker.write_text("{")
    else:
        os.utime(inputs[1])
    report = embed_catalog(inputs, out, tiny_embedder, part_rows=40)
    assert report.parts_skipped == 2
    assert part.read_bytes() == undisturbed["part-00001.parquet"]


def test_failed_rows_are_tried_again_when_asked(tmp_path, rng, tiny_embedder):
    (tmp_path / "list.csv").write_text("id,image\na,late.fits\n")
    report = embed_catalog([tmp_path / "list.csv"], tmp_path / "out", tiny_embedder)
    assert report.failed == 1
    write_cutout(tmp_path / "late.fits", make_image(rng))
    assert embed_catalog([tmp_path / "list.csv"], tmp_path / "out", tiny_embedder).failed == 1
    report = embed_catalog([tmp_path / "list.csv"], tmp_path / "out", tiny_embedder, retry_failed=True)
    assert report.failed == 0 and table(tmp_path / "out")["image_embedding"][0].is_valid


def test_another_model_is_refused(tmp_path, shards, tiny_embedder):
    embed_catalog(shards[:1], tmp_path, tiny_embedder)

    class Other(Dying):
        model_sha256 = "0" * 64

    with pytest.raises(ProvenanceError, match="do not compare"):
        embed_catalog(shards[:1], tmp_path, Other(tiny_embedder, 0))


def test_parts_of_a_longer_job_are_refused(tmp_path, shards, tiny_embedder):
    embed_catalog(shards, tmp_path, tiny_embedder, part_rows=40)
    with pytest.raises(InputError) as caught:
        embed_catalog(shards[:2], tmp_path, tiny_embedder, part_rows=40)
    assert caught.value.code == "other_inputs" and "part-00002" in caught.value.message


def test_two_jobs_in_one_folder_are_refused(tmp_path, shards, tiny_embedder):
    class Nested(Dying):
        def encode(self, prepared):
            with pytest.raises(InputError) as caught:
                embed_catalog(shards[:1], tmp_path, self.embedder)
            assert caught.value.code == "job_running"
            return self.embedder.encode(prepared)

    assert embed_catalog(shards[:1], tmp_path, Nested(tiny_embedder, 9)).rows == 40


# --- the command --------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    code = "import typer; from astroclip.commands import register; app = typer.Typer(); register(app); app()"
    return [sys.executable, "-c", code, "embed", *map(str, arguments)]


def test_the_command_is_killed_and_resumed(tmp_path, shards, undisturbed, tiny_model_dir):
    """SIGKILL once the first part is on disk; the second run ends with the bytes of an undisturbed job."""
    arguments = command(*shards, "--out", tmp_path, "--model", tiny_model_dir, "--part-rows", 40, "--no-progress")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and not (tmp_path / "part-00000.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "part-00000.parquet").exists()
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "120 rows in 3 parts" in done.stderr
    finished = {k: v for k, v in contents(tmp_path).items() if not k.startswith(".")}
    parquet = [k for k in undisturbed if k.endswith(".parquet")]
    assert set(finished) == set(undisturbed) and all(finished[k] == undisturbed[k] for k in parquet)
