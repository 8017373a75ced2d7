"""Every configuration that ships runs: two steps, validation and export at test widths; and is described."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_files import write_astroclip, write_shards
from sky import make_image, make_spectrum
from typer.testing import CliRunner

from astroclip.cli import build_app
from astroclip.embed import Embedder
from astroclip.errors import InputError
from training.align import Alignment
from training.published import build_model, pair_stage, train_pairs
from training.recipes import PairSettings, read_recipe
from training.rehearsal import describe, rehearse
from training.settings import AlignSettings, StreamSettings
from training.stream import staged

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "training" / "configs").glob("*.toml"))


def stage_of(config: Path) -> str:
    return {"refine": "align", "finish": "align"}.get(name := config.stem.rpartition("-")[2], name)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("survey"), shards=4, rows=8)


@pytest.fixture(scope="module")
def astroclip_file(tmp_path_factory) -> Path:
    return write_astroclip(tmp_path_factory.mktemp("file") / "astroclip_desi.h5", groups=2, rows=20)


def test_the_recipes_of_the_papers_ship():
    assert {"v2-spectrum", "v2-align", "resnet50-align"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_runs(config, shards, tmp_path):
    settings, train = read_recipe(stage_of(config), config, data=str(shards), out=str(tmp_path / "run"))
    seen = rehearse(settings, train, tiny=True)
    assert seen["steps"] == 2 and all(0 < loss < 100 for loss in seen["losses"]) and seen["peak_gib"] > 0
    made = Path(seen["made"])
    assert made.exists() and made.is_relative_to(tmp_path / "run" / "rehearsal")
    if made.is_dir():
        embedder = Embedder.from_pretrained(made)
        assert embedder.dim == 16
        sky = np.random.default_rng(0)
        items = {"image": make_image(sky), "spectrum": make_spectrum(sky)}
        for modality in embedder.modalities:
            assert embedder.embed([items[modality]]).shape == (1, 16)


def test_encoders_are_taken_over_and_stay_as_they_were(astroclip_file, tmp_path):
    """SpecFormer trained by one configuration is the frozen encoder of another, on AstroCLIP's own layout."""
    folder = CONFIGS[0].parent
    few = StreamSettings(enabled=True, workers=0, val_fraction=0.25)
    masked, train = read_recipe("spectrum", folder / "v2-spectrum.toml", data=str(astroclip_file))
    masked = dataclasses.replace(masked, out=str(tmp_path / "s"), stream=few)
    encoder = rehearse(masked, train, tiny=True)["made"]
    settings = PairSettings(
        preset="astroclip-v1",
        data=str(astroclip_file),
        out=str(tmp_path / "a"),
        spectrum_init=encoder,
        tiny=True,
        batch_size=4,
        epochs=1,
        precision="32-true",
        devices=1,
        stream=few,
    )
    before = build_model(settings, "", encoder).state_dict()
    made = Embedder.from_pretrained(train_pairs(settings, progress=False)).model.state_dict()
    source = Embedder.from_pretrained(encoder).model.state_dict()
    moved = {name for name, value in made.items() if not torch.equal(value, before[name])}
    assert all(".head." in name or name == "logit_scale" for name in moved), moved
    assert {"image_tower.head.0.weight", "spectrum_tower.head.query", "logit_scale"} <= moved
    frozen = [n for n in source if n.startswith("spectrum_tower.")]
    assert frozen and all(torch.equal(made[name], source[name]) for name in frozen)


def test_alignment_without_encoders_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match="found no image_init"):
        pair_stage(PairSettings(data=str(shards), out=str(tmp_path)))
    with pytest.raises(InputError, match="no model directory at .*absent"):
        pair_stage(PairSettings(data=str(shards), out=str(tmp_path), image_init="absent", spectrum_init="absent"))


def test_locked_views_want_the_survey_in_memory(shards, tmp_path):
    locked = {"model_init": "some/model", "locked_views": 2}
    settings = AlignSettings(preset="tiny", data=str(shards), out=str(tmp_path), **locked)
    streamed = dataclasses.replace(settings, stream=StreamSettings(enabled=True))
    with pytest.raises(InputError, match="locked_views with a streamed survey"):
        staged(Alignment, streamed)


def test_switches_are_those_of_the_towers():
    made = build_model(PairSettings(tiny=True, switches=("image.positions=true", "spectrum.last_slice=true")))
    assert made.config.image_tower.positions and made.config.spectrum_tower.last_slice
    assert not build_model(PairSettings(tiny=True)).config.image_tower.positions
    for wrong in ("image.position=true", "image.positions=maybe", "image.colours=raw"):
        with pytest.raises(InputError, match="found switch"):
            build_model(PairSettings(tiny=True, switches=(wrong,)))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("preset = 'astroclip-v2'\nlearning_rat = 1\n", "learning_rat.*known are.*learning_rate"),
        ("preset = 'astroclip-v2'\nscale = 'free'\n", "wanted learned or fixed"),
        ("preset = 'astroclip-v2'\nfloor = 1.5\n", "wanted 0 to 1"),
        ("preset = 'astroclip-v2'\n[stream]\nworker = 1\n", "worker.*known are.*workers"),
        ("preset = 'astroclip-v2'\n[stream]\nworkers = -1\n", "workers = -1"),
        ("preset = \n", "Invalid"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, text, named):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=named):
        read_recipe("align", path)


def test_a_recipe_without_that_stage_says_so(tmp_path):
    path = tmp_path / "image.toml"
    path.write_text("preset = 'astroclip-v2'\n")
    with pytest.raises(InputError, match="has no image stage"):
        read_recipe("image", path)


def test_the_description_gives_the_published_sizes(astroclip_file):
    folder = CONFIGS[0].parent
    settings, _ = read_recipe("align", folder / "v2-align.toml", data=str(astroclip_file))
    report = describe(settings)
    assert report["parameters"] == 370_798_358 - 1024 + 1  # published, less DINOv2's mask token, and the logit scale
    assert report["trainable"] == 24_666_112
    assert report["training_objects"] == 32 and report["steps_per_epoch"] == 0
    masked, _ = read_recipe("spectrum", folder / "v2-spectrum.toml", data="absent")
    report = describe(masked)
    assert report["trainable"] == 43_177_750 and report["steps"] == 30_000
    # 6 N T for weights, and attention: within a tenth of the textbook's count (Kaplan+2020).
    textbook = 6 * 43.2e6 * 778 + 12 * 6 * 778**2 * 768
    assert 0.9 < report["flops_per_object"] / textbook < 1.1
    assert report["a100_hours_estimated"] > 1


def test_the_command_line_describes_and_rehearses(shards, tmp_path):
    config = next(path for path in CONFIGS if path.stem == "v2-align")
    words = ["train", "align", "--config", str(config), "--data", str(shards), "--out", str(tmp_path / "run")]
    told = CliRunner().invoke(build_app(), [*words, "--describe"])
    assert told.exit_code == 0 and json.loads(told.stdout)["training_objects"] == 16
    refused = CliRunner().invoke(build_app(), [*words, "--tiny"])
    assert isinstance(refused.exception, InputError) and "--dry-run" in str(refused.exception)
    assert not (tmp_path / "run").exists()
