"""`astroclip benchmark verify | release | check | time`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

MAX_SHOWN = 40


def register(app: typer.Typer) -> None:
    """Add the commands to the root application; none of them needs torch."""
    benchmark = typer.Typer(no_args_is_help=True, help="The science benchmark: its data, its rules, its results.")
    app.add_typer(benchmark, name="benchmark")

    @benchmark.command()
    def verify(
        data: Annotated[Path, typer.Argument(help="Survey folder.", exists=True, file_okay=False)],
        release: Annotated[
            str | None, typer.Option(help="Release name or file; found from the data if left out.")
        ] = None,
    ) -> None:
        """Is a survey folder a data release? Exit code 1 where it is not."""
        from training.benchmark.release import Release, find_release, known_releases
        from training.benchmark.release import verify as compare

        wanted = Release.load(release) if release else find_release(data)
        if wanted is None:
            typer.echo(
                f"{data.name} claims to be no release; name one: --release {' | '.join(known_releases())}", err=True
            )
            raise typer.Exit(1)
        verdict = compare(data, wanted, say=lambda line: typer.echo(line, err=True))
        typer.echo(str(verdict))
        raise typer.Exit(1 if verdict.status == "different" else 0)

    @benchmark.command()
    def release(
        data: Annotated[Path, typer.Argument(help="Complete survey folder.", exists=True, file_okay=False)],
        name: Annotated[str, typer.Option(help="The release's name.")],
        out: Annotated[Path, typer.Option(help="Release file (.json) to write.")],
        table_shards: Annotated[int, typer.Option(min=1, help="Training shards in the table of neighbours.")] = 50,
        pools: Annotated[str, typer.Option(help="Sizes of the retrieval pools.")] = "1000,2000",
    ) -> None:
        """Write the release file of a survey: split, digests and fingerprints of every shard."""
        from training.benchmark.release import make_release, write_release

        try:
            sizes = tuple(int(size) for size in pools.split(","))
        except ValueError:
            raise typer.BadParameter(f"found {pools!r}; wanted sizes like 1000,2000", param_hint="--pools") from None
        made = make_release(
            data, name, table_shards=table_shards, pools=sizes, say=lambda line: typer.echo(line, err=True)
        )
        write_release(made, out)
        typer.echo(f"{name}: {len(made.shards())} shards, sha256 {made.sha256}")

    @benchmark.command()
    def check(files: Annotated[list[Path], typer.Argument(help="Results (.json) and MLPerf logs.")]) -> None:
        """Do results and logs obey the rules? Exit code 1, with line and rule, where one does not.

        A result X.json and a log X.mllog.txt given together are compared with each other as well.
        """
        from training.benchmark.submission import check_files

        broken = 0
        for file, complaints in check_files(files).items():
            broken += len(complaints)
            typer.echo(f"{file}: {f'{len(complaints)} rules broken' if complaints else 'complies'}")
            for complaint in complaints[:MAX_SHOWN]:
                typer.echo(f"  {complaint}")
            if len(complaints) > MAX_SHOWN:
                typer.echo(f"  ... and {len(complaints) - MAX_SHOWN} more")
        raise typer.Exit(1 if broken else 0)

    @benchmark.command()
    def time(logs: Annotated[list[Path], typer.Argument(help="mllog.txt of the stages of one model.")]) -> None:
        """Time and samples to the benchmark's quality, from training logs."""
        from astroclip.errors import InputError
        from training.benchmark.mllog import LogError
        from training.benchmark.timing import time_to_quality

        try:
            found = time_to_quality(logs)
        except LogError as error:
            raise InputError(f"{error}; give the mllog.txt of a training run", code="bad_log") from error
        for stage in found["stages"]:
            typer.echo(f"{stage['stage']:12s} {stage['seconds']:10.0f} s  {stage['samples']:>10,} samples")
        quality = f"{found['quality']['name']} >= {found['quality']['wanted']:g} in {found['quality']['pool']:,}"
        if found["reached"]:
            typer.echo(f"{quality}: {found['seconds']:.0f} s, {found['samples']:,} samples of alignment")
        else:
            typer.echo(f"{quality}: not reached")
