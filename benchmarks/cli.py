"""`astroclip bench`: what this machine does with a model and an index of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the `astroclip` command."""
    app.command("bench")(bench)


def bench(
    index: Annotated[Path | None, typer.Option(help="Index to measure; default: the demo's.")] = None,
    model: Annotated[Path | None, typer.Option(help="Its model; default: the demo's.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file for the result.")] = Path("bench.json"),
    seconds: Annotated[float, typer.Option(min=1.0, help="Of a run.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads; default: the service's.")] = None,
) -> None:
    """Measure embedding, overhead and search over HTTP against the model and the index alone, on this machine."""
    import time

    from rich.console import Console
    from rich.table import Table

    from benchmarks.chaos import searching, throughput
    from benchmarks.chaos.campaign import SEED, UNBOUNDED
    from index.store import resolve
    from service.settings import DEMO_INDEX, Settings
    from training.evaluate.report import provenance, write_json

    started = time.perf_counter()
    folder = resolve(index or DEMO_INDEX)
    settings = Settings() if model is None else Settings(model_dir=model)
    threads = throughput.threads_of(threads)
    where: dict[str, Any] = {"index": index, "model": model, "settings": dict(UNBOUNDED)}
    raw = throughput.Raw(settings, threads)
    with throughput.server_of(where, threads) as server:
        embedding = throughput.measured(server, raw, seconds, rounds)
    search = {m: searching.measured(folder, seconds, rounds, model=model, modality=m) for m in raw.embedder.modalities}
    table = Table("what", "alone", "over HTTP", "ratio")
    for modality, found in embedding.items():
        for kind, http in found["http"].items():
            table.add_row(f"{modality}, {kind}: objects/s", *_three(found["raw_rate"], http))
        idle, tail = found["idle"], found["tail"]
        alone, asked = idle["model_p50_ms"]["median"], idle["http_p50_ms"]["median"]
        table.add_row(f"{modality}, one at a time: p50 ms", f"{alone:.1f}", f"{asked:.1f}", f"+{asked - alone:.1f} ms")
        table.add_row(
            f"{modality}, 70 % load: p50, p99 ms",
            "",
            ", ".join(f"{tail[p]['median']:.1f}" for p in ("p50_ms", "p99_ms")),
            "",
        )
    for modality, found in search.items():
        table.add_row(f"search, {modality} ({found['mode']}): vectors/s", *_three(found["raw"]["rate"], found["http"]))
    Console().print(table)
    record = {"torch_threads": threads, "embedding": embedding, "search": search}
    write_json(out, {"kind": "bench", **provenance(seed=SEED, started=started), **record})
    typer.echo(f"{out}", err=True)


def _three(raw: dict[str, Any], http: dict[str, Any]) -> tuple[str, str, str]:
    return f"{raw['median']:.1f}", f"{http['rate']['median']:.1f}", f"{http['ratio']['median']:.2f}"
