"""`astroclip evaluate` and `astroclip baseline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

__all__ = ["register"]

Data = Annotated[Path, typer.Option("--data", help="Survey folder (Multimodal Universe HDF5).", exists=True)]
Seed = Annotated[int, typer.Option("--seed", help="Of pools, bootstrap and batches.", min=0)]
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
        encoder: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME=DIR", help="A further model directory as one more row; repeatable."),
        ] = None,
        baseline: Annotated[list[Path] | None, typer.Option(help="Folder of a baseline run; repeatable.")] = None,
        shared: Annotated[
            Path,
            typer.Option(
                envvar="ASTROCLIP_SHARED", help="Folder whose data/ holds the real objects; skipped if absent."
            ),
        ] = Path("../shared"),
        realism: Annotated[Path | None, typer.Option(help="JSON of the photometric realism check.")] = None,
        pairs: Annotated[Path | None, typer.Option(help="AstroCLIP's HDF5 file of pairs; with --provabgs.")] = None,
        provabgs: Annotated[Path | None, typer.Option(help="PROVABGS catalogue (HDF5); with --pairs.")] = None,
        published_ssfr: Annotated[
            bool, typer.Option("--published-ssfr", help="PROVABGS sSFR by upstream's formula, which is in error.")
        ] = False,
        training_log: Annotated[
            list[Path] | None, typer.Option(help="mllog.txt of a training stage: time to quality; repeatable.")
        ] = None,
        division: Annotated[str, typer.Option(help="closed (the release's data, table, seed) or open.")] = "open",
        release: Annotated[
            str | None, typer.Option(help="Release name or file; found from the data if left out.")
        ] = None,
        organisation: Annotated[str, typer.Option(help="Who submits.")] = "astroclip",
        max_train_shards: Annotated[
            int, typer.Option(help="Training shards in the table; 0 = the release's table, or all.", min=0)
        ] = 0,
        cache: Annotated[Path | None, typer.Option(help="Keep embeddings here; the next run reuses them.")] = None,
        seed: Seed = 0,
        device: Device = "auto",
    ) -> None:
        """Science benchmark: held-out simulated galaxies and the real sky."""
        from training.evaluate.report import write_json
        from training.evaluate.run import Division, Plan, evaluate

        if division not in ("closed", "open"):
            raise typer.BadParameter(f"found {division!r}; wanted closed or open", param_hint="--division")
        plan = Plan(
            model=model,
            data=data,
            image_tower=image_tower,
            spectrum_tower=spectrum_tower,
            encoders=tuple(_named(text) for text in encoder or ()),
            baselines=tuple(baseline or ()),
            shared=shared / "data",
            realism=realism,
            pairs=pairs,
            provabgs=provabgs,
            published_ssfr=published_ssfr,
            training_logs=tuple(training_log or ()),
            division=cast(Division, division),
            release=release,
            organisation=organisation,
            max_train_shards=max_train_shards,
            cache=cache,
            seed=seed,
            device=device,
        )
        result = evaluate(plan, say=lambda line: typer.echo(line, err=True), log=out.with_suffix(".mllog.txt"))
        write_json(out, result)
        for mark in result["marks"]:
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


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and Path(folder).is_dir()):
        raise typer.BadParameter(f"found {text!r}; wanted NAME=MODEL_DIR, an existing folder", param_hint="--encoder")
    return name, Path(folder)


def _line(mark: dict[str, Any]) -> str:
    if mark["passed"] is None:
        return f"  not measured  {mark['name']}"
    verdict = "passed" if mark["passed"] else "MISSED"
    return f"  {verdict}  {mark['name']}: {mark['value']:.4g} (wanted {mark['sense']} {mark['wanted']:g})"
