"""`astroclip train spectrum|image|align` and `astroclip evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from astroclip.errors import InputError

__all__ = ["register"]

Config = Annotated[Path | None, typer.Option("--config", help="TOML file with the stage's settings.", exists=True)]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of Multimodal Universe shards, or AstroCLIP's file.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder: checkpoints, curves, weights.")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1)]
Minutes = Annotated[float | None, typer.Option("--max-minutes", help="Stop after this long; run again to resume.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Two steps, a validation and the export, then stop.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="With --dry-run: test widths and random encoders, on any machine.")]
Describe = Annotated[bool, typer.Option("--describe", help="Say what the run would be and cost, and train nothing.")]


def register(app: typer.Typer) -> None:
    """Add the training and evaluation commands to the root application."""
    train = typer.Typer(no_args_is_help=True, help="Train the towers (pretraining) and align them.")
    app.add_typer(train, name="train")

    @train.command()
    def spectrum(
        config: Config = None,
        data: Data = None,
        out: Out = None,
        epochs: Epochs = None,
        max_minutes: Minutes = None,
        progress: Progress = True,
        dry_run: DryRun = False,
        tiny: Tiny = False,
        describe: Describe = False,
    ) -> None:
        """Masked-spectrum pretraining of the spectrum tower."""
        overrides = _overrides(data, out, epochs, max_minutes)
        typer.echo(_run("spectrum", config, overrides, progress, dry_run=dry_run, tiny=tiny, describe=describe))

    @train.command()
    def image(
        config: Config = None,
        data: Data = None,
        out: Out = None,
        epochs: Epochs = None,
        max_minutes: Minutes = None,
        progress: Progress = True,
        dry_run: DryRun = False,
        tiny: Tiny = False,
        describe: Describe = False,
    ) -> None:
        """Self-supervised (MoCo v2) pretraining of the image tower."""
        overrides = _overrides(data, out, epochs, max_minutes)
        typer.echo(_run("image", config, overrides, progress, dry_run=dry_run, tiny=tiny, describe=describe))

    @train.command()
    def align(
        config: Config = None,
        data: Data = None,
        out: Out = None,
        epochs: Epochs = None,
        max_minutes: Minutes = None,
        progress: Progress = True,
        dry_run: DryRun = False,
        tiny: Tiny = False,
        describe: Describe = False,
    ) -> None:
        """InfoNCE alignment of the two towers; writes a model directory."""
        overrides = _overrides(data, out, epochs, max_minutes)
        typer.echo(_run("align", config, overrides, progress, dry_run=dry_run, tiny=tiny, describe=describe))

    from training.benchmark.cli import register as register_benchmark
    from training.evaluate.cli import register as register_evaluate

    register_evaluate(app)
    register_benchmark(app)


def _run(
    stage: str,
    config: Path | None,
    overrides: dict[str, Any],
    progress: bool,
    *,
    dry_run: bool,
    tiny: bool,
    describe: bool,
) -> str:
    from training import rehearsal
    from training.recipes import read_recipe

    if tiny and not dry_run:
        raise InputError("found --tiny alone; wanted it with --dry-run; add that", code="bad_option", field="tiny")
    settings, train = read_recipe(stage, config, **overrides)
    if describe:
        return rehearsal.as_text(rehearsal.describe(settings))
    if dry_run:
        return rehearsal.as_text(rehearsal.rehearse(settings, train, tiny, progress))
    return str(train(settings, progress))


def _overrides(data: Path | None, out: Path | None, epochs: int | None, max_minutes: float | None) -> dict[str, Any]:
    return {
        "data": str(data) if data else None,
        "out": str(out) if out else None,
        "epochs": epochs,
        "max_minutes": max_minutes,
    }
