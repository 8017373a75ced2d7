"""An imported model is a model: embedded with, indexed, served and evaluated, with one tower or two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sky import make_image, make_spectrum
from starlette.testclient import TestClient
from typer.testing import CliRunner

from astroclip.cli import build_app
from astroclip.embed import Embedder
from astroclip.io.mmu import iter_mmu
from astroclip.preprocess import LinearSpectrumGrid, SpectrumGrid, overlap_matrix, rebin, spectrum_to_grid
from service.app import make_app
from service.engine import Engine
from service.settings import Settings
from tests.evaluate.conftest import small_survey  # noqa: F401
from tests.survey import image_fits, sdss_fits
from tests.weights.published import TOWERS, checkpoint

KINDS = ["astroclip-v2", "astroclip-v1", "specformer", "stein-moco"]


def command(*words: object) -> str:
    done = CliRunner().invoke(build_app(), [str(word) for word in words])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done.output


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory, small_survey) -> tuple[str, Path, Path, Path]:  # noqa: F811
    """(kind, model directory, folder of parts, index directory), all by the command line."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    model, parts, index = folder / "model", folder / "parts", folder / "index"
    command("weights", "import", checkpoint(folder, kind), "--out", model)
    command("embed", small_survey, "--out", parts, "--model", model, "--device", "cpu", "--workers", 1, "--no-progress")
    command("index", "build", parts, "--out", index, "--plain", "--id", kind, "--survey", "test")
    return kind, model, parts, index


def test_a_survey_is_embedded_as_its_objects_are(made, small_survey):  # noqa: F811
    kind, model, parts, _ = made
    embedder = Embedder.from_pretrained(model, device="cpu")
    table = pq.read_table(sorted(parts.glob("part-*.parquet")))
    assert set(table["error"].to_pylist()) == {None}
    rows = {row.image.object_id: row for row in iter_mmu(min(small_survey.rglob("*.hdf5")))}
    ids = table["object_id"].to_pylist()
    for modality in ("image", "spectrum"):
        column = table[f"{modality}_embedding"]
        if modality not in embedder.modalities:
            assert column.null_count == len(column)
            continue
        assert column.null_count == 0 and column.type.list_size == TOWERS[kind][2]
        for name in list(rows)[:2]:
            alone = embedder.embed([getattr(rows[name], modality)])[0]
            np.testing.assert_allclose(column[ids.index(name)].as_py(), alone, atol=1e-5)


def test_it_is_served(made):
    kind, model, _, index = made
    has = Embedder.from_pretrained(model, device="cpu").modalities
    settings = Settings(index_dir=index, model_dir=model, device="cpu")
    engine = Engine.load(settings)
    files = {
        "image": image_fits(make_image(np.random.default_rng(1), size=152)),
        "spectrum": sdss_fits(make_spectrum(np.random.default_rng(2))),
    }
    try:
        with TestClient(make_app(settings, engine)) as client:
            assert client.get("/readyz").status_code == 200
            info = client.get("/v1/info").json()["models"][0]
            assert info["id"] == kind and info["dim"] == TOWERS[kind][2] and tuple(info["modalities"]) == has
            for modality, data in files.items():
                headers = {"content-type": "application/fits"}
                answer = client.post(f"/v1/embed/{modality}", content=data, headers=headers)
                if modality in has:
                    assert answer.status_code == 200, answer.text
                    assert len(answer.json()["items"][0]["embedding"]) == TOWERS[kind][2]
                else:
                    assert answer.status_code == 422 and "embeds" in answer.json()["error"]["message"]
                request = {"request": json.dumps({"query": {"upload": modality}, "target": "either", "k": 3})}
                upload = {modality: ("object.fits", data, "application/fits")}
                found = client.post("/v1/search", files=upload, data=request)
                assert found.status_code == (200 if modality in has else 422), found.text
                if modality in has:
                    assert len(found.json()["hits"]) == 3
    finally:
        engine.close()


def test_a_row_without_the_models_modality_keeps_its_row_and_says_so(made, tmp_path):
    kind, model, _, _ = made
    has = Embedder.from_pretrained(model, device="cpu").modalities
    (tmp_path / "cutout.fits").write_bytes(image_fits(make_image(np.random.default_rng(1), size=152)))
    words = ["embed", tmp_path / "cutout.fits", "--out", tmp_path / "parts", "--model", model, "--no-progress"]
    done = CliRunner().invoke(build_app(), [str(word) for word in words])
    error = pq.read_table(tmp_path / "parts" / "part-00000.parquet")["error"].to_pylist()[0]
    if "image" in has:
        assert done.exit_code == 0 and error is None
    else:
        assert done.exit_code == 1 and error.startswith("no_tower: the row has image alone; the model embeds spectrum")


def test_it_is_evaluated(made, small_survey, tmp_path):  # noqa: F811
    kind, model, _, _ = made
    out = tmp_path / "report.json"
    command("evaluate", "--model", model, "--data", small_survey, "--out", out, "--shared", tmp_path, "--device", "cpu")
    report = json.loads(out.read_text())
    has = Embedder.from_pretrained(model, device="cpu").modalities
    assert report["model"]["id"] == kind and report["model"]["dim"] == TOWERS[kind][2]
    assert set(report["simulated"]["zero_shot"]["upstream"]) == {f"{a}->{b}" for a in has for b in has}
    assert ("retrieval" in report["simulated"]) == (len(has) == 2)


# --- the grid they want -----------------------------------------------------------------------------------------------


def test_a_spectrum_on_desis_grid_passes_unchanged(rng):
    """Though its wavelengths were kept as float32; and a gap stays a gap."""
    grid = LinearSpectrumGrid()
    assert grid.wave[0] == 3600 and grid.wave[-1] == 9824 and np.allclose(np.diff(grid.wave), 0.8)
    assert np.allclose((grid.edges[1:] + grid.edges[:-1]) / 2, grid.wave)
    wave = grid.wave.astype(np.float32).astype(np.float64)
    flux, ivar = rng.normal(3, 1, 7781).astype(np.float32), rng.uniform(0.5, 2, 7781).astype(np.float32)
    ivar[100:200] = 0
    placed_flux, placed_ivar = rebin(flux, ivar, overlap_matrix(wave, grid))
    np.testing.assert_array_equal(placed_flux, np.where(ivar > 0, flux, 0))
    np.testing.assert_allclose(placed_ivar, ivar, rtol=1e-6)


def test_another_spectrograph_is_rebinned_to_it(rng):
    spectrum = make_spectrum(rng)
    placed = spectrum_to_grid(spectrum, LinearSpectrumGrid())
    coarse = spectrum_to_grid(spectrum, SpectrumGrid())
    assert placed.flux.shape == (7781,) and coarse.flux.shape == (4096,)
    both = placed.ivar > 0
    again = np.interp(LinearSpectrumGrid().wave[both], SpectrumGrid().wave, coarse.flux)
    assert np.corrcoef(again, placed.flux[both])[0, 1] > 0.7
