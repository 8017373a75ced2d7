"""Real DESI and SDSS objects in the simulated index: redshifts, partners, and what does not belong.

The real objects are test data only. How neighbours become a redshift (how many, mean or median) is chosen on
the simulated validation objects; nothing is tuned on the sky. All spectra enter through the library's
readers, so a defect there costs here what it would cost a user.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.errors import AstroClipError
from astroclip.io import ImageOptions, read_images, read_spectra
from astroclip.io.fits import parse_fits
from astroclip.io.spectrum import RawSpectrum, assemble_spectrum
from astroclip.preprocess import GridImage, ImageGrid, SpectrumGrid, image_to_grid, spectrum_to_grid
from astroclip.types import Spectrum
from training.evaluate import metrics
from training.evaluate.neighbours import nearest, unit, weighted_mean, weighted_median

__all__ = [
    "KnnRedshift",
    "Pair",
    "RealObject",
    "load_objects",
    "load_pairs",
    "out_of_class",
    "partner_rank",
    "redshift_table",
]

Array = npt.NDArray[Any]
K_GRID = (1, 2, 4, 8, 16, 32)
SNR_EDGES = (-np.inf, 1.0, 3.0, np.inf)  # median signal-to-noise a grid pixel
REDSHIFT_BINS = {"z<0.6": (-0.01, 0.6), "0.6<z<1.5": (0.6, 1.5), "z<1.5": (-0.01, 1.5)}
PAIR_SCALE_ARCSEC = 0.1  # of the pairs' JPEGs
OUT_OF_CLASS_K = 10


@dataclass(frozen=True)
class RealObject:
    """One real spectrum on the model's grid. group: "desi", "sdss", "desi_edr_scaled"; spectype: GALAXY,
    QSO, STAR or UNKNOWN; snr: median signal-to-noise a grid pixel."""

    name: str
    group: str
    spectype: str
    redshift: float
    snr: float
    flux: Array
    ivar: Array


@dataclass(frozen=True)
class Pair:
    """A real galaxy's picture and spectrum, both on the grid."""

    name: str
    image: GridImage
    spectrum: RealObject


# --------------------------------------------------------------------------------------------- loading


def load_objects(shared: Path, grid: SpectrumGrid) -> tuple[list[RealObject], list[str]]:
    """Every real spectrum with a class and a redshift, and a line for each that could not be read."""
    objects: list[RealObject] = []
    refused: list[str] = []
    for name, group, spectype, redshift, make in _sources(shared):
        try:
            placed = spectrum_to_grid(make(), grid)
        except (AstroClipError, OSError) as error:
            refused.append(f"{name}: {error}")
            continue
        snr = float(placed.quality.snr or 0.0)
        objects.append(RealObject(name, group, spectype, redshift, snr, placed.flux, placed.ivar))
    return objects, refused


Source = tuple[str, str, str, float, Callable[[], Spectrum]]


def _sources(shared: Path) -> Iterable[Source]:
    yield from _andes(shared / "desi" / "desi_andes.npz")
    yield from _edr_raw(shared / "desi" / "desi_edr_raw_z020.npz")
    yield from _redrock(shared / "desi")
    yield from _edr_scaled(shared / "desi" / "desi_edr_scaled.npz")
    for folder in ("sdss", "qso", "pairs"):
        for path in sorted((shared / folder).glob("*.fits")):
            yield from _sdss(path)


def _andes(path: Path) -> Iterable[Source]:
    """Arms laid end to end and sorted, no ivar: the reader's own merging and noise estimate."""
    if not path.is_file():
        return
    data = np.load(path, allow_pickle=False)
    for i in range(len(data["z"])):
        yield (
            f"andes-{data['targetid'][i]}",
            "desi",
            str(data["spectype"][i]),
            float(data["z"][i]),
            _assembling(data["wave"], data["flux"][i]),
        )


def _edr_raw(path: Path) -> Iterable[Source]:
    if path.is_file():
        data = np.load(path, allow_pickle=False)
        make = _assembling(data["wavelength"], data["flux"], data["ivar"], data["mask"])
        yield f"edr-{data['object_id']}", "desi", "GALAXY", float(data["z_true"]), make


def _edr_scaled(path: Path) -> Iterable[Source]:
    """arcsinh((f - median)/(1.4826 MAD)) undone by sinh: shape without level or unit, class unknown, kept apart."""
    if not path.is_file():
        return
    data = np.load(path, allow_pickle=False)
    for i in range(len(data["z"])):
        flux = np.sinh(data["flux"][i].astype(np.float64))
        make = _assembling(data["wave"], flux, bad=~data["valid"][i])
        yield f"edr-scaled-{i}", "desi_edr_scaled", "UNKNOWN", float(data["z"][i]), make


def _redrock(folder: Path) -> Iterable[Source]:
    """Coadds with a redrock file beside them, joined on TARGETID."""
    for path in sorted(folder.glob("redrock-*.fits")):
        coadd = path.with_name(path.name.replace("redrock", "coadd", 1))
        if not coadd.is_file():
            continue
        (table,) = [hdu for hdu in parse_fits(path.read_bytes()) if hdu.name == "REDSHIFTS"]
        best = {
            str(int(target)): (str(kind), float(z))
            for target, kind, z in zip(table.read("targetid"), table.read("spectype"), table.read("z"), strict=True)
        }
        for spectrum in read_spectra(coadd.read_bytes(), name=coadd.name):
            if spectrum.object_id in best:
                kind, z = best[spectrum.object_id]
                yield f"coadd-{spectrum.object_id}", "desi", kind, z, _constant(spectrum)


def _sdss(path: Path) -> Iterable[Source]:
    """spec-PLATE-MJD-FIBER files with CLASS and Z in their second table; other layouts carry no class and are left."""
    tables = [hdu for hdu in parse_fits(path.read_bytes()) if hdu.kind == "table"]
    for hdu in tables[1:]:
        if {"class", "z"} <= set(hdu.columns) and hdu.shape[0] == 1:
            kind, redshift = str(hdu.read("class", row=0)), float(hdu.read("z", row=0))
            yield path.stem, "sdss", kind, redshift, lambda: read_spectra(path.read_bytes(), name=path.name)[0]
            return


def _assembling(
    wave: Array, flux: Array, ivar: Array | None = None, bad: Array | None = None
) -> Callable[[], Spectrum]:
    raw = RawSpectrum(wave, flux, ivar, bad=bad, wave_unit="Angstrom", flux_unit="1e-17 erg/s/cm2/A", medium="vacuum")
    return lambda: assemble_spectrum(raw)


def _constant(spectrum: Spectrum) -> Callable[[], Spectrum]:
    return lambda: spectrum


def load_pairs(shared: Path, images: ImageGrid, objects: Sequence[RealObject]) -> list[Pair]:
    """The real galaxies with both a picture (JPEG, colours only) and one of `objects`."""
    index = shared / "pairs" / "index.csv"
    if not index.is_file():
        return []
    by_name = {item.name: item for item in objects}
    pairs = []
    for row in csv.DictReader(io.StringIO(index.read_text(encoding="utf-8"))):
        path = index.parent / Path(row["image"]).name
        options = ImageOptions(pixel_scale_arcsec=PAIR_SCALE_ARCSEC)
        (image,) = read_images(path.read_bytes(), name=path.name, options=options)
        spectrum = by_name.get(Path(row["spectrum"]).stem)
        if spectrum is not None:
            pairs.append(Pair(row["id"], image_to_grid(image, images), spectrum))
    return pairs


# --------------------------------------------------------------------------------------------- redshift


@dataclass(frozen=True)
class KnnRedshift:
    """Redshift from the k nearest of a table of simulated objects, by cosine; `how` is "mean" or "median"."""

    table: Array
    redshift: Array
    k: int
    how: str

    @classmethod
    def tuned(cls, table: Array, redshift: Array, val: Array, val_redshift: Array) -> KnnRedshift:
        """k and `how` of the least sigma_NMAD + share of outliers above 0.05 on simulated validation objects."""
        table = unit(table)
        found = nearest(unit(val), table, max(K_GRID))
        trials = []
        for k in K_GRID:
            for how, estimate in _ESTIMATES.items():
                got = estimate(found.first(k), redshift)
                cost = metrics.sigma_nmad(val_redshift, got) + metrics.outlier_fraction(val_redshift, got)
                trials.append((cost, k, how))
        _, k, how = min(trials)
        return cls(table, np.asarray(redshift), k, how)

    def __call__(self, queries: Array) -> Array:
        """(Q, D) embeddings -> (Q,) redshifts."""
        return np.asarray(_ESTIMATES[self.how](nearest(unit(queries), self.table, self.k), self.redshift))


_ESTIMATES = {"mean": weighted_mean, "median": weighted_median}


def redshift_table(
    objects: Sequence[RealObject],
    predicted: dict[str, Array],
    group: str,
    *,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Redshift numbers of the galaxies of `group`, by redshift bin and, within, by signal-to-noise.

    predicted: method -> (len(objects),) redshifts in the order of `objects`.
    Returns {bin: {"n", method: numbers, "by_snr": [{"snr", "n", method: numbers}, ...]}}.
    """
    wanted = "UNKNOWN" if group == "desi_edr_scaled" else "GALAXY"
    chosen = np.array([item.group == group and item.spectype == wanted for item in objects], bool)
    truth = np.array([item.redshift for item in objects], np.float64)
    snr = np.array([item.snr for item in objects], np.float64)
    out: dict[str, Any] = {}
    for label, (low, high) in REDSHIFT_BINS.items():
        rows = np.flatnonzero(chosen & (truth >= low) & (truth < high))
        if not rows.size:
            continue
        entry: dict[str, Any] = {"n": int(rows.size)}
        for method, values in predicted.items():
            entry[method] = metrics.redshift_numbers(truth[rows], values[rows], n_bootstrap, seed)
        entry["by_snr"] = []
        for lower, upper in zip(SNR_EDGES[:-1], SNR_EDGES[1:], strict=True):
            some = rows[(snr[rows] >= lower) & (snr[rows] < upper)]
            line: dict[str, Any] = {"snr": [lower, upper], "n": int(some.size)}
            for method, values in predicted.items():
                line[method] = metrics.redshift_numbers(truth[some], values[some], n_bootstrap, seed)
            entry["by_snr"].append(line)
        out[label] = entry
    return out


# --------------------------------------------------------------------------------------------- partners


def partner_rank(
    pairs_image: Array, pairs_spectrum: Array, pool_image: Array, pool_spectrum: Array
) -> dict[str, dict[str, Any]]:
    """Rank (1 = best) of each real pair's partner, both ways, among the other pairs and among them and the
    pool.

    All (., D); the pools are simulated test objects of the modality searched.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, queries, partners, pool in (
        ("image->spectrum", pairs_image, pairs_spectrum, pool_spectrum),
        ("spectrum->image", pairs_spectrum, pairs_image, pool_image),
    ):
        queries, partners = unit(queries), unit(partners)
        own = np.sum(queries * partners, axis=1)
        among_pairs = metrics.partner_ranks(queries, partners)
        above = np.sum(queries @ unit(pool).T >= own[:, None], axis=1)
        out[name] = {
            "pool_size": int(len(pool) + len(partners)),
            "rank": [int(rank) for rank in among_pairs + above],
            "rank_among_pairs": [int(rank) for rank in among_pairs],
            "median_rank": metrics.median_rank(among_pairs + above),
        }
    return out


# --------------------------------------------------------------------------------------------- out of class


def out_of_class(
    objects: Sequence[RealObject], embeddings: Array, table: Array, simulated: Array, k: int = OUT_OF_CLASS_K
) -> dict[str, Any]:
    """QSOs and stars against galaxies by the distance of the k-th neighbour: AUC, and detection at 5 % false
    alarm.

    embeddings: (len(objects), D); table: simulated training spectra; simulated: held-out simulated spectra.
    The alarm is set once on the real galaxies and once on the simulated ones (all that a service can do
    beforehand).
    """
    table = unit(table)

    def strangeness(vectors: Array) -> Array:
        return nearest(unit(vectors), table, k).distance[:, -1]

    score, inside_sim = strangeness(embeddings), strangeness(simulated)
    kind = np.array([item.spectype for item in objects])
    galaxies = score[kind == "GALAXY"]
    out: dict[str, Any] = {
        "k": k,
        "kth_cosine": {"simulated galaxies": _quartiles(inside_sim), "real galaxies": _quartiles(galaxies)},
        "false_alarm_on_real_galaxies": metrics.detection_rate(inside_sim, galaxies),
    }
    for name in ("QSO", "STAR"):
        outside = score[kind == name]
        out["kth_cosine"][name] = _quartiles(outside)
        out[name] = {
            "n": int(outside.size),
            "auc_real_galaxies": metrics.roc_auc(galaxies, outside),
            "auc_simulated_galaxies": metrics.roc_auc(inside_sim, outside),
            "detected_at_5pct_real": metrics.detection_rate(galaxies, outside),
            "detected_at_5pct_simulated": metrics.detection_rate(inside_sim, outside),
        }
    return out


def _quartiles(distance: Array) -> list[float]:
    """Quartiles of the cosine 1 - d^2/2 of unit vectors, rising; empty for no objects."""
    cosine = 1 - np.asarray(distance) ** 2 / 2
    return [float(q) for q in np.quantile(cosine, [0.25, 0.5, 0.75])] if cosine.size else []
