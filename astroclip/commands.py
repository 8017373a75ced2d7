"""`astroclip embed` and `astroclip weights`: the library's own sub-commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from astroclip.errors import InputError

__all__ = ["register"]

DEMO_MODEL = Path(__file__).resolve().parents[1] / "service" / "demo" / "model"  # a checkout has it, the wheel has not


def register(app: typer.Typer) -> None:
    """Add `embed` and `weights` to the command line."""
    app.command()(embed)
    weights = typer.Typer(no_args_is_help=True, help="Published checkpoints as model directories.")
    weights.command("import")(import_files)
    app.add_typer(weights, name="weights")


def embed(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders, Multimodal Universe HDF5 / Parquet, or catalogues with columns `image`, `spectrum`.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the parts; run again with the same one to resume.")],
    model: Annotated[
        Path | None, typer.Option(help="Model directory; default: the demo model.", envvar="ASTROCLIP_MODEL_DIR")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Objects in one pass of the model.")] = 64,
    part_rows: Annotated[int, typer.Option(min=1, help="Rows of one part, about.")] = 2_000,
    workers: Annotated[int, typer.Option(min=1, help="Readers ahead of the model (processes in large jobs).")] = min(
        4, os.cpu_count() or 1
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many rows.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Redo parts that hold rows with errors.")
    ] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
) -> None:
    """Embed a catalogue of images and spectra into Parquet parts; resumes where it was stopped."""
    from astroclip.batch import embed_catalog
    from astroclip.embed import Embedder

    embedder = Embedder.from_pretrained(_model(model), device=device, dtype=dtype, batch_size=batch_size)
    _say(f"Model {embedder.model_id} ({embedder.model_sha256[:12]}) on {embedder.device}: {embedder.dtype_reason}.")
    with _bar(no_progress) as advance:
        report = embed_catalog(
            inputs,
            out,
            embedder,
            limit=limit,
            part_rows=part_rows,
            workers=workers,
            retry_failed=retry_failed,
            advance=advance,
        )
    for name in report.skipped_files[:5]:
        _say(f"Left out {name}: a table that is no spectrum. Name it as INPUT if it is a catalogue of files.")
    resumed = f", {report.parts_skipped} of them from before" if report.parts_skipped else ""
    _say(f"{report.rows:,} rows in {report.parts} parts{resumed}; {report.failed:,} with errors -> {out}")
    if report.rows and report.failed == report.rows:
        raise typer.Exit(1)


def import_files(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Published checkpoints (.ckpt, .pth).")],
    out: Annotated[Path, typer.Option(help="New model directory; of several files, the folder for them.")],
    kind: Annotated[
        str, typer.Option(help="auto, astroclip-v2, astroclip-v1, specformer, astrodino or stein-moco.")
    ] = "auto",
    switch: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A switch, e.g. spectrum.last_slice=true.")
    ] = None,
    image_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of the image backbone.")] = None,
    spectrum_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of the spectrum backbone.")] = None,
    projection_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of the projection.")] = None,
) -> None:
    """Read published checkpoints, without executing anything in them, into safetensors model directories."""
    from astroclip.weights import Heads, import_weights

    pairs = [text.partition("=") for text in switch or []]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise InputError(f"--set {wrong[0]!r} has no '='; wanted NAME=VALUE.", code="bad_switch", field="set")
    settings = {name: value for name, _, value in pairs}
    heads = Heads(image_heads, spectrum_heads, projection_heads)
    for file in files:
        target = out / file.stem if len(files) > 1 else out
        made = import_weights(file, target, kind=kind, heads=heads, settings=settings)
        _say(f"{file.name}: {made.kind} -> {made.path}")
        for note in made.notes:
            _say(f"  {note}")


def _model(model: Path | None) -> Path:
    if model is not None:
        return model
    if DEMO_MODEL.is_dir():
        return DEMO_MODEL
    raise InputError(
        "Found no model; wanted --model DIR or ASTROCLIP_MODEL_DIR. The demo model comes with a checkout, not with the "
        "installed library.",
        code="no_model",
        field="model",
    )


@contextmanager
def _bar(hidden: bool) -> Iterator[Callable[[int, int, int], None] | None]:
    """A progress bar with rate and time left, on standard error."""
    if hidden:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("embedding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("embed", total=None, rate="")

        def advance(_: int, done: int, total: int) -> None:
            speed = progress.tasks[0].speed
            progress.update(task, completed=done, total=total, rate=f"{speed:,.0f} rows/s" if speed else "")

        yield advance


def _say(text: str) -> None:
    print(text, file=sys.stderr)
