"""The three training stages on a tiny synthetic survey: data in, curves and weights out, resume, determinism."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sky import make_image, make_spectrum

from astroclip.embed import Embedder
from astroclip.models import PRESETS, AstroCLIPModel
from astroclip.preprocess import image_to_grid, spectrum_to_grid
from training.align import Alignment, train_align
from training.augment import ImageAugmentation, SpectrumAugmentation, draw_shifts, move_in_redshift
from training.data import find_shards, load_survey
from training.image import train_image
from training.run import RowBatches, run_stage, warmup_cosine
from training.settings import AlignSettings, ImageSettings, SpectrumSettings, read_settings
from training.spectrum import draw_mask, train_spectrum

N_SHARD = 16


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Four shards of 16 galaxies whose colours and line positions go with redshift."""
    root = tmp_path_factory.mktemp("survey")
    rng = np.random.default_rng(3)
    for shard in range(4):
        z = rng.uniform(0.05, 0.5, N_SHARD)
        images = [make_image(rng, flux=20 / (1 + 5 * value)).pixels for value in z]
        spectra = [make_spectrum(rng, value) for value in z]
        folder = root / f"healpix={shard:04d}"
        folder.mkdir()
        with h5py.File(folder / "001-of-001.hdf5", "w") as file:
            file["object_id"] = np.array([f"sim-{shard}-{i}".encode() for i in range(N_SHARD)])
            file["image_array"] = np.stack(images)
            file["image_band"] = np.array([[b"DES-G", b"DES-R", b"DES-Z"]] * N_SHARD)
            file["spectrum_lambda"] = np.stack([s.wave for s in spectra]).astype("f4")
            file["spectrum_flux"] = np.stack([s.flux for s in spectra])
            file["spectrum_flux_true"] = np.stack([s.flux for s in spectra])
            file["spectrum_ivar"] = np.stack([s.ivar for s in spectra])
            file["spectrum_mask"] = np.zeros((N_SHARD, 7781), bool)
            file["redshift"] = z.astype("f4")
    return root


def _common(survey: Path, out: Path, half: bool = False) -> dict:
    return {
        "preset": "tiny",
        "data": str(survey),
        "out": str(out),
        "batch_size": 8,
        "epochs": 2,
        "warmup_steps": 2,
        "precision": "bf16-mixed" if half else "32-true",
        "checkpoint_steps": 1,
        "devices": 1,
    }


def _losses(out: Path) -> list[float]:
    with (out / "curves" / "metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


def test_training_arrays_equal_what_serving_sees(survey):
    arrays = load_survey(find_shards(survey)[:1])
    again = load_survey(find_shards(survey)[:1])  # through the cache
    assert torch.equal(arrays.images, again.images) and len(arrays) == N_SHARD
    with h5py.File(find_shards(survey)[0]) as file:
        pixels, flux = file["image_array"][3], file["spectrum_flux"][3]
    rng = np.random.default_rng(0)
    image = dataclasses.replace(make_image(rng), pixels=pixels)
    spectrum = dataclasses.replace(make_spectrum(rng), flux=flux)
    rows = torch.tensor([3])
    torch.testing.assert_close(
        arrays.image_batch(rows)[0], torch.from_numpy(image_to_grid(image).pixels), rtol=1e-3, atol=1e-4
    )
    placed = spectrum_to_grid(spectrum)
    batch_flux, batch_ivar = arrays.spectrum_batch(rows)
    torch.testing.assert_close(batch_flux[0], torch.from_numpy(placed.flux), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(batch_ivar[0], torch.from_numpy(placed.ivar), rtol=3e-3, atol=1e-3)


def test_the_three_stages_make_a_model_that_serves(survey, tmp_path, rng):
    spectrum = train_spectrum(SpectrumSettings(**_common(survey, tmp_path / "s")), progress=False)
    image = train_image(ImageSettings(**_common(survey, tmp_path / "i", half=True), queue=16), progress=False)
    settings = AlignSettings(
        **_common(survey, tmp_path / "a", half=True), image_init=str(image), spectrum_init=str(spectrum)
    )
    model_dir = train_align(settings, progress=False)
    embedder = Embedder.from_pretrained(model_dir)
    assert embedder.embed([make_spectrum(rng)]).shape == (1, 16)
    assert (tmp_path / "a" / "settings.json").exists()
    assert (tmp_path / "a" / "curves" / "metrics.csv").read_text().count("\n") > 1


def test_masked_modelling_learns(survey, tmp_path):
    settings = SpectrumSettings(**{**_common(survey, tmp_path), "epochs": 12, "learning_rate": 5e-3})
    from training.run import load_split
    from training.spectrum import MaskedSpectrum

    module = MaskedSpectrum(settings, *load_split(settings))
    flux, ivar = module.validation.spectrum_batch(slice(None))

    def loss() -> float:
        with torch.no_grad():
            return float(module.loss(flux, ivar, torch.Generator().manual_seed(0)))

    before, template = loss(), module.tower.match.template.detach().clone()
    run_stage(module, progress=False)
    assert loss() < 0.7 * before
    torch.testing.assert_close(module.tower.match.template.detach(), template)  # zero redshift stays where it was


def test_resume_repeats_the_uninterrupted_run(survey, tmp_path):
    from training.run import load_split

    def run(out: Path, **change: object) -> dict[str, torch.Tensor]:
        settings = dataclasses.replace(AlignSettings(**_common(survey, out)), **change)
        module = Alignment(settings, *load_split(settings))
        if change:
            module.configure_optimizers = lambda: _full_schedule(module, 2)  # type: ignore[method-assign]
        run_stage(module, progress=False)
        return module.model.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", epochs=1)
    resumed = run(tmp_path / "parts")
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, msg=key)


def _full_schedule(module: Alignment, epochs: int):
    """The interrupted run is scheduled for the whole length, as a killed one is."""
    parts = type(module).configure_optimizers(module)
    steps = epochs * len(RowBatches(len(module.survey), module.settings.batch_size, 0))
    warmup = module.settings.warmup_steps
    parts["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(
        parts["optimizer"], lambda step: warmup_cosine(step, warmup, steps)
    )
    return parts


def test_row_batches_partition_the_epoch_between_processes():
    seen = [torch.cat(list(RowBatches(100, 10, 1, rank, 2))) for rank in range(2)]
    joined = torch.cat(seen)
    assert len(joined) == 100 and len(joined.unique()) == 100


def test_an_aligned_model_goes_on_from_another(survey, tmp_path):
    first = train_align(AlignSettings(**_common(survey, tmp_path / "a")), progress=False)
    settings = AlignSettings(**_common(survey, tmp_path / "b"), model_init=str(first))
    from training.run import load_split

    module = Alignment(settings, *load_split(settings))
    started = AstroCLIPModel.from_pretrained(first).state_dict()
    for key, value in module.model.state_dict().items():
        torch.testing.assert_close(value.float(), started[key].float(), msg=key)


def test_a_locked_spectrum_tower_moves_its_head_alone(survey, tmp_path):
    first = train_align(AlignSettings(**_common(survey, tmp_path / "a")), progress=False)
    settings = AlignSettings(**_common(survey, tmp_path / "b"), model_init=str(first), locked_views=3)
    started = AstroCLIPModel.from_pretrained(first).state_dict()
    ended = AstroCLIPModel.from_pretrained(train_align(settings, progress=False)).state_dict()
    for key, value in ended.items():
        locked = key.startswith("spectrum_tower.") and not key.startswith("spectrum_tower.head.")
        if locked:
            assert torch.equal(value, started[key]), key
    moved = {key for key, value in ended.items() if not torch.equal(value, started[key])}
    assert {"image_tower.backbone.conv1.weight", "spectrum_tower.head.query", "logit_scale"} <= moved
    with pytest.raises(ValueError, match="model_init"):
        train_align(AlignSettings(**_common(survey, tmp_path / "c"), locked_views=1), progress=False)


def test_with_both_towers_locked_the_heads_alone_move(survey, tmp_path):
    first = train_align(AlignSettings(**_common(survey, tmp_path / "a")), progress=False)
    common = _common(survey, tmp_path / "b") | {"model_init": str(first), "locked_backbone": True}
    started = AstroCLIPModel.from_pretrained(first).state_dict()
    ended = AstroCLIPModel.from_pretrained(
        train_align(AlignSettings(**common, locked_views=3), progress=False)
    ).state_dict()
    moved = {key for key, value in ended.items() if not torch.equal(value, started[key])}
    heads = ("image_tower.photometry_embed.", "image_tower.head.", "image_tower.window_", "spectrum_tower.head.")
    assert {key for key in moved if not key.startswith(heads)} == {"logit_scale"}
    assert {"image_tower.head.0.weight", "image_tower.window_head.0.weight", "spectrum_tower.head.query"} <= moved
    with pytest.raises(ValueError, match="locked_views"):
        AlignSettings(**common)


def test_what_began_is_averaged_into_what_is_written(survey, tmp_path):
    first = train_align(AlignSettings(**_common(survey, tmp_path / "a")), progress=False)
    common = _common(survey, tmp_path / "b") | {"model_init": str(first)}
    ended = AstroCLIPModel.from_pretrained(
        train_align(AlignSettings(**common, keep_start=0.75), progress=False)
    ).state_dict()
    trained = torch.load(tmp_path / "b" / "last.ckpt", weights_only=False)["state_dict"]
    for name, start in AstroCLIPModel.from_pretrained(first).state_dict().items():
        if name in ("image_tower.head.0.weight", "image_tower.backbone.conv1.weight", "spectrum_tower.head.query"):
            expected = 0.75 * start + 0.25 * trained[f"model.{name}"]
            assert not torch.equal(start, ended[name])
            torch.testing.assert_close(ended[name], expected, atol=1e-4, rtol=1e-3)  # written in half precision
    with pytest.raises(ValueError, match="model_init"):
        AlignSettings(**_common(survey, tmp_path / "c"), keep_start=0.5)
    with pytest.raises(ValueError, match="below 1"):
        AlignSettings(**common, keep_start=1.0)


def test_a_locked_backbone_reads_what_the_whole_tower_would(survey, tmp_path):
    from training.locked import LockedAlignment
    from training.run import load_split

    first = train_align(AlignSettings(**_common(survey, tmp_path / "a")), progress=False)
    plain = ImageAugmentation(rotate=0, jitter_pixels=0, max_blur_pixels=0, max_noise=0, extinction_sigma=0)
    settings = AlignSettings(
        **_common(survey, tmp_path / "b"),
        model_init=str(first),
        locked_views=1,
        locked_backbone=True,
        image_augmentation=plain,
    )
    module = LockedAlignment(settings, *load_split(settings)).eval()
    module.on_fit_start()
    rows = torch.tensor([5, 0, 11])
    views = plain(module.survey.images, torch.Generator().manual_seed(settings.seed * 1_000_003))
    expected = module.model.get_image_features(views[rows])
    embedded = module._images(rows, torch.Generator())
    assert F.cosine_similarity(embedded, expected).min() > 0.999  # features in half precision


def test_a_model_written_without_the_added_layers_goes_on_with_silent_ones(survey, tmp_path, monkeypatch):
    first = train_align(AlignSettings(**_common(survey, tmp_path / "a")), progress=False)
    weights = load_file(first / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if ".window_" not in k and ".bands." not in k}, first / "model.safetensors"
    )
    config = json.loads((first / "config.json").read_text())
    del config["image"]["windows"], config["spectrum"]["n_bands"]
    (first / "config.json").write_text(json.dumps(config))
    settings = AlignSettings(**_common(survey, tmp_path / "b"), model_init=str(first))
    from training.run import load_split

    model = Alignment(settings, *load_split(settings)).model.eval()
    old = AstroCLIPModel.from_pretrained(first).eval()
    pixels = torch.rand(3, 3, 96, 96)
    torch.testing.assert_close(model.get_image_features(pixels), old.get_image_features(pixels), atol=2e-3, rtol=0)
    monkeypatch.setitem(PRESETS["tiny"]["spectrum"], "n_bands", 0)
    config["spectrum"]["n_bands"] = 4
    (first / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not fit the preset.*bands"):
        Alignment(settings, *load_split(settings))


def test_a_locked_tower_reads_what_the_whole_one_would(survey, tmp_path):
    from training.locked import LockedAlignment
    from training.run import load_split

    first = train_align(AlignSettings(**_common(survey, tmp_path / "a")), progress=False)
    plain = SpectrumAugmentation(max_noise=1.0, throughput_sigma=0, tilt=0, smooth=0, ragged=0, cut=0, gap=0)
    settings = AlignSettings(
        **_common(survey, tmp_path / "b"), model_init=str(first), locked_views=1, spectrum_augmentation=plain
    )
    module = LockedAlignment(settings, *load_split(settings))
    truth = module.survey.flux_true
    assert truth is not None
    module._surveys = (dataclasses.replace(module.survey, flux_true=None), module.validation)  # hence no new noise
    module.on_fit_start()
    rows = torch.tensor([5, 0, 11])
    embedded, again, moved = module._spectra(rows, torch.Generator())
    expected = module.model.get_spectrum_features(*module.survey.spectrum_batch(rows))
    assert again is None and moved is None
    assert F.cosine_similarity(embedded, expected).min() > 0.999  # tokens in half precision


def test_mask_fraction_is_what_was_asked():
    hidden = draw_mask(512, 64, 0.4, 4, torch.Generator().manual_seed(0))
    assert abs(hidden.float().mean() - 0.4) < 0.05
    assert hidden.any(1).all()


def test_spectrum_views_carry_their_own_noise():
    true = torch.full((256, 512), 3.0)
    sigma = torch.full((256, 512), 0.5)
    augment = SpectrumAugmentation(throughput_sigma=0, tilt=0, smooth=0, ragged=0, cut=0, gap=0)
    view, ivar = augment(true, sigma, true, torch.Generator().manual_seed(1))
    chi = (view - 3) * ivar.sqrt()
    assert abs(chi.std() - 1) < 0.02 and (ivar.sqrt().reciprocal() >= 0.5 - 1e-6).all()
    cut, ivar = SpectrumAugmentation(cut=1.0, gap=0)(true, sigma, true, torch.Generator().manual_seed(1))
    assert (ivar == 0).any(1).all() and (cut[ivar == 0] == 0).all()


def test_moved_galaxies_keep_their_instrument():
    flux_true = torch.arange(1.0, 101.0).repeat(2, 1)
    sigma = torch.linspace(1, 2, 100).repeat(2, 1)
    noise = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3, -5])
    _, moved_sigma, moved = move_in_redshift(flux_true + noise, sigma, flux_true, shift)
    assert torch.equal(moved[0, 3:], flux_true[0, :97]) and torch.equal(moved[1, :95], flux_true[1, 5:])
    assert (moved_sigma[0, :3] == 0).all() and torch.equal(moved_sigma[0, 3:], sigma[0, 3:])
    flux, with_flux, none = move_in_redshift(flux_true + noise, sigma, None, shift)
    assert none is None and torch.equal(flux[0, 3:], (flux_true + noise)[0, :97])
    assert torch.equal(with_flux[1, :95], sigma[1, 5:]) and (with_flux[1, 95:] == 0).all()
    shifts = draw_shifts(1000, 3, 128, torch.Generator().manual_seed(0))
    assert shifts.abs().min() >= 3 and shifts.abs().max() <= 128 and 400 < int((shifts > 0).sum()) < 600


def test_smoothed_views_leave_masked_pixels_out():
    flux = torch.ones(8, 500)
    flux[:, 200:210] = 1e4
    sigma = torch.full((8, 500), 1e-3)
    sigma[:, 200:210] = 0
    augmentation = SpectrumAugmentation(smooth=1, cut=0, gap=0, tilt=0, throughput_sigma=0, ragged=0)
    view, ivar = augmentation(flux, sigma, flux, torch.Generator().manual_seed(0))
    assert (ivar[:, 200:210] == 0).all() and (ivar[:, :200] > 0).all()
    assert (view[:, :200] - 1).abs().max() < 0.01
    rough = SpectrumAugmentation(smooth=0, cut=0, gap=0, tilt=0, throughput_sigma=0, ragged=0)
    plain, _ = rough(flux, sigma, flux, torch.Generator().manual_seed(0))
    assert view[:, :200].std() < 0.7 * plain[:, :200].std()


def test_image_views_keep_flux_and_change_orientation(rng):
    images = torch.from_numpy(np.stack([make_image(rng, noise=1e-3).pixels[:, 8:144, 8:144]] * 8))
    quiet = ImageAugmentation(max_noise=0, extinction_sigma=0, max_blur_pixels=0, zoom=0)
    for seed in range(4):
        views = quiet(images, torch.Generator().manual_seed(seed))
        assert views.shape == (8, 3, 96, 96)
        torch.testing.assert_close(views[:, 1].sum((1, 2)), torch.full((8,), 30.0), rtol=0.05, atol=0)


def test_unknown_settings_are_refused(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("learning_rat = 1\n")
    with pytest.raises(ValueError, match="learning_rat"):
        read_settings(AlignSettings, path)


def test_shipped_configs_are_valid():
    folder = Path(__file__).resolve().parents[2] / "training" / "configs"
    stages = {"spectrum": SpectrumSettings, "image": ImageSettings}
    stages |= dict.fromkeys(("align", "refine", "finish"), AlignSettings)
    for name, cls in stages.items():
        assert read_settings(cls, folder / f"demo-{name}.toml").preset == "demo"
