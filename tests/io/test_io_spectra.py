"""Spectrum readers: layouts, units, order, noise."""

from __future__ import annotations

import numpy as np
import pytest
import survey_files as files
from astropy import units as u
from astropy.io import fits

from astroclip.io import SpectrumOptions, read_spectra
from astroclip.io.spectrum import estimate_ivar
from astroclip.io.units import air_to_vacuum, flux_to_flam, refractive_index
from astroclip.types import Spectrum


def codes(spectrum: Spectrum) -> set[str]:
    return {flag.code for flag in spectrum.quality.flags}


def one(data: bytes, **kwargs) -> Spectrum:
    """The only spectrum of `data`, with what the type promises checked."""
    (spectrum,) = read_spectra(data, **kwargs)
    assert np.all(np.diff(spectrum.wave) > 0)
    assert spectrum.wave.dtype == np.float64
    assert spectrum.flux.dtype == spectrum.ivar.dtype == np.float32
    assert np.isfinite(spectrum.flux).all() and np.isfinite(spectrum.ivar).all()
    assert (spectrum.ivar[spectrum.mask] == 0).all() and (spectrum.ivar[~spectrum.mask] > 0).all()
    return spectrum


# --- DESI and SDSS --------------------------------------------------------------------------------------


def test_desi_arms_merge_on_one_grid_with_ivar_weights(rng):
    first, second = read_spectra(files.desi_coadd(rng, targets=2))
    np.testing.assert_allclose(first.wave, 3600 + 0.8 * np.arange(7781), atol=1e-6)
    assert first.object_id == "39627000000000000" and second.object_id == "39627000000000001"
    assert (second.ra, second.dec) == (151.0, 3.0)
    overlap = (first.wave > 5761) & (first.wave < 5799)
    np.testing.assert_allclose(first.ivar[overlap], 2.0, rtol=1e-6)  # two arms see these pixels
    assert np.isclose(np.std(first.flux[overlap]), 2**-0.5, rtol=0.3)
    # Pixel 100 of every arm is masked; that of Z, 7600 A, is seen by R as well.
    np.testing.assert_allclose(first.wave[first.mask], [3680.0, 5840.0])
    assert codes(first) == set()


def test_desi_target_by_id_and_by_index(rng):
    data = files.desi_coadd(rng, targets=3)
    by_id = one(data, options=SpectrumOptions(target="39627000000000002"))
    by_index = one(data, options=SpectrumOptions(target=2))
    assert by_id.object_id == by_index.object_id == "39627000000000002"
    np.testing.assert_array_equal(by_id.flux, by_index.flux)


def test_dead_fibres_are_left_out_with_a_flag_or_kept_when_asked(rng):
    data = files.desi_coadd(rng, targets=3, dead=(1,))
    kept = read_spectra(data)
    assert [s.object_id[-1] for s in kept] == ["0", "2"]
    assert all("targets_left_out" in codes(s) for s in kept)
    everything = read_spectra(data, options=SpectrumOptions(keep_empty=True))
    assert len(everything) == 3 and everything[1].mask.all() and "zero_ivar" in codes(everything[1])


@pytest.mark.parametrize("full", [False, True])
def test_sdss_lite_and_full(rng, full):
    spectrum = one(files.sdss_spec(rng, full=full))
    assert spectrum.object_id == "266-51602-1"
    assert (spectrum.ra, spectrum.dec) == (146.714, -1.041)
    assert np.isclose(spectrum.redshift, 0.0213)
    np.testing.assert_allclose(np.log10(spectrum.wave), 3.58 + 1e-4 * np.arange(3800), atol=1e-9)
    assert spectrum.mask[:5].all() and not spectrum.mask[5:].any()


# --- tables, text, arrays: one truth, many spellings ------------------------------------------------------


@pytest.fixture
def truth(rng):
    return files.spectrum_columns(rng)


def as_csv(wave, flux, ivar):
    return files.csv_text({"wave": wave, "flux": flux, "ivar": ivar})


def as_tsv(wave, flux, ivar):
    return files.csv_text({"Wavelength": wave, "Flux": flux, "error": ivar**-0.5}, sep="\t")


def as_white_space(wave, flux, ivar):
    rows = "\n".join(f"{a:.6f}  {b:.8g}   {c:.6g}" for a, b, c in zip(wave, flux, ivar, strict=True))
    return rows.encode()


def as_nanometres(wave, flux, ivar):
    return files.csv_text({"wave [nm]": wave / 10, "flux": flux, "ivar": ivar})


def as_commented_units(wave, flux, ivar):
    comments = ("wavelength unit: nm, vacuum", "flux unit: erg/s/cm2/A")
    return files.csv_text({"lambda": wave / 10, "flux": flux * 1e-17, "ivar": ivar * 1e34}, comments)


def as_semicolons_with_text(wave, flux, ivar):
    head = b"name;wave;flux;ivar\n"
    rows = zip(wave, flux, ivar, strict=True)
    return head + "\n".join(f"pixel;{a:.6f};{b:.8g};{c:.6g}" for a, b, c in rows).encode()


def as_npy(wave, flux, ivar):
    return files.npy_bytes(np.column_stack([wave, flux, ivar]))


def as_npy_rows_big_endian(wave, flux, ivar):
    return files.npy_bytes(np.asfortranarray(np.vstack([wave, flux, ivar, np.zeros_like(wave)])).astype(">f8"))


def as_table(wave, flux, ivar):
    return files.table({"WAVE": wave, "FLUX": flux, "IVAR": ivar}, {"WAVE": "Angstrom"})


def as_loglam_table(wave, flux, ivar):
    return files.table({"LOGLAM": np.log10(wave), "FLUX": flux, "ERR": ivar**-0.5})


def as_vector_table(wave, flux, ivar):
    units = {"WAVE": "um", "FLUX": "10**(-19).erg.cm**(-2).s**(-1).angstrom**(-1)"}
    columns = {"WAVE": wave[None] / 1e4, "FLUX": flux[None] * 100, "VAR": 1e4 / ivar[None]}
    return files.table(columns, units)


def as_janskys(wave, flux, ivar):
    factor = 1e-17 * wave**2 / 2.99792458e18 / 1e-29  # to microjansky
    return files.table({"wave": wave, "flux": flux * factor, "ivar": ivar / factor**2}, {"flux": "uJy", "wave": "A"})


def as_gzipped(wave, flux, ivar):
    return files.gz(as_table(wave, flux, ivar))


@pytest.mark.parametrize(
    "spell",
    [
        as_csv, as_tsv, as_white_space, as_nanometres, as_commented_units, as_semicolons_with_text, as_npy,
        as_npy_rows_big_endian, as_table, as_loglam_table, as_vector_table, as_janskys, as_gzipped,
    ],
)  # fmt: skip
def test_every_spelling_gives_the_same_spectrum(truth, spell):
    wave, flux, ivar = truth
    spectrum = one(spell(wave, flux, ivar))
    np.testing.assert_allclose(spectrum.wave, wave, rtol=1e-8)
    np.testing.assert_allclose(spectrum.flux, flux, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(spectrum.ivar, ivar, rtol=2e-5)
    assert "ivar_estimated" not in codes(spectrum)


def test_assumptions_become_flags(truth):
    wave, flux, ivar = truth
    bare = one(files.npy_bytes(np.column_stack([wave, flux])))
    assert codes(bare) == {"assumed_wave_unit", "assumed_vacuum", "assumed_flux_unit", "ivar_estimated"}
    assert "assumed_columns" in codes(one(as_white_space(wave, flux, ivar)))
    stated = SpectrumOptions(wave_unit="Angstrom", flux_unit="1e-17 erg/s/cm2/A", medium="vacuum")
    assert codes(one(as_csv(wave, flux, ivar), options=stated)) == set()


def test_one_dimensional_image_with_a_wavelength_axis(truth):
    wave, flux, _ = truth
    header = fits.Header({"CRVAL1": wave[0], "CDELT1": wave[1] - wave[0], "CRPIX1": 1.0, "CTYPE1": "AWAV"})
    header["CUNIT1"] = "Angstrom"
    spectrum = one(files.fits_bytes(fits.PrimaryHDU(flux, header)))
    np.testing.assert_allclose(spectrum.wave, air_to_vacuum(wave), rtol=1e-9)
    assert "converted_from_air" in codes(spectrum)


# --- air, vacuum and units against astropy -----------------------------------------------------------------


def test_air_to_vacuum_inverts_the_refractive_index():
    vacuum = np.linspace(3000, 11000, 500)
    np.testing.assert_allclose(air_to_vacuum(vacuum / refractive_index(vacuum)), vacuum, rtol=1e-12)
    # Morton (1991, ApJS 77, 119): [O III] 5006.843 in air is 5008.239 in vacuum.
    assert np.isclose(air_to_vacuum(np.array([5006.843]))[0], 5008.239, atol=2e-3)


@pytest.mark.parametrize("where", ["option", "header", "ucd", "column", "comment"])
def test_air_is_understood_wherever_it_is_stated(truth, where):
    wave, flux, ivar = truth
    columns = {"WAVE": wave, "FLUX": flux, "IVAR": ivar}
    if where == "option":
        spectrum = one(files.table(columns), options=SpectrumOptions(medium="air"))
    elif where == "header":
        spectrum = one(files.table(columns, AIRORVAC="air"))
    elif where == "ucd":
        spectrum = one(files.table(columns, TUCD1="em.wl;obs.atmos"))
    elif where == "column":
        spectrum = one(files.csv_text({"wave_air": wave, "flux": flux, "ivar": ivar}))
    else:
        spectrum = one(files.csv_text({"wave": wave, "flux": flux, "ivar": ivar}, ("wavelengths in Angstrom, air",)))
    np.testing.assert_allclose(spectrum.wave, air_to_vacuum(wave), rtol=1e-9)
    assert "converted_from_air" in codes(spectrum) and "assumed_vacuum" not in codes(spectrum)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("1E-17 erg/cm^2/s/Ang", 1e-17 * u.erg / u.s / u.cm**2 / u.AA),
        ("10**(-17) erg s-1 cm-2 Angstrom-1", 1e-17 * u.erg / u.s / u.cm**2 / u.AA),
        ("10-17 erg/s/cm2/A", 1e-17 * u.erg / u.s / u.cm**2 / u.AA),
        ("erg/s/cm2/nm", u.erg / u.s / u.cm**2 / u.nm),
        ("W m-2 um-1", u.W / u.m**2 / u.um),
        ("mJy", u.mJy),
        ("erg/s/cm2/Hz", u.erg / u.s / u.cm**2 / u.Hz),
        ("nanomaggies", 3.631e-6 * u.Jy),
        ("MJy", u.MJy),
        ("10(-17) erg/s/cm2/A", 1e-17 * u.erg / u.s / u.cm**2 / u.AA),
        (r"10^{-17} erg s^{-1} cm^{-2} \AA^{-1}", 1e-17 * u.erg / u.s / u.cm**2 / u.AA),
        ("1E-17 ERG/S/CM**2/ANGSTROMS", 1e-17 * u.erg / u.s / u.cm**2 / u.AA),
        ("Watts/m^2/micron", u.W / u.m**2 / u.um),
    ],
)
def test_flux_units_agree_with_astropy(text, unit):
    wave = np.array([4000.0, 8000.0])
    factor = flux_to_flam(np.ones(2), wave, text)
    wanted = (1 * u.Unit(unit)).to(1e-17 * u.erg / u.s / u.cm**2 / u.AA, u.spectral_density(wave * u.AA)).value
    np.testing.assert_allclose(factor, wanted, rtol=1e-6)


# --- order, repeats, noise, masks --------------------------------------------------------------------------


def test_arms_laid_end_to_end_are_sorted_and_merged_with_a_flag():
    blue, red = np.arange(3600, 5801, 2.0), np.arange(5760, 9801, 2.0)
    wave = np.concatenate([blue, red])
    flux = np.where(np.arange(wave.size) < blue.size, 1.0, 4.0)
    ivar = np.where(np.arange(wave.size) < blue.size, 3.0, 1.0)
    spectrum = one(files.npy_bytes(np.column_stack([wave, flux, ivar])))
    np.testing.assert_array_equal(spectrum.wave, np.arange(3600, 9801, 2.0))
    both = (spectrum.wave >= 5760) & (spectrum.wave <= 5800)
    np.testing.assert_allclose(spectrum.flux[both], (3 * 1 + 1 * 4) / 4)
    np.testing.assert_allclose(spectrum.ivar[both], 4.0)
    assert "wavelength_sorted_merged" in codes(spectrum)


def test_shuffled_rows_give_the_spectrum_of_ordered_rows(rng, truth):
    wave, flux, ivar = truth
    order = rng.permutation(wave.size)
    shuffled = one(files.npy_bytes(np.column_stack([wave, flux, ivar])[order]))
    np.testing.assert_array_equal(shuffled.flux, flux.astype("f4"))
    assert "wavelength_sorted_merged" in codes(shuffled)


def test_a_bad_twin_does_not_touch_a_good_sample():
    wave = np.repeat(np.arange(4000, 5000, 2.0), 2)
    flux = np.tile([2.0, np.nan], 500)
    spectrum = one(files.npy_bytes(np.column_stack([wave, flux, np.ones(1000)])))
    assert (spectrum.flux == 2.0).all() and not spectrum.mask.any()


def test_nan_fluxes_are_masked_not_spread(truth):
    wave, flux, ivar = truth
    flux[100:110] = np.nan
    flux[200] = np.inf
    spectrum = one(files.npy_bytes(np.column_stack([wave, flux, ivar])))
    assert np.flatnonzero(spectrum.mask).tolist() == [*range(100, 110), 200]
    assert np.isclose(spectrum.quality.masked_fraction, 11 / wave.size)


def test_few_negative_ivars_are_bad_pixels_with_a_flag(truth):
    wave, flux, ivar = truth
    ivar[:7] = -1
    spectrum = one(files.npy_bytes(np.column_stack([wave, flux, ivar])))
    assert spectrum.mask[:7].all() and not spectrum.mask[7:].any() and "negative_ivar" in codes(spectrum)


def test_noise_is_estimated_locally(rng):
    sigma = np.linspace(0.5, 2.0, 6000)
    flux = 20 + 5 * np.sin(np.arange(6000) / 300) + rng.normal(0, 1, 6000) * sigma
    estimate = estimate_ivar(flux, np.ones(6000, bool)) ** -0.5
    assert np.median(np.abs(estimate / sigma - 1)) < 0.1
    assert np.max(np.abs(estimate / sigma - 1)) < 0.5


def test_noise_of_a_smoothed_spectrum_is_that_of_its_information(rng):
    """Archives hand out spectra smoothed for display; neighbouring samples then hardly differ."""
    white = 20 + rng.normal(0, 1, 8000)
    width = 3.0
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / width) ** 2)
    smoothed = np.convolve(white - 20, kernel / kernel.sum(), mode="same") + 20
    estimate = np.median(estimate_ivar(smoothed, np.ones(8000, bool)) ** -0.5)
    assert smoothed.std() < 0.32  # what neighbours far apart show
    assert 0.8 < estimate < 1.25  # what was known before smoothing


def test_a_noiseless_model_gets_a_floor_not_infinite_weight():
    ivar = estimate_ivar(np.full(1000, 7.0), np.ones(1000, bool))
    np.testing.assert_allclose(ivar, (0.01 * 7.0) ** -2)


def test_quality_snr_is_the_median_of_flux_over_noise(truth):
    wave, flux, ivar = truth
    spectrum = one(as_npy(wave, flux, ivar))
    assert np.isclose(spectrum.quality.snr, np.median(flux * np.sqrt(ivar)), rtol=1e-5)
