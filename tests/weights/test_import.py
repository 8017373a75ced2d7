"""Importing: other sizes, what is refused and how, switches, the directory that is left."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from sky import make_image, make_spectrum
from typer.testing import CliRunner

from astroclip.cli import build_app
from astroclip.embed import Embedder
from astroclip.errors import InputError
from astroclip.models import PRESETS, AstroCLIPConfig, AstroCLIPModel
from astroclip.weights import KINDS, Heads, import_weights
from tests.weights.published import HEAD, TOWERS, VIT, checkpoint, model_of, state_of, write

KIND_NAMES = list(KINDS)
# Upstream's own counts, less what the model has no use for (mask token), plus the logit scale.
PUBLISHED_SIZES = {
    "astroclip-v2": 370_798_358 - 1024 + 1,
    "astroclip-v1": 71_506_391,
    "specformer": 43_177_750 + 1,
    "astrodino": 302_954_496 - 1024 + 1,
    "stein-moco": 27_966_656 + 1,
}


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_presets_have_the_published_sizes(kind):
    with torch.device("meta"):
        model = AstroCLIPModel(AstroCLIPConfig.preset(kind))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_SIZES[kind]
    assert kind in PRESETS and model.config.model_name == kind


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_other_widths_and_depths_load_and_one_equals_many(kind, tmp_path, rng):
    model = model_of(kind)
    heads = Heads(image=4, spectrum=4)
    made = import_weights(checkpoint(tmp_path, kind), tmp_path / "model", heads=heads)
    assert made.kind == kind
    embedder = Embedder.from_pretrained(made.path, device="cpu")
    assert embedder.dim == TOWERS[kind][2] and embedder.modalities == model.modalities
    items = {"image": [make_image(rng, flux=f) for f in (3, 30, 90)], "spectrum": [make_spectrum(rng) for _ in "abc"]}
    for modality in embedder.modalities:
        many = embedder.embed(items[modality])
        assert np.abs(many[0] - many[1]).max() > 1e-4
        np.testing.assert_allclose(np.concatenate([embedder.embed([one]) for one in items[modality]]), many, atol=1e-5)
        batch = embedder.processor(**{"images" if modality == "image" else "spectra": items[modality]})
        with torch.inference_mode():
            features = model.get_image_features if modality == "image" else model.get_spectrum_features
            np.testing.assert_allclose(features(*batch.values()).numpy(), many, atol=1e-6)
    for modality in {"image", "spectrum"} - set(embedder.modalities):
        with pytest.raises(InputError, match=f"embeds .* only; found: {modality}") as caught:
            embedder.embed(items[modality])
        assert caught.value.code == "no_tower"


def test_numbers_of_heads_come_from_the_file_where_it_says_them(tmp_path):
    """From plain hyper-parameters; with Lightning's own additions to them; else assumed, and said so."""
    settings = {"num_heads": 3, "slice_overlap": 10, "_class_path": "a.B", "_instantiator": "lightning"}
    file = checkpoint(tmp_path, "specformer", hyper_parameters=settings)
    made = import_weights(file, tmp_path / "a")
    assert AstroCLIPConfig.from_pretrained(made.path).spectrum_tower.n_heads == 3
    assert any("3 heads, from the hyper-parameters" in note for note in made.notes)
    made = import_weights(checkpoint(tmp_path, "specformer"), tmp_path / "b")
    assert any("ASSUMED" in note for note in made.notes)
    with pytest.raises(InputError, match="--spectrum-heads"):
        import_weights(file, tmp_path / "c", heads=Heads(spectrum=7))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_missing_keys_are_named(kind, tmp_path):
    """Anywhere: of the middle of a tower, of a head, and those that widths are read from."""
    whole = state_of(kind, model_of(kind))
    used = [name for name in whole if not name.startswith(("queue", "encoder_k")) and "mask_token" not in name]
    for gone in (used[0], used[len(used) // 2], used[-1], *used[3:5]):
        file = write(tmp_path / "cut.ckpt", kind, {k: v for k, v in whole.items() if k != gone})
        with pytest.raises(InputError) as caught:
            import_weights(file, tmp_path / "model", heads=Heads(image=4, spectrum=4))
        assert caught.value.code == "missing_keys" and gone in caught.value.message
    some = used[2::5]
    file = write(tmp_path / "cut.ckpt", kind, {k: v for k, v in whole.items() if k not in some})
    with pytest.raises(InputError, match=f"lacks {len(some)} "):
        import_weights(file, tmp_path / "model", heads=Heads(image=4, spectrum=4))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_wrong_kind_is_refused(kind, tmp_path):
    wanted = KIND_NAMES[KIND_NAMES.index(kind) - 1]
    with pytest.raises(InputError, match=f"found a checkpoint of kind {kind}; wanted {wanted}") as caught:
        import_weights(checkpoint(tmp_path, kind), tmp_path / "model", kind=wanted)
    assert caught.value.code == "wrong_kind"


def test_files_of_no_kind_are_refused(tmp_path):
    with pytest.raises(InputError, match="found tensors called some.weight") as caught:
        import_weights(write(tmp_path / "a.ckpt", "", {"some.weight": torch.zeros(2)}), tmp_path / "model")
    assert caught.value.code == "wrong_kind"
    with pytest.raises(InputError, match="kind 'resnet' is unknown"):
        import_weights(tmp_path / "a.ckpt", tmp_path / "model", kind="resnet")
    torch.save({"epoch": 3}, tmp_path / "b.ckpt")
    with pytest.raises(InputError, match="holds no weights: found epoch"):
        import_weights(tmp_path / "b.ckpt", tmp_path / "model")


def test_unknown_keys_and_odd_shapes_are_refused(tmp_path):
    """A register token, say, would change the numbers; a tensor of another width makes no model."""
    state = state_of("astrodino", model_of("astrodino"))
    file = write(tmp_path / "a.ckpt", "astrodino", state | {"backbone.register_tokens": torch.zeros(1, 4, 32)})
    with pytest.raises(InputError, match=r"no place for: backbone\.register_tokens"):
        import_weights(file, tmp_path / "model")
    file = write(tmp_path / "b.ckpt", "astrodino", state | {"backbone.cls_token": torch.zeros(1, 1, 31)})
    with pytest.raises(InputError, match=r"backbone\.cls_token \(1, 1, 31\), wanted \(1, 1, 32\)"):
        import_weights(file, tmp_path / "model")
    state = state_of("astroclip-v2", model_of("astroclip-v2"))
    short = {name: tensor[:16] if name.endswith("cross_attention.query") else tensor for name, tensor in state.items()}
    short["image_encoder.cross_attention.query"] = torch.zeros(1, 1, 16)
    with pytest.raises(InputError, match="gives 16 numbers"):
        import_weights(write(tmp_path / "c.ckpt", "astroclip-v2", short), tmp_path / "model")


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_directory_says_where_it_came_from(tmp_path):
    file = checkpoint(tmp_path, "astroclip-v1")
    made = import_weights(file, tmp_path / "models" / "v1")
    assert {p.name for p in made.path.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    card = (made.path / "README.md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    assert "astroclip-v1" in card and "96 x 96 pixels" in card and "3600 to 9824" in card
    preprocessing = json.loads((made.path / "preprocessor_config.json").read_text())
    assert preprocessing["image_grid"]["size"] == 96 and preprocessing["preprocess_version"] == "1"
    assert preprocessing["spectrum_grid"] == {
        "n_pixels": 7781,
        "spacing": "linear",
        "wave_max": 9824.0,
        "wave_min": 3600.0,
    }
    with pytest.raises(InputError, match="exists and is not empty"):
        import_weights(file, made.path)
    assert [p.name for p in made.path.parent.iterdir()] == ["v1"]  # nothing left aside


def test_a_death_while_writing_leaves_nothing(tmp_path, monkeypatch):
    from astroclip import weights

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.AstroCLIPProcessor, "save_pretrained", dies)
    with pytest.raises(KeyboardInterrupt):
        import_weights(checkpoint(tmp_path, "specformer"), tmp_path / "models" / "m")
    assert not list((tmp_path / "models").iterdir())


def test_the_command_imports_one_file_or_several(tmp_path):
    run = CliRunner()
    files = [str(checkpoint(tmp_path, kind)) for kind in ("specformer", "stein-moco")]
    done = run.invoke(build_app(), ["weights", "import", files[0], "--out", str(tmp_path / "one"), "--set", "a"])
    assert isinstance(done.exception, InputError) and "NAME=VALUE" in str(done.exception)
    options = ["--spectrum-heads", "2", "--set", "spectrum.last_slice=true"]
    done = run.invoke(build_app(), ["weights", "import", files[0], "--out", str(tmp_path / "one"), *options])
    assert done.exit_code == 0 and "specformer.ckpt: specformer ->" in done.output
    tower = AstroCLIPConfig.from_pretrained(tmp_path / "one").spectrum_tower
    assert tower.n_heads == 2 and tower.last_slice is True
    done = run.invoke(build_app(), ["weights", "import", *files, "--out", str(tmp_path / "both")])
    assert done.exit_code == 0
    assert {p.name for p in (tmp_path / "both").iterdir()} == {"specformer", "stein-moco"}


# --- switches ---------------------------------------------------------------------------------------------------------


def test_switches_are_checked(tmp_path):
    file = checkpoint(tmp_path, "stein-moco")
    for settings, message in (
        ({"image.depth": 3}, "wanted one of image.image_size"),
        ({"image.image_size": "wide"}, "wanted something like 96"),
        ({"image.colours": "sepia"}, "wanted one of raw, astroclip, stein"),
        ({"image.output": "both"}, "representation, projection"),
    ):
        with pytest.raises(InputError, match=message):
            import_weights(file, tmp_path / "model", settings=settings)
    with pytest.raises(InputError, match="wanted true or false"):
        import_weights(checkpoint(tmp_path, "specformer"), tmp_path / "m", settings={"spectrum.last_slice": "maybe"})


def test_the_released_image_head_does_not_know_places_and_the_corrected_does():
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 60, 60) * 0.3
    patches = pixels.unfold(2, 10, 10).unfold(3, 10, 10).reshape(1, 3, 36, 10, 10)[:, :, torch.randperm(36)]
    shuffled = patches.reshape(1, 3, 6, 6, 10, 10).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 60, 60)
    moved = {}
    for positions in (False, True):
        torch.manual_seed(1)
        config = AstroCLIPConfig(
            image=VIT | HEAD | {"positions": positions}, spectrum={"kind": "none"}, projection_dim=20
        )
        model = AstroCLIPModel(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("ls1.gamma", "ls2.gamma")):
                parameter.data.fill_(1.0)  # at 1e-5, as initialised, blocks do nothing
        with torch.inference_mode():
            moved[positions] = float((model.image_tower(pixels) - model.image_tower(shuffled)).abs().max())
    assert moved[False] < 2e-6 < 1e-4 < moved[True]


def test_the_residual_adds_the_attention():
    models = {}
    for residual in (False, True):
        torch.manual_seed(1)
        config = AstroCLIPConfig(
            image=VIT | HEAD | {"residual": residual}, spectrum={"kind": "none"}, projection_dim=20
        )
        models[residual] = AstroCLIPModel(config).eval().image_tower
    pixels = torch.rand(2, 3, 60, 60) * 0.3
    with torch.inference_mode():
        head, tokens = models[True].head, models[True].tokens(pixels)
        query = head.query.expand(2, -1, -1)
        h = head.layernorm(head.attention(query, tokens, tokens)[0][:, 0])
        torch.testing.assert_close(models[True](pixels) - models[False](pixels), h)


@pytest.mark.parametrize(("n_pixels", "dropped", "kept"), [(7781, 778, 779), (7790, 778, 779)])
def test_the_last_slice_is_dropped_as_upstream_or_kept(n_pixels, dropped, kept):
    flux = torch.rand(1, n_pixels)
    for last_slice, count in ((False, dropped), (True, kept)):
        tower = {"kind": "specformer", "embed_dim": 8, "n_layers": 1, "n_heads": 2, "head_width": 0}
        config = AstroCLIPConfig(image={"kind": "none"}, spectrum=tower | {"last_slice": last_slice}, projection_dim=8)
        tokens = AstroCLIPModel(config).spectrum_tower.tokens(flux, torch.ones_like(flux))
        assert tokens.shape == (1, count, 22)
        if last_slice:
            last = 10 * (count - 2)
            scaled = (flux - flux.mean()) / flux.std()
            torch.testing.assert_close(tokens[0, -1, 2 : 2 + n_pixels - last], scaled[0, last:], atol=1e-5, rtol=1e-5)


def test_pixels_without_information_cannot_reach_a_specformer(rng):
    """And count in neither the mean nor the deviation; a gap is what pretraining puts over what it hides: zeros."""
    tower = {"kind": "specformer", "embed_dim": 8, "n_layers": 1, "n_heads": 2, "head_width": 0}
    config = AstroCLIPConfig(image={"kind": "none"}, spectrum=tower, projection_dim=8)
    tower = AstroCLIPModel(config).eval().spectrum_tower
    flux = torch.from_numpy(rng.normal(3, 1, (2, 7781)).astype(np.float32))
    ivar = torch.ones_like(flux)
    ivar[:, 2000:3000] = 0
    spoilt = flux.clone()
    spoilt[0, 2000:3000], spoilt[1, 2000:3000] = 1e4, float("nan")
    tokens = tower.tokens(spoilt, ivar)
    torch.testing.assert_close(tokens, tower.tokens(flux, ivar))
    known = torch.cat([flux[:, :2000], flux[:, 3000:]], dim=1)
    torch.testing.assert_close(tokens[:, 0, 0], (known.mean(1) - 2) / 2)
    torch.testing.assert_close(tokens[:, 0, 1], (known.std(1) - 2) / 8)
    assert (tokens[:, 202:299] == 0).all()
