"""The command from end to end on a small survey, with a tiny model of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from astroclip.embed import Embedder
from astroclip.io.mmu import iter_mmu
from astroclip.models import AstroCLIPModel
from astroclip.preprocess import ImageGrid, SpectrumGrid
from training.data import find_shards
from training.evaluate.encoders import ModelEncoder, load_tower
from training.evaluate.survey import encode_part, read_columns


def application():  # type: ignore[no-untyped-def]
    import typer

    from training.evaluate.cli import register

    app = typer.Typer()
    register(app)
    return app


@pytest.fixture(scope="module")
def towers(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the pretraining stages leave: one tower's weights a file."""
    folder = tmp_path_factory.mktemp("towers")
    model = AstroCLIPModel.from_pretrained(tiny_model_dir)
    paths = {}
    for name, tower in (("image", model.image_tower), ("spectrum", model.spectrum_tower)):
        paths[name] = folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tower.state_dict().items()}, paths[name])
    return paths


def test_evaluate_command_writes_a_whole_report(
    small_survey: Path, tiny_model_dir: Path, towers: dict[str, Path], tmp_path: Path
):
    out = tmp_path / "evaluation.json"
    words = ["evaluate", "--model", tiny_model_dir, "--data", small_survey, "--out", out, "--shared", tmp_path / "no"]
    words += ["--image-tower", towers["image"], "--spectrum-tower", towers["spectrum"], "--device", "cpu"]
    done = CliRunner().invoke(application(), [str(word) for word in words])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert sum(report["data"]["objects"].values()) == 79
    assert sum(report["data"]["left_out"].values()) == 1
    assert set(report["simulated"]["zero_shot"]["tuned"]) == {
        "image->image",
        "spectrum->spectrum",
        "image->spectrum",
        "spectrum->image",
    }
    assert set(report["unaligned"]["zero_shot"]["upstream"]) == {"image->image", "spectrum->spectrum"}
    assert report["simulated"]["near"]["objects"] == report["data"]["objects"]["test"]  # all lie at z < 0.4
    assert report["simulated"]["near"]["zero_shot"] == report["simulated"]["zero_shot"]
    assert report["simulated"]["retrieval"]["image->spectrum"]["objects"] == report["data"]["objects"]["test"]
    assert report["real"] == {"skipped": "the folder of real data was not there"} and "skipped" in done.output
    assert report["model"]["sha256"] and report["machine"]["cores"] and len(report["data"]["shards_sha256"]) == 64
    measured = {mark["name"] for mark in report["marks"] if mark["passed"] is not None}
    assert "redshift R2, spectrum" in measured and "photometric realism: R2" not in measured
    assert ":::MLLOG" in (tmp_path / "evaluation.mllog.txt").read_text()


def test_evaluate_on_the_real_sky(small_survey: Path, tiny_model_dir: Path, shared_data: Path):
    from training.evaluate.run import Plan, evaluate

    report = evaluate(Plan(tiny_model_dir, small_survey, shared=shared_data, n_bootstrap=10, device="cpu"))
    real = report["real"]
    assert real["redshift"]["desi"]["z<0.6"]["n"] >= 46 and real["redshift"]["sdss"]["z<0.6"]["n"] >= 13
    assert len(real["objects"]) > 150 and all("z_knn" in row for row in real["objects"])
    assert len(real["pairs"]["names"]) == 5
    assert real["pairs"]["image->spectrum"]["pool_size"] == report["data"]["objects"]["test"] + 5
    assert {"QSO", "STAR"} <= set(real["out_of_class"])


def test_a_survey_read_for_training_gives_the_vectors_that_serving_gives(small_survey: Path, tiny_model_dir: Path):
    """The evaluation reads shards in bulk; a user's object goes through the readers. Both must meet."""
    embedder = Embedder.from_pretrained(tiny_model_dir, device="cpu")
    shard = find_shards(small_survey)[1]
    encoder = ModelEncoder(embedder.model, "cpu")
    keys = {("aligned", "image"): encoder, ("aligned", "spectrum"): encoder}
    bulk = encode_part([shard], keys, ImageGrid(), SpectrumGrid())  # type: ignore[arg-type]
    rows = list(iter_mmu(shard))
    served = {
        "image": embedder.embed([row.image for row in rows]),
        "spectrum": embedder.embed([row.spectrum for row in rows]),
    }
    for modality, vectors in served.items():
        cosine = np.sum(vectors * bulk.vectors["aligned", modality], axis=1)
        assert cosine.min() > 1 - 2e-4, modality  # half precision of the cache


def test_towers_of_another_shape_are_refused(tiny_model_dir: Path, towers: dict[str, Path], tmp_path: Path):
    encoder = load_tower(tiny_model_dir, towers["image"], "image", "cpu")
    assert encoder.encode_images(np.zeros((2, 3, 96, 96), np.float32)).shape == (2, 128)
    save_file({"stem.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"wanted the tower\.safetensors"):
        load_tower(tiny_model_dir, tmp_path / "other.safetensors", "image", "cpu")
    with pytest.raises((ValueError, RuntimeError)):
        load_tower(tiny_model_dir, towers["spectrum"], "image", "cpu")


def test_missing_columns_are_named(small_survey: Path):
    with pytest.raises(ValueError, match="lacks dust_av"):
        read_columns(find_shards(small_survey), ["flux_g", "dust_av"])
