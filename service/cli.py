"""Commands of the service: `demo`, `serve`, `search`, `estimate`, `lists`, and `keys` (of `service.key_commands`).

`search` and `estimate` speak to a running service (--url) or, without one, run the same application in this process
over an index (--index, by default the demo's): the answers are the same, since the code is.
"""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from astroclip.errors import InputError
from service import key_commands

if TYPE_CHECKING:
    from astropy.table import Table
    from fastapi import FastAPI

    from service.settings import Settings

__all__ = ["register"]


class Target(StrEnum):
    image = "image"
    spectrum = "spectrum"
    either = "either"


class Method(StrEnum):
    knn = "knn"
    head = "head"


class Order(StrEnum):
    most_similar = "most_similar"
    least_similar = "least_similar"


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"
    votable = "votable"


IndexOption = Annotated[Path | None, typer.Option("--index", help="Index directory; default: the demo index.")]
ModelOption = Annotated[
    Path | None, typer.Option("--model", help="Model directory the index was built with; default: the demo model.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Torch device; auto takes a GPU when there is one.")]
ImageOption = Annotated[Path | None, typer.Option("--image", help="Image file: FITS cutout, PNG, JPEG, .npy.")]
SpectrumOption = Annotated[Path | None, typer.Option("--spectrum", help="Spectrum file: DESI, SDSS, table FITS, CSV.")]
IdOption = Annotated[str | None, typer.Option("--id", help="An object of the index.")]
RadecOption = Annotated[
    str | None, typer.Option("--radec", help='Position: "188.7 -0.2" (degrees) or "12:34:56 -00:12:34".')
]
RadiusOption = Annotated[float | None, typer.Option("--radius-arcsec", help="Search radius about --radec.")]
TargetOption = Annotated[Target | None, typer.Option("--target", help="Embeddings to search.")]
KOption = Annotated[int | None, typer.Option("-k", help="Neighbours wanted.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="A running service; without it, search in process.")]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="ASTROCLIP_API_KEY",
        help="With --url: the service's API key. Better in the environment: everybody on the machine sees a command's "
        "options.",
    ),
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print the answer.")]
FilterOption = Annotated[
    str | None, typer.Option("--filter", help='JSON, e.g. {"column": "redshift", "range": [0.1, 0.3]}.')
]
ExcludeOption = Annotated[
    float | None, typer.Option("--exclude-arcsec", help="Leave out hits this near to the query's position.")
]
QueryOption = Annotated[
    str | None,
    typer.Option("--query", help='Any query of the interface as JSON, e.g. {"combine": {"positive": [..]}}.'),
]
ThresholdOption = Annotated[float | None, typer.Option("--score-threshold", help="Leave out hits with smaller scores.")]
OrderOption = Annotated[Order | None, typer.Option("--order", help="From which end of the ranking.")]
FuseOption = Annotated[
    str | None,
    typer.Option("--fuse", help='Weights where image and spectrum are one object, e.g. {"image": 2, "spectrum": 1}.'),
]
ColumnsOption = Annotated[str | None, typer.Option("--columns", help="Catalogue columns to show, comma between.")]
PropertiesOption = Annotated[
    str | None, typer.Option("--properties", help="Properties to estimate, comma between; default: all standard ones.")
]
MethodOption = Annotated[
    Method | None, typer.Option("--method", help="knn (from the neighbours) or head (by the index's networks).")
]
DensityOption = Annotated[
    int | None, typer.Option("--density", help="With --format json: bins of a probability density.")
]
ExplainOption = Annotated[
    Path | None,
    typer.Option("--explain", help="SVG file for what in the upload made the top hit match; one a modality."),
]
CoverageOption = Annotated[float | None, typer.Option("--coverage", help="Probability of the interval, e.g. 0.68.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the `astroclip` command."""
    app.command("demo")(demo)
    app.command("serve")(serve)
    app.command("search")(search)
    app.command("estimate")(estimate)
    app.command("lists")(lists)
    key_commands.register(app)


# --- serving ---------------------------------------------------------------------------------------------------------


def demo(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    device: DeviceOption = "auto",
) -> None:
    """Serve the demo index and its page."""
    from service.settings import DEMO_INDEX, DEMO_MODEL, Settings

    settings = Settings(index_dir=DEMO_INDEX, model_dir=DEMO_MODEL, host=host, port=port, device=device)
    app = _load(settings, to_serve=True)
    engine = app.state.engine
    what = f"{len(engine.index):,} simulated galaxies, model {engine.embedder.model_id} on {engine.embedder.device}."
    del engine  # the application alone keeps it, as its index may be replaced
    _run(settings, app, what)


def serve(
    index: IndexOption = None,
    model: ModelOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (ASTROCLIP_HOST; 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (ASTROCLIP_PORT; 8000).")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device (ASTROCLIP_DEVICE; auto).")] = None,
) -> None:
    """Serve an index. Every setting can also be given in the environment as ASTROCLIP_<NAME>."""
    settings = _settings(index, model, host=host, port=port, device=device)
    app = _load(settings, to_serve=True)
    engine = app.state.engine
    what = f"{engine.index.manifest.survey}: {len(engine.index):,} objects, model {engine.embedder.model_id}."
    del engine  # the application alone keeps it, as its index may be replaced
    _run(settings, app, what)


def _settings(index: Path | None, model: Path | None, **others: Any) -> Settings:
    from service.settings import Settings

    given = {"index_dir": index, "model_dir": model, **others}
    return Settings(**{name: value for name, value in given.items() if value is not None})


def _load(settings: Settings, *, to_serve: bool = False) -> FastAPI:
    """The application, its engine loaded before the server starts: what cannot be served ends with a message and exit
    code 2. Nobody else keeps the engine, whose index may be replaced and is to be freed then. to_serve: for long, and
    not to answer once."""
    from service.app import make_app
    from service.engine import Engine

    _quiet_loading()
    if to_serve and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it can be heard: unheard it would end the process
    return make_app(settings, Engine.load(settings, apart=to_serve and settings.model_process))


def _quiet_loading() -> None:
    """No progress bar for a model that loads in a second."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _run(settings: Settings, app: FastAPI, what: str) -> None:
    from service import logs
    from service.life import serve as serve_until_told

    logs.configure(settings)

    base = f"http://{'127.0.0.1' if settings.host in ('0.0.0.0', '::') else settings.host}:{settings.port}"
    if not logs.is_json(settings):  # else a machine reads
        _say(f"{what}\nPage:  {base}/\nDocs:  {base}/docs\nTry:   curl -s '{base}/v1/objects?random=1'")
        _say(f"       curl -s --data-binary @spectrum.fits '{base}/v1/estimate?modality=spectrum'")
    code = serve_until_told(app, settings, lambda: app.state.engine.close())
    if code:
        raise typer.Exit(code)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- asking ----------------------------------------------------------------------------------------------------------


def search(
    image: ImageOption = None,
    spectrum: SpectrumOption = None,
    object_id: IdOption = None,
    radec: RadecOption = None,
    radius_arcsec: RadiusOption = None,
    target: TargetOption = None,
    k: KOption = None,
    filter: FilterOption = None,
    exclude_arcsec: ExcludeOption = None,
    columns: ColumnsOption = None,
    query: QueryOption = None,
    score_threshold: ThresholdOption = None,
    order: OrderOption = None,
    fuse: FuseOption = None,
    explain: ExplainOption = None,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    url: UrlOption = None,
    api_key: KeyOption = None,
    format: FormatOption = Format.table,
) -> None:
    """Find the objects most similar to an image, a spectrum, an object of the index or what lies at a position."""
    asked = _asked(image, spectrum, object_id, radec, radius_arcsec, target, k, filter, exclude_arcsec, columns)
    asked |= {"query": _json(query, "query"), "fuse": _json(fuse, "fuse"), "score_threshold": score_threshold}
    asked |= {"order": order.value if order else None}
    _ask(
        "search",
        _explained(asked, explain),
        _remote(url, api_key),
        _settings(index, model, device=device),
        format,
        explain,
    )


def estimate(
    image: ImageOption = None,
    spectrum: SpectrumOption = None,
    object_id: IdOption = None,
    radec: RadecOption = None,
    radius_arcsec: RadiusOption = None,
    target: TargetOption = None,
    k: KOption = None,
    filter: FilterOption = None,
    exclude_arcsec: ExcludeOption = None,
    columns: ColumnsOption = None,
    query: QueryOption = None,
    score_threshold: ThresholdOption = None,
    fuse: FuseOption = None,
    properties: PropertiesOption = None,
    coverage: CoverageOption = None,
    method: MethodOption = None,
    density: DensityOption = None,
    explain: ExplainOption = None,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    url: UrlOption = None,
    api_key: KeyOption = None,
    format: FormatOption = Format.table,
) -> None:
    """Estimate redshift and other properties, with intervals, from the nearest neighbours or by a head."""
    asked = _asked(image, spectrum, object_id, radec, radius_arcsec, target, k, filter, exclude_arcsec, columns)
    asked |= {"properties": _names(properties), "coverage": coverage, "density": density}
    asked |= {"query": _json(query, "query"), "fuse": _json(fuse, "fuse"), "score_threshold": score_threshold}
    asked |= {"method": method.value if method else None}
    _ask(
        "estimate",
        _explained(asked, explain),
        _remote(url, api_key),
        _settings(index, model, device=device),
        format,
        explain,
    )


def lists(
    kind: Annotated[str, typer.Argument(help="isolated, disagreeing or duplicates.")],
    modality: Annotated[str | None, typer.Option(help="image or spectrum; of isolated and duplicates.")] = None,
    offset: Annotated[int, typer.Option(min=0, help="Rows to pass over.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Rows wanted.")] = 20,
    index: IndexOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    url: UrlOption = None,
    api_key: KeyOption = None,
    format: FormatOption = Format.table,
) -> None:
    """Show a survey-wide list that `astroclip index lists` computed."""
    from astroclip.client import calls

    call = calls.one_list(kind, modality, offset, limit)
    _answer(call, _remote(url, api_key), _settings(index, model, device=device), format)


@dataclass(frozen=True)
class Remote:
    """A running service, and the key for it."""

    url: str
    api_key: str | None = field(repr=False)


def _remote(url: str | None, api_key: str | None) -> Remote | None:
    return Remote(url, api_key) if url is not None else None


def _explained(asked: dict[str, Any], explain: Path | None) -> dict[str, Any]:
    if explain is not None and explain.suffix.lower() != ".svg":
        raise InputError(
            f"--explain is {explain.name!r}; wanted a file name ending in .svg. --format json has the numbers.",
            code="invalid_value",
            field="explain",
        )
    return asked | {"explain": True if explain else None}


def _asked(
    image: Path | None,
    spectrum: Path | None,
    object_id: str | None,
    radec: str | None,
    radius_arcsec: float | None,
    target: Target | None,
    k: int | None,
    filter: str | None,
    exclude_arcsec: float | None,
    columns: str | None,
) -> dict[str, Any]:
    """The client's arguments. Raises InputError."""
    return {
        "image": image,
        "spectrum": spectrum,
        "object_id": object_id,
        "position": radec,
        "radius_arcsec": radius_arcsec,
        "target": target.value if target else None,
        "k": k,
        "filter": _json(filter, "filter"),
        "exclude_arcsec": exclude_arcsec,
        "columns": _names(columns),
    }


def _json(text: str | None, option: str) -> Any:
    """An option's JSON. Raises InputError."""
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--{option} is not JSON ({error}).", code="bad_json", field=option) from None


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def _ask(
    command: str, asked: dict[str, Any], remote: Remote | None, settings: Settings, fmt: Format, plot: Path | None
) -> None:
    from astroclip.client import calls

    meta = _answer((calls.search if command == "search" else calls.estimate)(**asked), remote, settings, fmt)
    if plot is not None:
        _write_plots(meta["explanation"], plot)


def _write_plots(explanation: dict[str, Any], path: Path) -> None:
    """One SVG a modality; where there are two, their names say which is which."""
    for modality, found in explanation.items():
        target = path if len(explanation) == 1 else path.with_stem(f"{path.stem}-{modality}")
        target.write_bytes(base64.b64decode(found["plot"].partition(",")[2]))
        _say(f"{modality}: cosine {found['score']:.3f} with {found['against']['object_id']} -> {target}")


def _answer(call: Any, remote: Remote | None, settings: Settings, fmt: Format) -> dict[str, Any]:
    """Send, print as wished; returns what the answer says beside its rows."""
    from dataclasses import replace

    from astroclip.client.results import plain

    if fmt is Format.json:
        answer = asyncio.run(_send(replace(call, read=plain), remote, settings))
        print(json.dumps(answer, indent=1))
        return dict(answer)
    table = asyncio.run(_send(call, remote, settings))
    meta = dict(table.meta)
    if fmt is Format.table:
        _print(table)
    else:
        table.meta = {}  # nested provenance has no place in CSV; --format json shows it
        table.write(sys.stdout.buffer if fmt is Format.votable else sys.stdout, format=_ASTROPY[fmt])
    return meta


_ASTROPY = {Format.csv: "ascii.csv", Format.votable: "votable"}


async def _send(call: Any, remote: Remote | None, settings: Settings) -> Any:
    """Send to a running service, or to the application in this process."""
    from astroclip.client import AsyncClient

    if remote is not None:
        async with AsyncClient(remote.url, api_key=remote.api_key) as client:
            return await client.send(call)
    import httpx2

    app = _load(settings.model_copy(update={"keys_file": None}))  # who can read the files needs no key to them
    try:
        transport = httpx2.ASGITransport(app)
        async with AsyncClient("http://in-process", transport=transport) as client:
            return await client.send(call)
    finally:
        app.state.engine.close()


def _print(table: Table) -> None:
    """The table, what to think of it, and where it comes from."""
    import rich.table
    from rich.box import SIMPLE_HEAD
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    shown = rich.table.Table(header_style="bold", box=SIMPLE_HEAD)
    for name in table.colnames:
        shown.add_column(name, justify="right" if table[name].dtype.kind in "fiu" else "left", no_wrap=True)
    for row in table:
        shown.add_row(*[_cell(row[name]) for name in table.colnames])
    console.print(shown)
    trust = table.meta.get("trust", {})
    for flag in trust.get("flags", []):
        console.print(f"[yellow]note[/yellow] {flag['message']}", highlight=False)
    p = trust.get("ood_p")
    if p is not None:
        console.print(f"{100 * p:.2g} % of objects like the survey's own are as unusual.", highlight=False)
    p = trust.get("disagreement_p")
    if p is not None:
        console.print(f"{100 * p:.2g} % of its pairs of image and spectrum fit together as badly.", highlight=False)
    meta = table.meta
    if "search" in meta:
        how = f"{meta['search']['mode']} search of {meta['search']['candidates']:,} vectors"
        model, index = meta["model"], meta["index"]
        console.print(
            f"[dim]{how}; index {index['id']} {index['manifest_sha256'][:12]}, model {model['id']} "
            f"{model['sha256'][:12]}[/dim]",
            highlight=False,
        )


def _cell(value: Any) -> str:
    with suppress(AttributeError):
        if value.mask:
            return ""
    return f"{value:.5g}" if isinstance(value, float) or getattr(value, "dtype", None) == "float64" else str(value)
