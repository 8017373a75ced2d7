"""`astroclip evaluate` and `astroclip baseline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["register"]

Data = Annotated[Path, typer.Option("--data", help="Survey folder (Multimodal Universe HDF5).", exists=True)]
Seed = Annotated[int, typer.Option("--seed", help="Of pools, bootstrap and batches.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the root application; torch loads when one of them runs."""

    @app.command()
    def evaluate(
        model: Annotated[Path, typer.Option("--model", help="Model directory.", exists=True)],
        data: Data,
        out: Annotated[Path, typer.Option("--out", help="JSON file to write; mllog lines go beside it.")],
        image_tower: Annotated[
            Path | None, typer.Option(help="tower.safetensors of `train image`: the unaligned image encoder.")
        ] = None,
        spectrum_tower: Annotated[
            Path | None, typer.Option(help="tower.safetensors of `train spectrum`: the unaligned spectrum encoder.")
        ] = None,
        baseline: Annotated[list[Path] | None, typer.Option(help="Folder of a baseline run; repeatable.")] = None,
        shared: Annotated[
            Path,
            typer.Option(
                envvar="ASTROCLIP_SHARED", help="Folder whose data/ holds the real objects; skipped if absent."
            ),
        ] = Path("../shared"),
        realism: Annotated[Path | None, typer.Option(help="JSON of the photometric realism check.")] = None,
        max_train_shards: Annotated[int, typer.Option(help="Training shards in the table; 0 = all.")] = 0,
        seed: Seed = 0,
        device: Device = "auto",
    ) -> None:
        """Science benchmark: held-out simulated galaxies and the real sky."""
        from training.evaluate.report import mllog_lines, write_json
        from training.evaluate.run import Plan, evaluate

        plan = Plan(
            model=model,
            data=data,
            image_tower=image_tower,
            spectrum_tower=spectrum_tower,
            baselines=tuple(baseline or ()),
            shared=shared / "data",
            realism=realism,
            max_train_shards=max_train_shards,
            seed=seed,
            device=device,
        )
        report = evaluate(plan, say=lambda line: typer.echo(line, err=True))
        write_json(out, report)
        out.with_suffix(".mllog.txt").write_text("\n".join(mllog_lines(report)) + "\n", encoding="utf-8")
        for mark in report["marks"]:
            typer.echo(_line(mark))

    @app.command()
    def baseline(
        kind: Annotated[str, typer.Argument(help="resnet (images), photometry, or redshift (spectra).")],
        data: Data,
        out: Annotated[Path, typer.Option("--out", help="Run folder; the same one again resumes.")],
        minutes: Annotated[float, typer.Option(help="Time for training; the schedule fits it.")] = 20.0,
        epochs: Annotated[int, typer.Option(help="At most so many.")] = 60,
        batch_size: Annotated[int, typer.Option(min=2)] = 256,
        seed: Seed = 0,
        device: Device = "auto",
    ) -> None:
        """Train a supervised baseline on the survey's training shards, judge it on the test shards."""
        from training.evaluate.baselines import run_baseline
        from training.evaluate.fit import FitOptions

        options = FitOptions(minutes=minutes, epochs=epochs, batch_size=batch_size, seed=seed, device=device)
        result = run_baseline(kind, data, out, options, report=lambda entry: typer.echo(entry, err=True))
        for name, entry in result["test"].items():
            typer.echo(f"{name:20s} {entry['value']:.4f}  [{entry['lo']:.4f}, {entry['hi']:.4f}]")


def _line(mark: dict[str, Any]) -> str:
    if mark["passed"] is None:
        return f"  not measured  {mark['name']}"
    verdict = "passed" if mark["passed"] else "MISSED"
    return f"  {verdict}  {mark['name']}: {mark['value']:.4g} (wanted {mark['sense']} {mark['wanted']:g})"
