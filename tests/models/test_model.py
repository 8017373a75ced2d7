"""The joint model: shapes, invariances, saving, and what missing data may and may not do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sky import make_image, make_spectrum
from transformers import AutoModel

from astroclip.embed import Embedder
from astroclip.errors import ProvenanceError
from astroclip.losses import info_nce
from astroclip.models import AstroCLIPConfig, AstroCLIPModel, SpectrumTower
from astroclip.models.image_tower import AperturePhotometry, WindowPhotometry
from astroclip.models.spectrum_tower import TemplateMatch, broadband, normalise


def test_vectors_are_unit_and_do_not_depend_on_the_batch(tiny_embedder, rng):
    images = [make_image(rng, flux=f) for f in (3.0, 30.0, 300.0)]
    spectra = [make_spectrum(rng, z) for z in (0.05, 0.2, 0.4)]
    for items in (images, spectra):
        together = tiny_embedder.embed(items * 22)  # 66 objects: more than one batch of 64
        alone = np.concatenate([tiny_embedder.embed([item]) for item in items])
        assert together.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(together[:3], alone, atol=1e-5)
        np.testing.assert_allclose(together[63:66], alone, atol=1e-5)
        assert np.abs(alone[0] - alone[1]).max() > 1e-4  # and different objects differ


def test_demo_weights_fit_their_budget():
    model = AstroCLIPModel(AstroCLIPConfig.preset("demo"))
    assert 2 * sum(p.numel() for p in model.state_dict().values()) < 32e6  # float16 bytes


def test_auto_model_round_trip(tiny_model_dir, tiny_embedder, rng):
    model = AutoModel.from_pretrained(tiny_model_dir).eval()
    assert isinstance(model, AstroCLIPModel)
    batch = tiny_embedder.processor(images=[make_image(rng)])
    with torch.inference_mode():
        again = model.get_image_features(batch["pixel_values"])
        first = tiny_embedder.model.get_image_features(batch["pixel_values"])
    torch.testing.assert_close(again, first)


def test_flux_under_a_mask_cannot_reach_the_vector(tiny_embedder, rng):
    spectrum = make_spectrum(rng)
    ivar = spectrum.ivar.copy()
    ivar[5000:5400] = 0
    changed = spectrum.flux.copy()
    changed[5000:5400] = 1e4
    one = tiny_embedder.embed([replace(spectrum, ivar=ivar)])
    other = tiny_embedder.embed([replace(spectrum, ivar=ivar, flux=changed)])
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_missing_red_end_is_masked_not_zero(tiny_embedder, rng):
    """Cutting at 9200 A must move the vector less than writing zeros with full confidence there."""
    spectrum = make_spectrum(rng)
    red = spectrum.wave > 9200
    cut = replace(spectrum, ivar=np.where(red, 0, spectrum.ivar).astype(np.float32))
    zeros = replace(spectrum, flux=np.where(red, 0, spectrum.flux).astype(np.float32))
    full, masked, zeroed = tiny_embedder.embed([spectrum, cut, zeros])
    assert np.linalg.norm(full - masked) < np.linalg.norm(full - zeroed)


def test_normalisation_keeps_amplitude_apart_from_shape():
    flux = torch.rand(2, 4096) * 3 + 1
    ivar = torch.ones_like(flux)
    faint, bright = normalise(flux, ivar), normalise(10 * flux, ivar / 100)
    torch.testing.assert_close(faint.x, bright.x, atol=1e-4, rtol=1e-4)
    decades = bright.statistics[:, 1] - faint.statistics[:, 1]
    torch.testing.assert_close(decades, torch.ones(2), atol=1e-4, rtol=0)


def test_hidden_tokens_do_not_leak(rng):
    torch.manual_seed(0)
    tower = SpectrumTower(AstroCLIPConfig.preset("tiny").spectrum_tower, 16).eval()
    flux = torch.from_numpy(rng.normal(3, 1, (1, 4096)).astype(np.float32))
    hidden = torch.zeros(1, tower.n_tokens, dtype=torch.bool)
    hidden[0, 20:24] = True
    spectrum = normalise(flux, torch.ones_like(flux))
    first, *_ = tower.encode(spectrum, hidden)
    spectrum.x[0, 20 * tower.patch : 24 * tower.patch] = 9.0
    second, *_ = tower.encode(spectrum, hidden)
    torch.testing.assert_close(first, second)


def template_match(**changes) -> TemplateMatch:
    settings = {"in_width": 2, "width": 2, "length": 64, "wave_min": 5000, "step": 0.01, "redshift_max": 0.5}
    return TemplateMatch(**settings | {"n_harmonics": 4} | changes)


def test_template_match_finds_the_shift_and_returns_to_the_rest_frame():
    """Features that are the template itself, moved: the distribution peaks at the move, and undoes it."""
    torch.manual_seed(0)
    match = template_match()
    torch.nn.init.eye_(match.reduce.weight.data[:, :, 0])
    torch.nn.init.zeros_(match.reduce.bias)
    assert match.n_shifts == 41  # ln(1.5) / 0.01
    match.template.data.normal_(std=2.0)
    for shift in (0, 17, 40):
        start = match.n_shifts - shift
        seen = match.template.detach()[None, :, start : start + 64]
        with torch.no_grad():
            log_probability, rest = match(seen[:, 1:], seen[:, 0])
        assert log_probability.exp().sum() == pytest.approx(1, abs=1e-5)
        assert int(log_probability.argmax()) == shift
        torch.testing.assert_close(rest[:, :, start : start + 64], seen, atol=1e-3, rtol=0)


def test_an_untrained_match_knows_lines():
    """Where zero redshift is needs no training: the template starts from the wavelengths of known lines."""
    torch.manual_seed(0)
    tower = SpectrumTower(AstroCLIPConfig.preset("tiny").spectrum_tower, 16).eval()
    wave = np.geomspace(3600, 9824, 4096)
    for z in (0.1, 0.25, 0.8):
        lines = (3728.5, 4862.7, 4960.3, 5008.2, 6564.6)
        flux = 1 + 5 * sum(np.exp(-0.5 * ((wave / (line * (1 + z)) - 1) / 4e-4) ** 2) for line in lines)
        flux = torch.from_numpy((flux + np.random.default_rng(0).normal(0, 0.3, 4096)).astype(np.float32))[None]
        with torch.no_grad():
            *_, redshift = tower.encode(normalise(flux, torch.full_like(flux, 10.0)))
        found = np.expm1(float(redshift.argmax()) * tower.match.step)
        assert found == pytest.approx(z, abs=0.002 * (1 + z))


def test_characteristic_function_of_a_sharp_and_a_flat_redshift():
    match = template_match()
    sharp = torch.full((1, match.n_shifts), -1e9)
    sharp[0, 20] = 0.0
    cos, sin = match.characteristic(sharp).chunk(2, dim=1)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(1, 4))
    assert cos[0, 0] == pytest.approx(np.cos(2 * np.pi * 0.5 * 0.2), abs=1e-5)  # half a cycle a unit of ln(1 + z)
    flat = torch.full((1, match.n_shifts), -np.log(match.n_shifts))
    cos, sin = match.characteristic(flat).chunk(2, dim=1)
    assert float((cos**2 + sin**2)[0, -1]) < 0.01


def test_photometry_of_a_spectrum_measures_known_bands_alone():
    flux = torch.linspace(1, 4, 512).repeat(2, 1)
    flux[1] *= 3
    ivar = torch.ones(2, 512)
    seen = broadband(flux, ivar, 4)
    assert seen.shape == (2, 9)
    torch.testing.assert_close(seen[0, 1:5], seen[1, 1:5], rtol=0, atol=1e-3)  # colours do not know brightness
    torch.testing.assert_close(3 * (seen[1, 0] - seen[0, 0]), torch.tensor(3.0).log(), rtol=0, atol=1e-3)
    assert (seen[0, 1:5].diff() > 0).all() and (seen[:, 5:] == 1).all()
    ivar[:, :128] = 0
    flux[:, :128] = 1e6
    partly = broadband(flux, ivar, 4)
    assert (partly[:, 1] == 0).all() and (partly[:, 5] == 0).all()
    torch.testing.assert_close(partly[:, 2:5].diff(dim=1), seen[:, 2:5].diff(dim=1))
    assert broadband(flux, torch.zeros(2, 512), 4).isfinite().all()


def test_an_untrained_head_is_silent_on_bands_and_learns_them(rng):
    model = AstroCLIPModel(AstroCLIPConfig.preset("tiny"))
    tower = model.spectrum_tower
    flux, ivar = torch.randn(4, 4096) + 2, torch.ones(4, 4096)
    before = tower(flux, ivar)
    tower.head.bands, layers = None, tower.head.bands
    torch.testing.assert_close(tower(flux, ivar), before)
    tower.head.bands = layers
    tower(flux, ivar).square().sum().backward()
    assert layers[2].weight.grad.abs().max() > 0


def test_aperture_photometry_measures_magnitudes_and_colours():
    photometry = AperturePhotometry((0.005, 0.012, 0.025))
    pixels = torch.zeros(2, 3, 96, 96)
    pixels[0, :, 46:50, 46:50] = torch.tensor([10.0, 20.0, 40.0]).view(3, 1, 1) / 16
    pixels[1] = 3 * pixels[0]
    faint, bright = photometry(pixels)
    n = photometry.n_features // 3
    torch.testing.assert_close(faint[n:], torch.full((2 * n,), np.log(2.0)).float(), atol=2e-3, rtol=0)
    torch.testing.assert_close(bright[:n] - faint[:n], torch.full((n,), np.log(3.0) / 3).float(), atol=2e-3, rtol=0)
    torch.testing.assert_close(bright[n:], faint[n:], atol=2e-3, rtol=0)


def test_window_photometry_measures_light_size_and_ellipticity():
    photometry = WindowPhotometry((0.005, 0.012, 0.025), (2.0, 4.0))
    axis = torch.arange(96) - 47.5
    round_, long = (
        torch.exp(-0.5 * (axis[:, None] / y) ** 2 - 0.5 * (axis[None] / x) ** 2) for y, x in ((3, 3), (2, 6))
    )
    seen = photometry(100 * torch.stack([round_, 3 * round_, long])[:, None] * torch.tensor([1.0, 2, 2]).view(3, 1, 1))
    middle, blue, red, size, ellipticity = (part for part in seen.split([2, 2, 2, 3, 3], dim=1))
    ln2 = torch.full((2,), np.log(2.0))
    torch.testing.assert_close(blue[0], ln2.float(), atol=2e-3, rtol=0)
    torch.testing.assert_close(red[0], torch.zeros(2), atol=2e-3, rtol=0)
    torch.testing.assert_close(middle[1] - middle[0], torch.full((2,), np.log(3.0) / 3).float(), atol=2e-3, rtol=0)
    # Under a window of 6 pixels a Gaussian of 3 has the variance 1 / (1/9 + 1/36) = 7.2 on each axis.
    torch.testing.assert_close(size[0], torch.full((3,), 2 * 7.2 / 36), atol=2e-3, rtol=0)
    torch.testing.assert_close(ellipticity[0], torch.zeros(3), atol=1e-3, rtol=0)
    variances = 1 / (1 / 4 + 1 / 36), 1 / (1 / 36 + 1 / 36)
    expected = 3 * (variances[1] - variances[0]) / 36
    torch.testing.assert_close(ellipticity[2], torch.full((3,), expected), atol=2e-3, rtol=0)
    blank = photometry(torch.zeros(1, 3, 96, 96))
    assert blank.isfinite().all() and (blank[0, 6:] == 0).all()


def test_an_untrained_image_head_is_silent_on_windows_and_learns_them(rng):
    model = AstroCLIPModel(AstroCLIPConfig.preset("tiny")).eval()
    tower = model.image_tower
    pixels = torch.rand(4, 3, 96, 96)
    with_windows = tower(pixels)
    windows, tower.windows = tower.windows, None
    torch.testing.assert_close(tower(pixels), with_windows)
    tower.windows = windows
    tower(pixels).square().sum().backward()
    assert tower.window_head[-1].weight.grad.abs().max() > 0


def test_info_nce_matches_the_definition_and_gathers():
    torch.manual_seed(1)
    a, b = (torch.nn.functional.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    logits = 15.5 * a @ b.T
    expected = -(torch.diag(logits.log_softmax(1)).mean() + torch.diag(logits.log_softmax(0)).mean()) / 2
    torch.testing.assert_close(info_nce(a, b, 15.5), expected)
    halves = [info_nce(a[i : i + 3], b[i : i + 3], 15.5, all_a=a, all_b=b, first_row=i) for i in (0, 3)]
    torch.testing.assert_close(sum(halves) / 2, expected)


def test_logit_scale_is_learned_and_clamped():
    model = AstroCLIPModel(AstroCLIPConfig.preset("tiny"))
    out = model(torch.randn(3, 3, 96, 96), torch.randn(3, 4096), torch.ones(3, 4096), return_loss=True)
    out.loss.backward()
    assert model.logit_scale.grad is not None and model.logit_scale.grad.abs() > 0
    model.logit_scale.data.fill_(20.0)
    assert float(model.scale.detach()) == pytest.approx(100.0)


def test_preprocessing_for_other_towers_is_refused(tiny_model_dir, tmp_path):
    """A changed preprocessor_config.json would move every vector without a word."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings["image_grid"]["pixel_scale_arcsec"] *= 1.1
    path.write_text(json.dumps(settings))
    with pytest.raises(ProvenanceError, match="preprocessor_config.json"):
        Embedder.from_pretrained(folder)
