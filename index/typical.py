"""Typical: how a query compares with the objects of the survey, by three measures calibrated when an index is built.

* distance: the cosine with the k-th nearest object of a reference sample of the query's own modality.
* residual: the difference between a vector and the mean of those k nearest, as a Mahalanobis distance among such
  differences of the survey's own objects. Embeddings fill a thin, curved sheet; junk lands close to it, hence close
  to some object, but seldom on it.
* input: statistics of the input itself (`astroclip.preprocess.statistics`), less what its embedding lets expect
  (linear regression), as a Mahalanobis distance. Sees what no embedding keeps: that the pixels were permuted, say.

Each becomes a split-conformal p-value (Vovk et al. 2005; Bates et al. 2023, arXiv:2104.08279),
p = (1 + #{calibration objects as unusual or more}) / (n + 1). `ood` combines residual and input by the mean
((p1^r + p2^r)/2)^(1/r) with r = -1/4 (Vovk & Wang 2020, Biometrika 107, 791), between the geometric mean, which wants
both to be small, and the smallest, which forgets the other; it is compared with the same mean of the calibration
objects, so that it is a p-value as well, whatever the dependence of the two. Where one is missing, the other stands.

Reference, fitted and calibration objects are three disjoint samples: among objects drawn as the survey's are,
p <= alpha happens with probability alpha. The cost of a query is a product with the reference sample, whatever the
size of the index, the filter or the modality searched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from astroclip.errors import IndexFileError
from index.vectors import VectorTable

__all__ = ["Typicality", "conformal_p", "fit_typicality", "read_typicality", "write_typicality"]

Array = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
PValues = npt.NDArray[np.float64]

REFERENCE = 4096  # objects a query is compared with: 0.5 million multiplications at 128 dimensions, under 0.1 ms
FIT = 8192  # objects the covariances rest on: 8 a dimension at 1,024 dimensions
CALIBRATION = 4096  # resolves p-values to 2.4e-4
FIT_PER_DIMENSION = 2  # with fewer objects a dimension a covariance says nothing
_RIDGE = 1e-6  # of the mean variance: about the rounding of float16 vectors
_EXPONENT = -0.25
_CHUNK = 1024  # queries at once


@dataclass(frozen=True)
class Whitening:
    """centre (D,) and matrix (D, D): |(x - centre) @ matrix|^2 is the squared Mahalanobis distance of x."""

    centre: Array
    matrix: Array

    @classmethod
    def of(cls, sample: npt.NDArray[np.floating]) -> Whitening:
        centre = sample.mean(axis=0, dtype=np.float64)
        variance, axes = np.linalg.eigh(np.cov(sample.T.astype(np.float64)).reshape(sample.shape[1], -1))
        variance = np.maximum(variance, 0.0) + _RIDGE * max(float(variance.mean()), 1e-12)
        return cls(centre.astype(np.float32), (axes / np.sqrt(variance)).astype(np.float32))

    def typicality(self, x: npt.NDArray[np.floating]) -> Array:
        """(Q,) minus the squared distance of (Q, D)."""
        left = (x - self.centre) @ self.matrix
        return np.asarray(-np.einsum("qd,qd->q", left, left), np.float32)


@dataclass(frozen=True)
class Expectation:
    """What an embedding lets expect of the statistics `names` (P,): slope (D, P); and the scatter about it, whose
    centre is the intercept."""

    names: tuple[str, ...]
    slope: Array
    scatter: Whitening


@dataclass(frozen=True)
class Typicality:
    """The measures of one modality.

    k: which neighbour. reference: (R, D) float32 unit vectors; rows: (R,) int64, their rows of the catalogue.
    sheet: of the residuals, None where too few objects were left to fit it; inputs: None also without statistics.
    tables: measure -> sorted scores of the calibration objects, small = unlike; `ood`: mean p-values of the two.
    """

    k: int
    reference: Array
    rows: Rows
    sheet: Whitening | None = None
    inputs: Expectation | None = None
    tables: Mapping[str, Array] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The input statistics it compares, in order; none where it compares none."""
        return self.inputs.names if self.inputs else ()

    def p_values(
        self, queries: Array, statistics: Array | None = None, exclude_rows: Sequence[int] | Rows = ()
    ) -> dict[str, PValues]:
        """(Q,) p-values by measure, and of residual and input together as `ood` (of the one there is, or distance).

        queries: (Q, D) unit vectors. statistics: (Q, P) of their inputs in the order of `names`, NaN or None where
        unknown. exclude_rows: catalogue rows that no query is compared with (its own).
        """
        scores = self.scores(queries, statistics, exclude_rows)
        found = {name: conformal_p(self.tables[name], values) for name, values in scores.items()}
        ood = found.get("residual", found["distance"])
        if "input" in found and "ood" in self.tables:
            both = conformal_p(self.tables["ood"], _mean(ood, found["input"]))
            ood = np.where(np.isfinite(both), both, ood)
        return {**found, "ood": ood}

    def scores(
        self, queries: Array, statistics: Array | None = None, exclude_rows: Sequence[int] | Rows = ()
    ) -> dict[str, Array]:
        """(Q,) scores by measure, small = unlike; NaN where the statistics are unknown."""
        distance, left = self._near(queries, exclude_rows)
        out = {"distance": distance}
        if self.sheet is not None:
            out["residual"] = self.sheet.typicality(left)
        if self.inputs is not None and statistics is not None:
            out["input"] = self.inputs.scatter.typicality(statistics - queries @ self.inputs.slope)
        return out

    def _near(self, queries: Array, exclude_rows: Sequence[int] | Rows = ()) -> tuple[Array, Array]:
        """Cosines (Q,) with the k-th nearest reference object, and queries (Q, D) less the mean of the k nearest."""
        excluded = np.flatnonzero(np.isin(self.rows, exclude_rows)) if len(exclude_rows) else ()
        distance, left = np.empty(len(queries), np.float32), np.empty(queries.shape, np.float32)
        for start in range(0, len(queries), _CHUNK):
            some = slice(start, start + _CHUNK)
            cosines = queries[some] @ self.reference.T
            if len(excluded):
                cosines[:, excluded] = -1.0
            nearest = np.argpartition(cosines, -self.k, axis=1)[:, -self.k :]  # the k-th stands first
            distance[some] = np.take_along_axis(cosines, nearest[:, :1], axis=1)[:, 0]
            left[some] = queries[some] - self.reference[nearest].mean(axis=1)
        return distance, left


def conformal_p(table: npt.NDArray[np.float32], scores: npt.ArrayLike) -> PValues:
    """p-values of `scores` against a sorted table of calibration scores; small = unlike; NaN stays NaN."""
    scores = np.asarray(scores, np.float32)
    p = (1.0 + table.searchsorted(scores, side="right")) / (len(table) + 1.0)
    return np.asarray(np.where(np.isnan(scores), np.nan, p), np.float64)


def fit_typicality(
    table: VectorTable,
    statistics: npt.NDArray[np.floating] | None,
    names: tuple[str, ...],
    k: int,
    rng: np.random.Generator,
) -> Typicality | None:
    """The measures of a table's own objects; None where half of them are no k.

    statistics: (n, P) of the objects by slot, named by `names`, NaN where unknown; used where enough objects have them.
    """
    if len(table) // 2 < max(k, 2):
        return None
    order = rng.permutation(len(table))
    reference, rest = np.sort(order[: min(REFERENCE, len(table) // 2)]), order[min(REFERENCE, len(table) // 2) :]
    enough = FIT_PER_DIMENSION * table.dim
    fitted = rest[: min(FIT, len(rest) // 2)]
    fitted = fitted[: len(fitted) if len(fitted) >= enough else 0]
    calibration = rest[len(fitted) :][:CALIBRATION]
    made = Typicality(k, table.take(reference), table.rows[reference])
    known = None
    if len(fitted):
        vectors = table.take(fitted)
        made = replace(made, sheet=Whitening.of(made._near(vectors)[1]))
        if statistics is not None and names:
            made = replace(made, inputs=_expectation(vectors, statistics[fitted], names, enough))
            known = np.asarray(statistics[calibration], np.float32)
    scores = made.scores(table.take(calibration), known)
    if not np.isfinite(scores.get("input", np.zeros(0))).any():
        scores.pop("input", None)
        made = replace(made, inputs=None)
    tables = {name: np.sort(found[np.isfinite(found)]) for name, found in scores.items()}
    if "input" in scores:
        both = np.isfinite(scores["input"])
        left_out = [_rank_p(scores[name][both]) for name in ("residual", "input")]
        tables["ood"] = np.sort(_mean(*left_out).astype(np.float32))
    return replace(made, tables=tables)


def _expectation(
    vectors: Array, statistics: npt.NDArray[np.floating], names: tuple[str, ...], enough: int
) -> Expectation | None:
    """Least squares on the objects whose statistics are known; None where they are too few."""
    known = np.isfinite(statistics).all(axis=1)
    if np.count_nonzero(known) < enough:
        return None
    x, y = vectors[known].astype(np.float64), statistics[known].astype(np.float64)
    slope = np.linalg.lstsq(x - x.mean(axis=0), y - y.mean(axis=0), rcond=1e-6)[0]
    return Expectation(names, slope.astype(np.float32), Whitening.of(y - x @ slope))


def _mean(first: PValues, second: PValues) -> PValues:
    """The generalised mean of two p-values."""
    return np.asarray(((first**_EXPONENT + second**_EXPONENT) / 2) ** (1 / _EXPONENT), np.float64)


def _rank_p(scores: Array) -> PValues:
    """The p-value of each of n scores among the others."""
    return np.searchsorted(np.sort(scores), scores, side="right") / len(scores)


# --- on disk ----------------------------------------------------------------------------------------------------------


def write_typicality(path: Path, typicality: Typicality) -> None:
    """Write a new safetensors file. Reference vectors are not in it, only their rows: the index has them."""
    tensors: dict[str, npt.NDArray[np.float32] | Rows] = {"rows": typicality.rows}
    tensors |= {f"table.{name}": table for name, table in typicality.tables.items()}
    if typicality.sheet is not None:
        tensors |= {"sheet.centre": typicality.sheet.centre, "sheet.matrix": typicality.sheet.matrix}
    if typicality.inputs is not None:
        scatter = typicality.inputs.scatter
        tensors |= {"inputs.slope": typicality.inputs.slope}
        tensors |= {"inputs.centre": scatter.centre, "inputs.matrix": scatter.matrix}
    record = {"k": typicality.k, "names": typicality.names}
    solid = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    path.write_bytes(save(solid, metadata={"typicality": json.dumps(record, sort_keys=True)}))


def read_typicality(path: Path, name: str, table: VectorTable) -> Typicality:
    """Read what `write_typicality` wrote for this table. Raises IndexFileError, by `name`, for anything else."""
    try:
        with safe_open(path, framework="numpy") as file:
            record = json.loads((file.metadata() or {})["typicality"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        names, d = tuple(str(n) for n in record["names"]), table.dim
        shapes = {"sheet.centre": (d,), "sheet.matrix": (d, d)}
        shapes |= {"inputs.slope": (d, len(names)), "inputs.centre": (len(names),)}
        shapes |= {"inputs.matrix": (len(names), len(names))}
        for key, array in tensors.items():
            if key != "rows" and (array.dtype != np.float32 or array.shape != shapes.get(key, (array.size,))):
                raise ValueError(f"{key} is {array.dtype} {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{key} holds NaN or infinity")
        rows = tensors["rows"]
        slots = np.searchsorted(table.rows, rows)
        if rows.ndim != 1 or rows.dtype != np.int64 or not np.array_equal(table.rows[slots % len(table)], rows):
            raise ValueError("rows that have no such vector")
        k = int(record["k"])
        if not 1 <= k <= len(rows):
            raise ValueError(f"k is {k} for {len(rows)} reference objects")
        tables = {key.removeprefix("table."): value for key, value in tensors.items() if key.startswith("table.")}
        if any(np.any(np.diff(value) < 0) for value in tables.values()):
            raise ValueError("a table does not ascend")
        sheet = inputs = None
        if "sheet.matrix" in tensors:
            sheet = Whitening(tensors["sheet.centre"], tensors["sheet.matrix"])
        if names:
            scatter = Whitening(tensors["inputs.centre"], tensors["inputs.matrix"])
            inputs = Expectation(names, tensors["inputs.slope"], scatter)
        wanted = {"distance"} | ({"residual"} if sheet else set()) | ({"input", "ood"} if inputs else set())
        if set(tables) != wanted:
            raise ValueError(f"tables {sorted(tables)}, wanted {sorted(wanted)}")
        return Typicality(k, table.take(slots), rows, sheet, inputs, tables)
    except (OSError, SafetensorError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        raise IndexFileError(
            f"index file {name} is not a calibration of trust as written ({error!r}); wanted one of `astroclip index "
            "build`; rebuild the index",
            field=name,
        ) from error
