"""The whole evaluation: a model directory and a survey in, one result out, with an MLPerf log as it goes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from astroclip.embed import Embedder
from astroclip.errors import InputError
from astroclip.types import Modality
from training.benchmark.mllog import EventLog, LogError
from training.benchmark.release import Release, Verdict, find_release, verify
from training.benchmark.targets import judge
from training.benchmark.timing import time_to_quality
from training.data import PROPERTIES, find_shards
from training.evaluate.encoders import Sources, model_sources, tower_source
from training.evaluate.provabgs import PairPlan, evaluate_pairs
from training.evaluate.report import BENCHMARK_VERSION, data_checksum, machine, plain, provenance
from training.evaluate.sky import Sky, real_sky
from training.evaluate.survey import VectorCache, encode_part
from training.evaluate.tasks import Encoded, TaskSettings, run_tasks
from training.split import Split, split_shards

__all__ = ["Division", "Plan", "evaluate"]

Say = Callable[[str], None]
Division = Literal["closed", "open"]
RESERVED = ("aligned", "unaligned")


@dataclass(frozen=True)
class Plan:
    """What to evaluate, and against what.

    model, data:                 model directory; survey folder (the split decides which shards are held out).
    image_tower, spectrum_tower: tower.safetensors of the pretraining stages: the unaligned encoders.
    encoders:                    further model directories by name, each a row of every table.
    baselines:                   folders of `astroclip baseline` runs.
    shared:                      folder of the real data; skipped with a line where it does not exist.
    realism:                     JSON of the photometric realism check.
    pairs, provabgs:             AstroCLIP's HDF5 of pairs and the PROVABGS catalogue; skipped where not given.
    published_ssfr:              PROVABGS sSFR with upstream's formula instead of the right one.
    training_logs:               mllog.txt of the model's training stages.
    division:                    "closed" demands data that are a release, its table and its seed.
    release:                     name or file; None: the one that the data claim to be, if any.
    max_train_shards:            use at most so many training shards as the table; 0 = the release's table, else all.
    cache:                       folder that keeps embeddings for the next run.
    """

    model: Path
    data: Path
    image_tower: Path | None = None
    spectrum_tower: Path | None = None
    encoders: tuple[tuple[str, Path], ...] = ()
    baselines: tuple[Path, ...] = ()
    shared: Path | None = None
    realism: Path | None = None
    pairs: Path | None = None
    provabgs: Path | None = None
    published_ssfr: bool = False
    training_logs: tuple[Path, ...] = ()
    division: Division = "open"
    release: str | None = None
    organisation: str = "astroclip"
    max_train_shards: int = 0
    cache: Path | None = None
    n_bootstrap: int = 500
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class _Data:
    """The survey as the benchmark sees it. release, verdict: None where the data are none."""

    split: Split
    release: Release | None
    verdict: Verdict | None

    @property
    def settings(self) -> dict[str, Any]:
        return {"pools": self.release.pools} if self.release else {}

    def as_dict(self) -> dict[str, Any]:
        if self.verdict is None:
            return {"name": None, "sha256": None, "status": "no release", "largest_difference": None, "problems": []}
        return self.verdict.as_dict()


def evaluate(plan: Plan, say: Say = lambda line: None, log: Path | None = None) -> dict[str, Any]:
    """Run everything `plan` names and return the result, marks judged; events go to `log`.

    Raises InputError before any work for a closed run on data that are not a release.
    """
    started = time.perf_counter()
    with EventLog(log) as events:
        events.start("init_start")
        if plan.training_logs:
            _time_to_quality(plan)  # a log that cannot be read is said now, not after the embedding
        data = _open_data(plan, say)
        embedder = Embedder.from_pretrained(plan.model, device=plan.device)
        sources = _sources(plan, embedder)
        _announce(events, plan, data, embedder)
        events.end("init_stop")
        events.start("run_start")
        result = _measure(plan, data, embedder, sources, events, say)
        result = {"kind": "evaluation", **provenance(seed=plan.seed, started=started), **result}
        for mark in result["marks"]:
            rest = {key: mark[key] for key in ("name", "sense", "wanted", "passed")}
            events.event("eval_accuracy", plain(mark["value"]), **rest)
        events.end("run_stop", status="success")
    return result


def _open_data(plan: Plan, say: Say) -> _Data:
    shards = find_shards(plan.data)
    release = Release.load(plan.release) if plan.release else find_release(plan.data)
    verdict = None
    if release is not None:
        say(f"verifying the data against {release.name}")
        verdict = verify(plan.data, release, say=say)
        say(str(verdict))
    if plan.division == "closed":
        _refuse_unless_closed(plan, release, verdict)
    if release is None or verdict is None or verdict.status == "different":
        split = split_shards(shards)
        return _Data(_cut(split, plan.max_train_shards), None if verdict is None else release, verdict)
    return _Data(_cut(release.split(plan.data), plan.max_train_shards or release.table_shards), release, verdict)


def _cut(split: Split, table_shards: int) -> Split:
    return Split(split.train[:table_shards], split.val, split.test) if table_shards else split


def _refuse_unless_closed(plan: Plan, release: Release | None, verdict: Verdict | None) -> None:
    if release is None or verdict is None:
        raise InputError(
            "found data that are no release; the closed division is measured on one; make it with the command in "
            "docs/benchmark.md, or run with --division open",
            code="not_a_release",
        )
    if verdict.status == "different":
        raise InputError(f"{verdict}\nMake the release anew, or run with --division open.", code="not_a_release")
    if plan.max_train_shards not in (0, release.table_shards):
        raise InputError(
            f"found --max-train-shards {plan.max_train_shards}; the closed table of {release.name} has "
            f"{release.table_shards} shards; leave the option out, or run with --division open",
            code="not_closed",
        )
    if plan.seed != release.seed:
        raise InputError(
            f"found --seed {plan.seed}; the closed seed of {release.name} is {release.seed}; leave the option out, or "
            "run with --division open",
            code="not_closed",
        )


def _sources(plan: Plan, embedder: Embedder) -> Sources:
    sources = model_sources("aligned", embedder, plan.device)
    towers: tuple[tuple[Modality, Path | None], ...] = (("image", plan.image_tower), ("spectrum", plan.spectrum_tower))
    for modality, weights in towers:
        if weights is not None:
            sources["unaligned", modality] = tower_source(embedder, plan.model, weights, modality, plan.device)
    names = [name for name, _ in plan.encoders]
    if clash := sorted(
        {name for name in names if name in RESERVED or names.count(name) > 1 or not name.isidentifier()}
    ):
        raise InputError(
            f"found encoder names {', '.join(clash)}; wanted each once, letters, digits and underscores, none of "
            f"{', '.join(RESERVED)}; choose another NAME in --encoder NAME=DIR",
            code="bad_encoder",
        )
    for name, folder in plan.encoders:
        sources |= model_sources(name, Embedder.from_pretrained(folder, device=plan.device), plan.device)
    return sources


def _announce(events: EventLog, plan: Plan, data: _Data, embedder: Embedder) -> None:
    found = data.as_dict()
    events.event("submission_benchmark", "astroclip_evaluation")
    events.event("benchmark_version", BENCHMARK_VERSION)
    events.event("submission_division", plan.division)
    events.event("submission_org", plan.organisation)
    events.event("submission_status", "research")
    about = machine()
    events.event("submission_platform", str(about["processor"]), **about)
    events.event("seed", plan.seed)
    events.event("data_release", found["name"] or "none", sha256=found["sha256"], status=found["status"])
    events.event("model_sha256", embedder.model_sha256, model=embedder.model_id)


def _measure(
    plan: Plan, data: _Data, embedder: Embedder, sources: Sources, events: EventLog, say: Say
) -> dict[str, Any]:
    settings = TaskSettings(n_bootstrap=plan.n_bootstrap, seed=plan.seed, **data.settings)
    with _task(events, "embed"):
        encoded = _embed(data.split, sources, plan.cache, say)
    events.event("train_samples", len(encoded.train))
    events.event("eval_samples", len(encoded.test))
    result: dict[str, Any] = {
        "benchmark": {
            "name": "astroclip",
            "version": BENCHMARK_VERSION,
            "division": plan.division,
            "organisation": plan.organisation,
            "release": data.as_dict(),
        },
        "model": {
            "id": embedder.model_id,
            "sha256": embedder.model_sha256,
            "preprocess_version": embedder.preprocess_version,
            "dim": embedder.dim,
        },
        "data": _describe(plan.data, data.split, encoded),
        "simulated": {},
        "unaligned": {},
        "encoders": {},
        "supervised": {},
    }
    for folder in plan.baselines:
        entry = _baseline(folder)
        _check_baseline(entry, result["data"], plan.division, say)
        result["supervised"][entry["kind"]] = entry
    for name in dict.fromkeys(name for name, _ in sources):
        say(f"tasks of {name}")
        with _task(events, f"tasks: {name}"):
            tasks = {
                "what": _what(sources, name),
                **run_tasks(encoded, name, settings, shared_space=name != "unaligned"),
            }
        if name in RESERVED:
            result["simulated" if name == "aligned" else name] = tasks
        else:
            result["encoders"][name] = tasks
    with _task(events, "real sky"):
        nets = tuple(folder for folder in plan.baselines if _baseline(folder)["kind"] == "redshift")
        sky = Sky(plan.shared or Path("no folder"), nets, data.split.test, settings, plan.device)
        result["real"] = real_sky(sky, sources, encoded, say)
    if plan.pairs or plan.provabgs:
        with _task(events, "PROVABGS"):
            pairs = PairPlan(plan.pairs, plan.provabgs, plan.published_ssfr)
            result["provabgs"] = evaluate_pairs(pairs, sources, settings, say)
    if plan.training_logs:
        result["time_to_quality"] = _time_to_quality(plan)
    if plan.realism is not None:
        result["photometric_realism"] = json.loads(plan.realism.read_text(encoding="utf-8"))
    result["marks"] = judge(result)
    return result


@contextmanager
def _task(events: EventLog, name: str) -> Iterator[None]:
    events.start("eval_start", name=name)
    yield
    events.end("eval_stop", name=name)


def _what(sources: Sources, name: str) -> str:
    return "; ".join(dict.fromkeys(source.what for key, source in sources.items() if key[0] == name))


def _embed(split: Split, sources: Sources, cache: Path | None, say: Say) -> Encoded:
    done = 0
    began = time.perf_counter()

    def progress(n: int) -> None:
        nonlocal done
        before, done = done, done + n
        if done // 2000 > before // 2000:
            say(f"{done} objects embedded, {done / (time.perf_counter() - began):.0f} a second")

    kept = VectorCache(cache) if cache else None
    parts = [
        encode_part(shards, sources, cache=kept, report=progress) for shards in (split.train, split.val, split.test)
    ]
    return Encoded(*parts)


def _describe(data: Path, split: Split, encoded: Encoded) -> dict[str, Any]:
    manifest = data / "survey.json"
    if manifest.is_file():
        checksum = {"manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
    else:
        checksum = {"shards_sha256": data_checksum([*split.train, *split.val, *split.test])}
    named = {"train": encoded.train, "val": encoded.val, "test": encoded.test}
    return {
        **checksum,
        "objects": {name: len(part) for name, part in named.items()},
        "left_out": {name: part.left_out for name, part in named.items()},
        "split": split.names(),
        "properties": list(PROPERTIES),
    }


def _baseline(folder: Path) -> Mapping[str, Any]:
    """A baseline's result without its training curve and shard names, which stay beside its weights."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    apart = ("history", "format", "train_shards", "val_shards")
    return {key: value for key, value in result.items() if key not in apart}


def _time_to_quality(plan: Plan) -> dict[str, Any]:
    try:
        return time_to_quality(plan.training_logs)
    except (LogError, KeyError, TypeError) as error:
        raise InputError(
            f"a training log cannot be used ({error}); wanted the mllog.txt of `astroclip train`; check --training-log",
            code="bad_log",
        ) from error


def _check_baseline(entry: Mapping[str, Any], data: Mapping[str, Any], division: Division, say: Say) -> None:
    """A baseline's numbers stand beside the others only if they come from the same test objects."""
    shards = entry.get("test_shards", data["split"]["test"])  # results older than this key have the count alone
    if shards == data["split"]["test"] and entry["objects"]["test"] == data["objects"]["test"]:
        return
    message = (
        f"the baseline {entry['kind']} was judged on {entry['objects']['test']} objects of other shards than the "
        f"{data['objects']['test']} test objects here; train it on this survey (`astroclip baseline`)"
    )
    if division == "closed":
        raise InputError(message, code="other_data")
    say(f"warning: {message}")
