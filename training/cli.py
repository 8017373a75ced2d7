"""`astroclip train spectrum|image|align` and `astroclip evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["register"]

Config = Annotated[Path | None, typer.Option("--config", help="TOML file with the stage's settings.", exists=True)]
Data = Annotated[Path | None, typer.Option("--data", help="Survey folder (Multimodal Universe HDF5).")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder: checkpoints, curves, weights.")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1)]
Minutes = Annotated[float | None, typer.Option("--max-minutes", help="Stop after this long; run again to resume.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress")]


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
    ) -> None:
        """Masked-spectrum pretraining of the spectrum tower."""
        from training.settings import SpectrumSettings, read_settings
        from training.spectrum import train_spectrum

        settings = read_settings(SpectrumSettings, config, **_overrides(data, out, epochs, max_minutes))
        typer.echo(train_spectrum(settings, progress))

    @train.command()
    def image(
        config: Config = None,
        data: Data = None,
        out: Out = None,
        epochs: Epochs = None,
        max_minutes: Minutes = None,
        progress: Progress = True,
    ) -> None:
        """Self-supervised (MoCo v2) pretraining of the image tower."""
        from training.image import train_image
        from training.settings import ImageSettings, read_settings

        settings = read_settings(ImageSettings, config, **_overrides(data, out, epochs, max_minutes))
        typer.echo(train_image(settings, progress))

    @train.command()
    def align(
        config: Config = None,
        data: Data = None,
        out: Out = None,
        epochs: Epochs = None,
        max_minutes: Minutes = None,
        progress: Progress = True,
    ) -> None:
        """InfoNCE alignment of the two towers; writes a model directory."""
        from training.align import train_align
        from training.settings import AlignSettings, read_settings

        settings = read_settings(AlignSettings, config, **_overrides(data, out, epochs, max_minutes))
        typer.echo(train_align(settings, progress))

    from training.benchmark.cli import register as register_benchmark
    from training.evaluate.cli import register as register_evaluate

    register_evaluate(app)
    register_benchmark(app)


def _overrides(data: Path | None, out: Path | None, epochs: int | None, max_minutes: float | None) -> dict[str, Any]:
    return {
        "data": str(data) if data else None,
        "out": str(out) if out else None,
        "epochs": epochs,
        "max_minutes": max_minutes,
    }
