"""From columns as found in some file to a `Spectrum`: units, medium, order, gaps, noise, quality.

Every format ends here, so that the rules are the same for all: non-finite fluxes are masked, non-finite or
negative wavelengths are refused, disorder and repeats are sorted and merged, and whatever had to be assumed
becomes a flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from astroclip.io.options import SpectrumOptions
from astroclip.io.refusal import over_limit, refusal
from astroclip.io.units import air_to_vacuum, flux_to_flam, guess_wave_unit, is_silent, wave_to_angstrom
from astroclip.limits import DEFAULT_LIMITS, ReaderLimits
from astroclip.medians import medians
from astroclip.types import Flag, Quality, Spectrum

__all__ = ["RawSpectrum", "assemble_spectrum", "check_length", "estimate_ivar"]

FloatArray = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

FLUX_UNIT = "1e-17 erg/s/cm2/A"
MERGE_TOLERANCE = 0.05  # of a median step: closer samples are one pixel seen twice (overlapping arms)
NOISE_BLOCK = 128  # samples per local noise estimate: wider than any line, narrower than the sky's bright end
NOISE_LAGS = (2, 4, 8, 16)  # samples between differences; the longest is wider than any smoothing for display
NOISE_GROWTH = 1.4  # of the scatter from one lag to the next: more is correlated noise, less is the galaxy itself
NOISE_FLOOR = 0.01  # of the median |flux|: a noiseless model is not given infinite weight


@dataclass(frozen=True)
class RawSpectrum:
    """Columns of one object as the file gives them; None where it says nothing.

    wave, flux:       any numeric dtype, one length.
    ivar / error:     at most one is needed; both in the unit of `flux`.
    bad:              nonzero or True marks a bad sample.
    sorted_by_format: overlapping arms are normal here, so merging them raises no flag.
    """

    wave: Array
    flux: Array
    ivar: Array | None = None
    error: Array | None = None
    bad: Array | None = None
    wave_unit: str | None = None
    flux_unit: str | None = None
    medium: Literal["air", "vacuum"] | None = None
    object_id: str | None = None
    ra: float | None = None
    dec: float | None = None
    redshift: float | None = None
    flags: tuple[Flag, ...] = ()
    sorted_by_format: bool = False
    allow_empty: bool = False


def assemble_spectrum(
    raw: RawSpectrum, options: SpectrumOptions | None = None, limits: ReaderLimits = DEFAULT_LIMITS
) -> Spectrum:
    """The `Spectrum` of `raw`: vacuum Angstrom increasing, 1e-17 erg/s/cm2/A, bad samples zero and masked.

    Raises InputError (`length_mismatch`, `spectrum_too_short`, `bad_wavelength`, `no_finite_flux`,
    `zero_ivar`, `negative_ivar`, `unknown_unit`, ...) and LimitError (`spectrum_too_long`).
    """
    options = options or SpectrumOptions()
    flags = list(raw.flags)
    wave, flux, ivar, bad = _columns(raw, limits)
    wave = _to_vacuum(wave, raw, options, flags)
    _check_wavelengths(wave)
    factor = _flux_factor(flux, wave, raw, options, flags)
    flux = flux * factor
    bad |= ~np.isfinite(flux)
    if bad.all() and not np.isfinite(flux).any():
        raise refusal(
            "no_finite_flux",
            found=f"{flux.size} fluxes, all NaN or infinite",
            wanted="finite fluxes",
            mend="Check the export: the flux column is empty.",
            field="flux",
        )
    if ivar is not None:
        ivar = ivar / np.square(factor)
        bad |= _bad_ivar(ivar, flags)
    else:
        ivar = estimate_ivar(flux, ~bad)
        flags.append(
            Flag(
                "ivar_estimated",
                "The file gives no noise; it was estimated from the scatter between neighbouring pixels.",
            )
        )
    flux, ivar = np.where(bad, 0.0, flux), np.where(bad, 0.0, ivar)
    wave, flux, ivar, bad = _increasing(wave, flux, ivar, bad, raw, flags)
    _check_not_short(wave.size, limits, "different wavelengths")
    return _finish(wave, flux, ivar, bad, raw, flags)


def _columns(
    raw: RawSpectrum, limits: ReaderLimits
) -> tuple[FloatArray, FloatArray, FloatArray | None, npt.NDArray[np.bool_]]:
    """wave, flux, ivar as float64 and the bad mask, all of one checked length."""
    n = np.size(raw.wave)
    given = {"flux": raw.flux, "ivar": raw.ivar, "error": raw.error, "mask": raw.bad}
    for name, values in given.items():
        if values is not None and np.size(values) != n:
            raise refusal(
                "length_mismatch",
                found=f"{n} wavelengths and {np.size(values)} values of {name}",
                wanted="columns of one length",
                mend="Write one row for each wavelength.",
                field=name,
            )
    check_length(n, limits)
    _check_not_short(n, limits)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wave, flux = (np.asarray(a, dtype=np.float64).reshape(n) for a in (raw.wave, raw.flux))
    bad = np.zeros(n, dtype=bool)
    if raw.bad is not None:
        values = np.asarray(raw.bad).reshape(n)
        bad |= ~((values == 0) | (values != values)) if values.dtype.kind == "f" else values != 0
    ivar: FloatArray | None = None
    if raw.ivar is not None:
        ivar = np.asarray(raw.ivar, dtype=np.float64).reshape(n)
    elif raw.error is not None:
        error = np.asarray(raw.error, dtype=np.float64).reshape(n)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ivar = np.where((error > 0) & np.isfinite(error), 1.0 / np.square(error), 0.0)
    return wave, flux, ivar, bad


def check_length(n: int, limits: ReaderLimits, unit: str = "samples") -> None:
    """Refuse a spectrum of more than the limit, from its announced length where there is one. Raises LimitError."""
    if n > limits.max_spectrum_pixels:
        raise over_limit(
            "spectrum_too_long",
            what="a spectrum",
            found=n,
            limit=limits.max_spectrum_pixels,
            unit=unit,
            mend="Rebin it; the models resolve about 2 A.",
        )


def _check_not_short(n: int, limits: ReaderLimits, what: str = "samples") -> None:
    if n < limits.min_spectrum_pixels:
        raise refusal(
            "spectrum_too_short",
            found=f"a spectrum of {n} {what}",
            wanted=f"at least {limits.min_spectrum_pixels}",
            mend="Send the whole spectrum, not a cut around one line.",
        )


def _to_vacuum(wave: FloatArray, raw: RawSpectrum, options: SpectrumOptions, flags: list[Flag]) -> FloatArray:
    unit = options.wave_unit or raw.wave_unit
    if is_silent(unit):
        unit = guess_wave_unit(wave)
        flags.append(Flag("assumed_wave_unit", f"The file states no wavelength unit; {unit} was assumed."))
    assert unit is not None
    wave = wave_to_angstrom(wave, unit)
    medium = options.medium or raw.medium
    if medium is None:
        flags.append(Flag("assumed_vacuum", "The file does not say air or vacuum; vacuum wavelengths were assumed."))
    elif medium == "air":
        flags.append(Flag("converted_from_air", "Air wavelengths were converted to vacuum."))
        with np.errstate(divide="ignore", invalid="ignore"):
            wave = air_to_vacuum(wave)
    return wave


def _check_wavelengths(wave: FloatArray) -> None:
    wrong = ~np.isfinite(wave) | (wave <= 0)
    if not wrong.any():
        return
    first = int(np.argmax(wrong))
    raise refusal(
        "bad_wavelength",
        found=f"{int(wrong.sum())} of {wave.size} wavelengths NaN, infinite or not positive "
        f"(first: {wave[first]} at row {first})",
        wanted="positive, finite wavelengths throughout",
        mend="Drop those rows; bad fluxes may stay, marked by ivar = 0 or NaN.",
        field="wave",
    )


def _flux_factor(
    flux: FloatArray, wave: FloatArray, raw: RawSpectrum, options: SpectrumOptions, flags: list[Flag]
) -> FloatArray:
    unit = options.flux_unit or raw.flux_unit
    if is_silent(unit):
        good = np.abs(flux[np.isfinite(flux) & (flux != 0)])
        # Optical fluxes in plain cgs lie below 1e-10; numbers that small are not in units of 1e-17.
        unit = "erg/s/cm2/A" if good.size and medians(good) < 1e-10 else FLUX_UNIT
        flags.append(Flag("assumed_flux_unit", f"The file states no flux unit; {unit} was assumed."))
    assert unit is not None
    return flux_to_flam(flux, wave, unit)


def _bad_ivar(ivar: FloatArray, flags: list[Flag]) -> npt.NDArray[np.bool_]:
    negative = ivar < 0
    if negative.mean() > 0.5:
        raise refusal(
            "negative_ivar",
            found=f"{int(negative.sum())} of {ivar.size} inverse variances negative",
            wanted="ivar >= 0, and 0 where a pixel is bad",
            mend="Check that the column is not the flux or a logarithm.",
            field="ivar",
        )
    if negative.any():
        flags.append(
            Flag("negative_ivar", f"{int(negative.sum())} negative inverse variances were taken as bad pixels.")
        )
    return ~np.isfinite(ivar) | (ivar <= 0)


def _increasing(
    wave: FloatArray,
    flux: FloatArray,
    ivar: FloatArray,
    bad: npt.NDArray[np.bool_],
    raw: RawSpectrum,
    flags: list[Flag],
) -> tuple[FloatArray, FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """Sorted, samples closer than the tolerance merged with ivar weights (sum of w f / sum of w, ivar = sum
    of w)."""
    steps = np.diff(wave)
    if not (steps <= 0).any():
        return wave, flux, ivar, bad
    order = np.argsort(wave, kind="stable")
    wave, flux, ivar, bad = wave[order], flux[order], ivar[order], bad[order]
    steps = np.diff(wave)
    positive = steps[steps > 0]
    tolerance = MERGE_TOLERANCE * float(medians(positive)) if positive.size else 0.0
    starts = np.concatenate(([0], np.flatnonzero(steps > tolerance) + 1))
    counts = np.diff(np.append(starts, wave.size))
    merged_wave = np.add.reduceat(wave, starts) / counts
    weight = np.add.reduceat(ivar, starts)
    with np.errstate(divide="ignore", invalid="ignore"):
        merged_flux = np.where(weight > 0, np.add.reduceat(ivar * flux, starts) / weight, 0.0)
    if not raw.sorted_by_format:
        repeated = wave.size - starts.size
        flags.append(
            Flag(
                "wavelength_sorted_merged",
                "The wavelengths were not increasing: they were sorted and "
                f"{repeated} repeated samples merged by inverse variance.",
            )
        )
    return merged_wave, merged_flux, weight, weight <= 0


def _finish(
    wave: FloatArray,
    flux: FloatArray,
    ivar: FloatArray,
    bad: npt.NDArray[np.bool_],
    raw: RawSpectrum,
    flags: list[Flag],
) -> Spectrum:
    tiny = float(np.finfo(np.float32).tiny)
    with np.errstate(over="ignore", invalid="ignore"):
        flux4, ivar4 = flux.astype(np.float32), ivar.astype(np.float32)
    bad = bad | ~np.isfinite(flux4) | ~np.isfinite(ivar4) | (ivar4 < tiny)
    flux4, ivar4 = np.where(bad, np.float32(0), flux4), np.where(bad, np.float32(0), ivar4)
    if bad.all():
        message = "Every sample has zero inverse variance or is masked."
        if not raw.allow_empty:
            raise refusal(
                "zero_ivar",
                found=f"{bad.size} samples, all with zero inverse variance or masked",
                wanted="good samples with ivar > 0",
                mend="Check the ivar and mask columns, or leave both out.",
                field="ivar",
            )
        flags.append(Flag("zero_ivar", message))
    snr = None if bad.all() else float(medians(flux4[~bad] * np.sqrt(ivar4[~bad])))
    quality = Quality(masked_fraction=float(bad.mean()), snr=snr).with_flags(*flags)
    return Spectrum(
        wave=wave,
        flux=flux4,
        ivar=ivar4,
        mask=bad,
        object_id=raw.object_id,
        ra=raw.ra,
        dec=raw.dec,
        redshift=raw.redshift,
        quality=quality,
    )


def estimate_ivar(flux: FloatArray, good: npt.NDArray[np.bool_]) -> FloatArray:
    """Inverse variance from the scatter of `flux` about its neighbours, in blocks of `NOISE_BLOCK` samples,
    interpolated.

    DER_SNR (Stoehr et al. 2008, ASP Conf. 394, 505): sigma_l = 1.482602 / sqrt(6) median |2 f_i - f_(i-l) -
    f_(i+l)|; lags of two samples are little touched by the correlation that resampling leaves. A spectrum smoothed
    for display has less scatter at short lags than at long ones: then the lag grows until the scatter no longer does,
    and the estimate is what independent samples of the same information would have, sqrt(n) times more for a noise
    correlated over n samples.
    """
    index = np.flatnonzero(good)
    if index.size < 8:
        return np.where(good, 1.0, 0.0)
    f = flux[index]
    lag, correlated = _noise_lag(f)
    scatter = _second_difference(f, lag) * np.sqrt(correlated)
    blocks = np.array_split(scatter, max(1, scatter.size // NOISE_BLOCK))
    sigma = np.array([medians(b) for b in blocks])
    floor = NOISE_FLOOR * float(np.median(np.abs(f)))
    if floor == 0.0:
        floor = NOISE_FLOOR * float(np.abs(f).max()) or 1.0
    starts = np.cumsum([0] + [b.size for b in blocks[:-1]])
    centres = index[lag:-lag][starts + np.array([b.size for b in blocks]) // 2]
    local = np.interp(np.arange(flux.size), centres, np.maximum(sigma, floor))
    return np.where(good, 1.0 / np.square(local), 0.0)


def _second_difference(f: FloatArray, lag: int) -> FloatArray:
    """|2 f_i - f_(i-lag) - f_(i+lag)|, scaled so that its median is sigma for independent Gaussian noise."""
    return np.abs(2 * f[lag:-lag] - f[: -2 * lag] - f[2 * lag :]) * (1.482602 / np.sqrt(6.0))


def _noise_lag(f: FloatArray) -> tuple[int, float]:
    """The shortest lag at which the scatter has stopped growing, and over how many samples noise is correlated.

    White noise smoothed by a Gaussian of s samples is uncorrelated from about 2.8 s on, and has 2 sqrt(pi) s samples
    to an independent one: 1.27 a lag.
    """
    lag = NOISE_LAGS[0]
    level = float(medians(_second_difference(f, lag)))
    for longer in NOISE_LAGS[1:]:
        if f.size < 8 * longer:
            break
        next_level = float(medians(_second_difference(f, longer)))
        if next_level < NOISE_GROWTH * level:
            break
        lag, level = longer, next_level
    return lag, 1.0 if lag == NOISE_LAGS[0] else 1.27 * lag
