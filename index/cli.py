"""`astroclip index build | append | verify | info | lists`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from index.head_build import WhenHeads

__all__ = ["register"]

Previews = Annotated[
    Path | None, typer.Option(help="Multimodal Universe HDF5 directory to take thumbnails and small spectra from.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not say what is being done.")]
Heads = Annotated[
    bool | None,
    typer.Option(
        "--heads/--no-heads", help="Fit heads (method head of estimates); default: properties with 1,000 labels."
    ),
]
_HNSW = {"auto": "auto", "always": "hnsw", "never": "none"}
IndexDir = Annotated[Path, typer.Argument(help="Index directory, or a root with CURRENT.")]


def register(app: typer.Typer) -> None:
    """Add the `index` group to the command line."""
    group = typer.Typer(help="Build, extend and inspect survey indexes.", no_args_is_help=True)
    for command in (build, append, verify, info, lists):
        group.command()(command)
    app.add_typer(group, name="index")


def build(
    embeddings: Annotated[Path, typer.Argument(help="Directory written by `astroclip embed`.")],
    out: Annotated[Path, typer.Option(help="Root of the index; gets versions/ and CURRENT.")],
    survey: Annotated[str, typer.Option(help="Name of the survey, shown in answers.")] = "survey",
    index_id: Annotated[str | None, typer.Option("--id", help="Short name in URLs; default from --survey.")] = None,
    previews: Previews = None,
    backend: Annotated[
        str, typer.Option(help="Approximate search: auto (hnsw from 100,000 vectors), hnsw, ivf-sq8, ivf-pq, none.")
    ] = "auto",
    hnsw: Annotated[
        str | None, typer.Option(help="The same by its older name: auto, always (hnsw), never (none).")
    ] = None,
    float32: Annotated[bool, typer.Option("--float32", help="Store float32 vectors instead of float16.")] = False,
    prop: Annotated[
        list[str] | None, typer.Option("--property", help="COLUMN=UNIT to estimate besides the standard ones.")
    ] = None,
    heads: Heads = None,
    licence: Annotated[str, typer.Option(help="Licence of the survey's data.")] = "",
    cite: Annotated[list[str] | None, typer.Option(help="Citation the survey asks for; repeatable.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Write OUT as one plain directory, to ship.")] = False,
    quiet: Quiet = False,
) -> None:
    """Build an index from embedding parts and publish it."""
    from index.build import BACKENDS, BuildOptions, build_index

    if hnsw is not None:
        if hnsw not in _HNSW:
            raise typer.BadParameter("wanted auto, always or never", param_hint="--hnsw")
        backend = _HNSW[hnsw]
    if backend not in BACKENDS:
        raise typer.BadParameter(f"wanted one of {', '.join(BACKENDS)}", param_hint="--backend")
    options = BuildOptions(
        backend=backend,  # type: ignore[arg-type]
        vector_dtype="float32" if float32 else "float16",
        properties=_properties(prop or []),
        heads=_when(heads),
        licence=licence,
        citations=tuple(cite or ()),
    )
    with _Steps(quiet) as steps:
        folder = build_index(
            embeddings,
            out,
            survey=survey,
            index_id=index_id,
            previews=previews,
            options=options,
            plain=plain,
            progress=steps.say,
        )
    _show(folder)


def append(
    root: Annotated[Path, typer.Argument(help="Root of the index to extend.")],
    embeddings: Annotated[Path, typer.Argument(help="Directory written by `astroclip embed`, same model.")],
    previews: Previews = None,
    heads: Heads = None,
    quiet: Quiet = False,
) -> None:
    """Publish a new version of an index that also holds new objects."""
    from index.build import append_index

    with _Steps(quiet) as steps:
        folder = append_index(root, embeddings, previews=previews, heads=_when(heads), progress=steps.say)
    _show(folder)


def verify(index: IndexDir, as_json: AsJson = False) -> None:
    """Check every file of an index, and lists beside it, against their records. Exit code 1 if any is damaged."""
    from astroclip.errors import IndexFileError
    from index.manifest import Manifest, check_files
    from index.store import SurveyIndex, resolve

    folder = resolve(index)
    manifest, sha256 = Manifest.read(folder)
    rows: list[dict[str, Any]] = []
    for name, entry in manifest.files.items():
        try:
            check_files(folder, manifest, [name])
            problem = None
        except IndexFileError as error:
            problem = error.message
        rows.append({"file": name, "bytes": entry.bytes, "problem": problem})
    rows += _list_rows(folder, sha256)
    good = all(row["problem"] is None for row in rows)
    if good:
        SurveyIndex.open(folder, verify=False)
    if as_json:
        print(
            json.dumps({"ok": good, "index_id": manifest.index_id, "manifest_sha256": sha256, "files": rows}, indent=2)
        )
    else:
        _print_files(manifest.index_id, rows)
    if not good:
        raise typer.Exit(1)


def info(index: IndexDir, as_json: AsJson = False) -> None:
    """Show what an index holds, without reading its vectors."""
    from index.manifest import Manifest
    from index.store import resolve

    folder = resolve(index)
    if as_json:
        Manifest.read(folder)
        print((folder / "manifest.json").read_text(), end="")
    else:
        _show(folder)


def lists(
    index: IndexDir,
    kinds: Annotated[
        str, typer.Option(help="Which lists, comma between: isolated, disagreeing, duplicates.")
    ] = "isolated,disagreeing,duplicates",
    limit: Annotated[int, typer.Option(help="Rows of each list.")] = 1000,
    threshold: Annotated[float, typer.Option(help="Cosine from which a pair is a near-duplicate.")] = 0.97,
    quiet: Quiet = False,
) -> None:
    """Compute the survey-wide lists of an index: isolated objects, disagreeing pairs, near-duplicates; resumes."""
    from rich.console import Console
    from rich.table import Table

    from index.lists_build import build_lists

    wanted = [kind.strip() for kind in kinds.split(",") if kind.strip()]
    with _Bars(quiet) as bars:
        made = build_lists(index, wanted, limit=limit, threshold=threshold, progress=bars.advance)
    table = Table("list", "rows", "of", "file", title="lists", title_justify="left")
    for kind, entry in made.entries.items():
        table.add_row(kind, f"{entry.rows:,}", f"{entry.found:,}", entry.file)
    Console().print(table)


def _show(folder: Path) -> None:
    """Tables of a manifest on standard output."""
    from rich.console import Console
    from rich.table import Table

    from index.manifest import Manifest

    manifest, sha256 = Manifest.read(folder)
    size = sum(entry.bytes for entry in manifest.files.values())
    table = Table(title=f"index {manifest.index_id}", show_header=False, title_justify="left")
    table.add_row("survey", manifest.survey)
    table.add_row("version", f"{manifest.version}, {manifest.created}")
    table.add_row("model", f"{manifest.model['id']}  {manifest.model['sha256'][:16]}")
    table.add_row("preprocessing", manifest.preprocess_version)
    counts = manifest.counts
    table.add_row("objects", f"{counts['objects']:,} ({counts['image']:,} images, {counts['spectrum']:,} spectra)")
    table.add_row("not embedded", f"{counts['skipped']:,}")
    table.add_row("vectors", f"{manifest.dim}-d {manifest.vector_dtype}")
    for modality in ("image", "spectrum"):
        table.add_row(f"search of {modality}", _search_line(manifest.backends.get(modality), counts[modality]))
    table.add_row("properties", ", ".join(f"{n} ({u})" if u else n for n, u in manifest.properties.items()) or "none")
    pairs = manifest.calibration.get("knn", {}).get("pairs", [])
    calibrated = f"calibrated on {max(pair['objects'] for pair in pairs):,} objects" if pairs else "not calibrated"
    table.add_row("k-NN intervals", calibrated)
    for modality, head in manifest.heads.items():
        table.add_row(f"head for {modality}", f"{head['objects']:,} objects: {', '.join(head['properties'])}")
    table.add_row("previews", "yes" if manifest.previews else "no")
    table.add_row("size", f"{size / 2**20:.1f} MiB in {len(manifest.files)} files")
    table.add_row("licence", manifest.licence or "not stated")
    for citation in manifest.citations:
        table.add_row("cite", citation)
    table.add_row("manifest", sha256)
    Console().print(table)


def _search_line(backends: dict[str, Any] | None, size: int) -> str:
    """How a table is searched: exact, or the least breadth and its recall@10 for each query modality."""
    if not backends:
        return "exact"
    from index.backends.faiss_file import FaissBackend
    from index.planner import MeasuredSearch, plan

    name, record = next(iter(backends.items()))
    measured = MeasuredSearch.from_record(record, size)
    parts = []
    for query in sorted({entry["query"] for entry in measured.recall}):
        chosen = plan(name, FaissBackend.can, measured, k=10, size=size, query_modality=query)
        found = f"breadth {chosen.breadth}, recall@10 {chosen.expected_recall:.4f}" if chosen.breadth else "exact"
        parts.append(f"from {query}: {found}")
    return f"{name}; {'; '.join(parts)}; filters exact up to {measured.exact_below:,} survivors"


def _list_rows(folder: Path, manifest_sha256: str) -> list[dict[str, Any]]:
    """The survey-wide lists beside an index, as rows of `verify`; stale ones are a problem of theirs as well."""
    from astroclip.errors import IndexFileError, ProvenanceError
    from index.lists import RECORD, Lists, lists_folder

    record = lists_folder(folder) / RECORD
    if not record.exists():
        return []
    row: dict[str, Any] = {"file": f"lists: {RECORD}", "bytes": record.stat().st_size, "problem": None}
    try:
        found = Lists.read(folder, manifest_sha256)
    except (IndexFileError, ProvenanceError) as error:
        return [{**row, "problem": error.message}]
    entries = found.entries.values()
    return [row, *({"file": f"lists: {e.file}", "bytes": e.bytes, "problem": None} for e in entries)]


def _print_files(index_id: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "bytes", "state", title=f"index {index_id}", title_justify="left")
    for row in rows:
        state = "[green]ok[/]" if row["problem"] is None else f"[red]{row['problem']}[/]"
        table.add_row(row["file"], f"{row['bytes']:,}", state)
    Console().print(table)


def _when(heads: bool | None) -> WhenHeads:
    return "auto" if heads is None else "always" if heads else "never"


def _properties(pairs: list[str]) -> dict[str, str]:
    out = {}
    for pair in pairs:
        name, equals, unit = pair.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{pair!r}: wanted COLUMN=UNIT", param_hint="--property")
        out[name] = unit
    return out


class _Steps:
    """A spinner on standard error that names the step in progress."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self._status = Console(stderr=True, quiet=quiet).status("starting")

    def __enter__(self) -> _Steps:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def say(self, step: str) -> None:
        self._status.update(step)


class _Bars:
    """A bar for each join on standard error: objects done, rate and time left."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=quiet)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done)
