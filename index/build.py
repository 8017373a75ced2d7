"""Building an index: embedding parts in, a published version out; appending is building onto an earlier version.

Memory: the catalogue (some 100 bytes an object) and one part at a time; vectors are streamed to disk. At a million
objects the graph takes minutes (`ANN_FROM`), so does the calibration of estimates (`index.knn_build`), the heads a
minute or two, everything else seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from astroclip.errors import InputError, ProvenanceError
from astroclip.types import MODALITIES
from index.backends import ANN
from index.calibrate import KTH, ScoreTable, kth_scores, sample_scores
from index.catalog import CATALOG, STANDARD_PROPERTIES
from index.head_build import WhenHeads, fit_heads
from index.knn_build import calibrate_knn
from index.manifest import MANIFEST, Manifest
from index.measured import Measured, join_measured
from index.parts import PartsInfo, read_info, read_parts
from index.previews import write_previews
from index.publish import KEEP, publish, publish_plain, staging
from index.recall import measure
from index.store import SurveyIndex
from index.trust_tables import calibrate_trust
from index.vectors import VectorTable, VectorWriter, load_npy

__all__ = ["ANN_FROM", "BACKENDS", "BuildOptions", "append_index", "build_index"]

ANN_FROM = 100_000  # vectors from which an approximate backend is worth its disk: below, exact search takes under 10 ms
BACKENDS = ("auto", *ANN, "none")
_KNOWN_UNITS = {
    **STANDARD_PROPERTIES,
    "dust_av": "mag",
    "half_light_radius_arcsec": "arcsec",
    "bulge_fraction": "",
    "velocity_dispersion": "km/s",
}
_SEED = 20240613

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """How an index is written.

    backend: one of `BACKENDS`. "auto" = a graph (hnsw) for tables of `ANN_FROM` vectors or more, and what the earlier
    version had when appending; a named one is built over every table large enough for it. hnsw: the older way to ask,
    "always" = hnsw, "never" = none; holds where `backend` is "auto". vector_dtype: "float16" or "float32".
    properties: {column: unit} to be estimated besides those whose units are known. heads: see `head_build.fit_heads`.
    seed: of all sampling and fitting.
    """

    backend: Literal["auto", "hnsw", "ivf-sq8", "ivf-pq", "none"] = "auto"
    hnsw: Literal["auto", "always", "never"] = "auto"
    vector_dtype: Literal["float16", "float32"] = "float16"
    properties: Mapping[str, str] | None = None
    heads: WhenHeads = "auto"
    licence: str = ""
    citations: tuple[str, ...] = ()
    seed: int = _SEED
    keep: int = KEEP


def build_index(
    parts_dir: str | Path,
    out: str | Path,
    *,
    survey: str,
    index_id: str | None = None,
    previews: str | Path | None = None,
    options: BuildOptions | None = None,
    plain: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Build an index from the parts of `astroclip embed` and publish it; returns the directory with the manifest.

    out: root that gets `versions/` and `CURRENT`; with `plain`, the index directory itself (to ship).
    previews: Multimodal Universe HDF5 directory to take thumbnails and small spectra from.
    Raises InputError for unusable parts and for object ids that come twice.
    """
    out, info = Path(out), read_info(parts_dir)
    writer = _Writer(info, options or BuildOptions(), progress or (lambda _: None))
    root = out.parent / f".{out.name}.building" if plain else out
    try:
        with staging(root) as folder:
            version = 1 if plain else _next_version(out)
            manifest = writer.write(
                folder, [Path(parts_dir)], None, _path(previews), survey, index_id or _slug(survey), version
            )
            if plain:
                return publish_plain(out, folder)
            return publish(out, folder, _version_name(manifest), writer.options.keep)
    finally:
        if plain:
            _remove_root(root)


def append_index(
    root: str | Path,
    parts_dir: str | Path,
    *,
    previews: str | Path | None = None,
    options: BuildOptions | None = None,
    heads: WhenHeads = "auto",
    progress: Progress | None = None,
) -> Path:
    """Publish a new version of the index `root` that also holds new parts; the old version is untouched.

    heads: fitted anew on all objects; ignored where `options` are given.

    Raises ProvenanceError if the parts come from another model or preprocessing, InputError if an object is already in
    the index.
    """
    root, info = Path(root), read_info(parts_dir)
    if not (root / "CURRENT").is_symlink():
        raise InputError(
            f"{root} is a plain index directory; wanted a root with versions/ and CURRENT; build one with "
            "`astroclip index build` and append to that",
            code="plain_index",
        )
    with staging(root) as folder:
        base = SurveyIndex.open(root)
        _check_provenance(base, info)
        old = base.manifest
        settings = options or BuildOptions(
            vector_dtype="float16" if old.vector_dtype == "float16" else "float32",
            properties=old.properties,
            heads=heads,
            licence=old.licence,
            citations=old.citations,
        )
        writer = _Writer(info, settings, progress or (lambda _: None))
        manifest = writer.write(
            folder, [Path(parts_dir)], base, _path(previews), old.survey, old.index_id, _next_version(root)
        )
        return publish(root, folder, _version_name(manifest), settings.keep)


class _Writer:
    """Writes one version into a staging directory."""

    def __init__(self, info: PartsInfo, options: BuildOptions, progress: Progress) -> None:
        self.info, self.options, self._say = info, options, progress
        self._rng = np.random.default_rng(options.seed)

    def write(
        self,
        folder: Path,
        parts: Sequence[Path],
        base: SurveyIndex | None,
        previews: Path | None,
        survey: str,
        index_id: str,
        version: int,
    ) -> Manifest:
        catalog, measured, skipped = self._vectors_and_catalog(folder, parts, base)
        _check_unique(catalog, 0 if base is None else len(base))
        record, catalog = self._previews(folder, catalog, base, previews)
        pq.write_table(catalog, folder / CATALOG, compression="zstd")
        tables: dict[str, VectorTable] = {m: self._table(folder, m, catalog) for m in MODALITIES}
        properties = self._properties(catalog)
        manifest = Manifest(
            index_id=index_id,
            survey=survey,
            version=version,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model={"id": self.info.model_id, "sha256": self.info.model_sha256},
            preprocess_version=self.info.preprocess_version,
            dim=self.info.dim,
            vector_dtype=self.options.vector_dtype,
            counts={"objects": catalog.num_rows, **{m: len(t) for m, t in tables.items()}, "skipped": skipped},
            backends=self._graphs(folder, tables, base),
            properties=properties,
            calibration=self._calibration(folder, tables, measured, catalog, properties),
            previews=record,
            heads=self._heads(folder, tables, catalog, properties),
            licence=self.options.licence,
            citations=tuple(self.options.citations),
            sources=(() if base is None else base.manifest.sources) + tuple(path.name for path in parts),
        )
        self._say("checksums")
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        manifest = manifest.with_files(folder, names)
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
        return manifest

    def _vectors_and_catalog(
        self, folder: Path, parts: Sequence[Path], base: SurveyIndex | None
    ) -> tuple[pa.Table, dict[str, Measured], int]:
        catalogs: list[pa.Table] = [] if base is None else [base.catalog.table]
        measured: dict[str, list[Measured]] = {m: [] if base is None else [base.trust.measured[m]] for m in MODALITIES}
        skipped = 0 if base is None else base.manifest.counts["skipped"]
        with ExitStack() as stack:
            writers = {
                m: stack.enter_context(
                    VectorWriter(folder / f"vectors-{m}.npy", self.info.dim, self.options.vector_dtype)
                )
                for m in MODALITIES
            }
            if base is not None:
                for m, writer in writers.items():
                    stored = _stored(base.folder, m, len(base.tables[m]), self.info.dim, base.manifest.vector_dtype)
                    for start in range(0, len(stored), 65_536):
                        writer.append(stored[start : start + 65_536])
            for path in parts:
                for part in read_parts(path, self.info):
                    self._say(f"reading {part.name}")
                    catalogs.append(part.catalog)
                    skipped += part.skipped
                    for m, writer in writers.items():
                        writer.append(part.vectors[m])
                        measured[m].append(part.measured[m])
        try:
            catalog = pa.concat_tables(catalogs, promote_options="permissive").combine_chunks()
        except pa.ArrowException as error:
            raise InputError(
                f"the parts' columns do not fit together ({error}); wanted one type a column name; embed them apart",
                code="bad_parts",
            ) from error
        if not catalog.num_rows:
            raise InputError("no row of the parts has an embedding; nothing to index", code="empty_index")
        return catalog, {m: join_measured(found) for m, found in measured.items()}, skipped

    def _previews(
        self, folder: Path, catalog: pa.Table, base: SurveyIndex | None, survey: Path | None
    ) -> tuple[dict[str, Any] | None, pa.Table]:
        old = None if base is None else base.previews
        record, picture, spectrum = None, np.zeros(catalog.num_rows, bool), np.zeros(catalog.num_rows, bool)
        if survey is not None or old is not None:
            self._say("previews")
            record, picture, spectrum = write_previews(folder, survey, catalog.column("object_id"), base=old)
        for name, flags in (("preview_image", picture), ("preview_spectrum", spectrum)):
            if name in catalog.column_names:
                catalog = catalog.drop_columns([name])
            catalog = catalog.append_column(name, pa.array(flags))
        return record, catalog

    def _table(self, folder: Path, modality: str, catalog: pa.Table) -> VectorTable:
        rows = np.flatnonzero(catalog.column(f"has_{modality}").to_numpy())
        return VectorTable(_stored(folder, modality, len(rows), self.info.dim, self.options.vector_dtype), rows)

    def _graphs(
        self, folder: Path, tables: Mapping[str, VectorTable], base: SurveyIndex | None
    ) -> dict[str, dict[str, Any]]:
        out: dict[str, dict[str, Any]] = {}
        for target, table in tables.items():
            earlier = None if base is None else base.graph(target)
            name: str = self.options.backend
            if name == "auto":
                name = {"auto": "auto", "always": "hnsw", "never": "none"}[self.options.hnsw]
            if name == "auto":
                name = earlier.name if earlier else "hnsw" if len(table) >= ANN_FROM else "none"
            if name == "none" or len(table) < ANN[name].least:
                continue
            self._say(f"{target} {name}")
            onto = earlier if earlier is not None and earlier.name == name and earlier.can.append else None
            built = ANN[name].build(table, onto=onto)
            built.write(folder / f"{target}.faiss")
            self._say(f"{target} recall")
            out[target] = {name: {**built.settings, **measure(built, table, tables, self._rng)}}
        return out

    def _calibration(
        self,
        folder: Path,
        tables: Mapping[str, VectorTable],
        measured: Mapping[str, Measured],
        catalog: pa.Table,
        properties: Mapping[str, str],
    ) -> dict[str, Any]:
        self._say("calibration")
        (folder / "calibration").mkdir()
        scores, kth = [], {}
        percentiles: dict[tuple[str, str], ScoreTable] = {}
        for query in MODALITIES:
            for target in MODALITIES:
                table = sample_scores(tables[query], tables[target], self._rng)
                if table is not None:
                    name = f"calibration/scores-{query}-{target}.npy"
                    np.save(folder / name, table.to_array())
                    scores.append({"query": query, "target": target, "file": name})
                    percentiles[query, target] = table
            alone = kth_scores(tables[query], self._rng)
            if len(alone):
                kth[query] = f"calibration/kth-{query}.npy"
                np.save(folder / kth[query], alone)
        seed = self.options.seed
        trust = calibrate_trust(folder, tables, measured, seed)
        knn = calibrate_knn(folder, tables, catalog, properties, percentiles, seed=seed, say=self._say)
        return {"scores": scores, "kth": {"k": KTH, "files": kth}, "seed": seed, **trust, **knn}

    def _heads(
        self, folder: Path, tables: Mapping[str, VectorTable], catalog: pa.Table, properties: Mapping[str, str]
    ) -> dict[str, Any]:
        options = self.options
        return fit_heads(folder, tables, catalog, properties, when=options.heads, seed=options.seed, say=self._say)

    def _properties(self, catalog: pa.Table) -> dict[str, str]:
        """Columns to estimate, the standard ones first; all must be numeric."""
        known = {**_KNOWN_UNITS, **(self.options.properties or {})}
        for name in self.options.properties or {}:
            if name not in catalog.column_names:
                raise InputError(
                    f"property {name!r} is no column of the parts; wanted one of {', '.join(catalog.column_names)}",
                    code="unknown_property",
                    field=name,
                )
        return {name: unit for name, unit in known.items() if name in catalog.column_names and _numeric(catalog, name)}


def _stored(folder: Path, modality: str, count: int, dim: int, dtype: str) -> npt.NDArray[Any]:
    """The vectors of one modality as they lie on disk, memory-mapped."""
    name = f"vectors-{modality}.npy"
    return load_npy(folder / name, name, shape=(count, dim), dtype=dtype)


def _numeric(catalog: pa.Table, name: str) -> bool:
    kind = catalog.schema.field(name).type
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _check_provenance(base: SurveyIndex, info: PartsInfo) -> None:
    found = (info.model_sha256, info.preprocess_version, info.dim)
    wanted = (base.model_sha256, base.preprocess_version, base.dim)
    if found != wanted:
        raise ProvenanceError(
            f"the parts come from model {info.model_id} ({found[0][:12]}, preprocessing {found[1]}, {found[2]}-d); the "
            f"index holds model {base.manifest.model['id']} ({wanted[0][:12]}, preprocessing {wanted[1]}, "
            f"{wanted[2]}-d); embed them with the index's model or build a new index"
        )


def _check_unique(catalog: pa.Table, old: int) -> None:
    """Refuse object ids that are null or come twice; `old` rows belong to the index appended to."""
    ids = catalog.column("object_id")
    if ids.null_count:
        raise InputError(f"{ids.null_count} rows have neither object_id nor source; name them", code="bad_parts")
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if not len(twice):
        return
    names = ", ".join(twice.slice(0, 3).to_pylist())
    if old and pc.any(pc.is_in(ids.slice(0, old), value_set=twice)).as_py():
        raise InputError(
            f"{len(twice)} object ids are already in the index (such as {names}); wanted new objects only; leave them "
            "out, or build a new index",
            code="duplicate_object_id",
            field="object_id",
        )
    raise InputError(
        f"{len(twice)} object ids come more than once in the parts (such as {names}); wanted one row an object; give "
        "an object's image and spectrum to one embedding job, or rename",
        code="duplicate_object_id",
        field="object_id",
    )


def _next_version(root: Path) -> int:
    """One more than the highest version present, whether or not it was ever made current."""
    names = [re.fullmatch(r"v(\d+)", path.name) for path in (root / "versions").glob("v*")]
    return 1 + max((int(name[1]) for name in names if name), default=0)


def _version_name(manifest: Manifest) -> str:
    return f"v{manifest.version:06d}"


def _slug(survey: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", survey.lower()).strip("-") or "survey"


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _remove_root(root: Path) -> None:
    """Take away the scratch root of a plain build (its lock and empty versions/)."""
    (root / ".lock").unlink(missing_ok=True)
    for folder in (root / "versions", root):
        if folder.is_dir():
            folder.rmdir()
