"""The command from end to end on a small survey, with a tiny model of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from astroclip.embed import Embedder
from astroclip.errors import InputError
from astroclip.io.mmu import iter_mmu
from astroclip.models import AstroCLIPModel
from training.benchmark.submission import check_files
from training.data import find_shards
from training.evaluate.encoders import load_tower, model_sources
from training.evaluate.run import Plan, _check_baseline, evaluate
from training.evaluate.survey import VectorCache, encode_part, read_columns


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
    words += ["--encoder", f"twin={tiny_model_dir}", "--cache", tmp_path / "cache"]
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
    assert report["encoders"]["twin"]["zero_shot"] == report["simulated"]["zero_shot"]
    assert set(report["simulated"]["few_shot"]) == {"all"}  # fewer than a hundred labels
    assert "retrieval" not in report["unaligned"]
    assert check_files([out, out.with_suffix(".mllog.txt")]) == {str(out): [], str(out.with_suffix(".mllog.txt")): []}
    assert report["benchmark"]["release"]["status"] == "no release"
    assert report["simulated"]["retrieval"]["image->spectrum"]["objects"] == report["data"]["objects"]["test"]
    assert report["real"] == {"skipped": "the folder of real data was not there"} and "skipped" in done.output
    assert report["model"]["sha256"] and report["machine"]["cores"] and len(report["data"]["shards_sha256"]) == 64
    measured = {mark["name"] for mark in report["marks"] if mark["passed"] is not None}
    assert "redshift R2, spectrum" in measured and "photometric realism: R2" not in measured


def test_evaluate_on_the_real_sky(small_survey: Path, tiny_model_dir: Path, shared_data: Path):
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
    bulk = encode_part([shard], model_sources("aligned", embedder, "cpu"))
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


def test_the_cache_gives_the_same_vectors_and_spares_the_encoder(
    small_survey: Path, tiny_model_dir: Path, tmp_path: Path
):
    embedder = Embedder.from_pretrained(tiny_model_dir, device="cpu")
    sources = model_sources("aligned", embedder, "cpu")
    shards = find_shards(small_survey)[:2]
    cache = VectorCache(tmp_path)
    first = encode_part(shards, sources, cache=cache)

    class Broken:
        def encode_images(self, pixels: np.ndarray) -> np.ndarray:
            raise AssertionError("embedded again")

        encode_spectra = encode_images

    idle = {key: replace(source, encoder=Broken()) for key, source in sources.items()}
    again = encode_part(shards, idle, cache=cache)  # type: ignore[arg-type]
    for key, vectors in first.vectors.items():
        np.testing.assert_array_equal(vectors, again.vectors[key])
    damaged = next(tmp_path.rglob("*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises((AssertionError, TypeError)):
        encode_part(shards, idle, cache=cache)  # type: ignore[arg-type]
    encode_part(shards, sources, cache=cache)
    assert np.load(damaged).shape == (16, embedder.dim)


def test_closed_runs_need_a_release_and_bad_options_are_named(small_survey: Path, tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no release"):
        evaluate(Plan(tiny_model_dir, small_survey, division="closed"))
    with pytest.raises(InputError, match=r"different from astroclip-sim-small(.|\n)*missing"):
        evaluate(Plan(tiny_model_dir, small_survey, division="closed", release="astroclip-sim-small"))
    with pytest.raises(InputError, match="aligned"):
        evaluate(Plan(tiny_model_dir, small_survey, encoders=(("aligned", tiny_model_dir),)))
    with pytest.raises(InputError, match="training log"):
        evaluate(Plan(tiny_model_dir, small_survey, training_logs=(tmp_path / "none.txt",)))


def test_a_baseline_judged_elsewhere_is_refused_in_the_closed_division():
    entry = {"kind": "resnet", "objects": {"test": 500}, "test_shards": ["a"]}
    data = {"split": {"test": ["b"]}, "objects": {"test": 500}}
    with pytest.raises(InputError, match="other shards"):
        _check_baseline(entry, data, "closed", print)
    said: list[str] = []
    _check_baseline(entry, data, "open", said.append)
    assert said and "warning" in said[0]
    _check_baseline({**entry, "test_shards": ["b"]}, data, "closed", said.append)
    assert len(said) == 1
