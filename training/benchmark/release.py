"""Data releases: which survey a result was measured on, and whether a folder on disk is that survey.

A release is a JSON file in `training/benchmark/releases/`: the command that makes the data, generator and code
version, the split, the table and the pools of the evaluation, and for every shard the SHA-256 of its file, a digest
of its values and a fingerprint per column (`training.benchmark.fingerprint`). It is small enough to be committed; the
data are not.

A folder is `identical` (every file or every value to the bit), `equal within tolerance` (made anew on a machine that
rounds otherwise: every column's fingerprint within `TOLERANCE` standard deviations), or `different`, with shard and
column."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from astroclip import __version__
from astroclip.errors import InputError
from training.benchmark.fingerprint import ColumnPrint, ShardPrint, largest_difference, print_shard
from training.evaluate.retrieval import draw_pools, pools_sha256
from training.split import Split, shard_number, split_shards

__all__ = [
    "TOLERANCE",
    "Release",
    "Verdict",
    "file_sha256",
    "find_release",
    "known_releases",
    "make_release",
    "verify",
    "write_release",
]

FOLDER = Path(__file__).with_name("releases")
FORMAT = 1
# In standard deviations of a column: ten thousand times float32's rounding, a twentieth of one galaxy exchanged.
TOLERANCE = 1e-4
PARTS = ("train", "val", "test")
MAX_PROBLEMS = 20  # more lines say no more
MANIFEST = "survey.json"


@dataclass(frozen=True)
class Release:
    """One release as its file holds it.

    split:        part -> shard paths relative to the survey folder.
    table_shards: so many of the first training shards are the table that neighbours and heads are fitted on.
    pools:        sizes of the retrieval pools, with digests in `pool_digests`.
    seed:         of pools, few-shot draws and bootstrap resamples.
    """

    name: str
    content: dict[str, Any]

    @classmethod
    def load(cls, name: str | Path) -> Release:
        """A shipped release by its name, or a file; raises InputError naming the known ones."""
        path = Path(name) if str(name).endswith(".json") else FOLDER / f"{name}.json"
        if not path.is_file():
            raise InputError(
                f"found no release {name}; wanted one of {', '.join(known_releases())} or a release file (.json)",
                code="no_release",
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise InputError(
                f"{path.name} is a release of format {content.get('format')}; this code reads format {FORMAT}",
                code="bad_release",
            )
        return cls(content["name"], content)

    @cached_property
    def sha256(self) -> str:
        """Of the content in canonical JSON: what a result cites."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    @property
    def split_names(self) -> dict[str, list[str]]:
        return {part: list(self.content["split"][part]) for part in PARTS}

    @property
    def table_shards(self) -> int:
        return int(self.content["table_shards"])

    @property
    def pools(self) -> tuple[int, ...]:
        return tuple(self.content["pools"])

    @property
    def pool_digests(self) -> dict[str, str]:
        return dict(self.content["pools_sha256"])

    @property
    def seed(self) -> int:
        return int(self.content["evaluation_seed"])

    def split(self, folder: Path) -> Split:
        """The release's split as files below `folder`."""
        train, val, test = (tuple(folder / name for name in self.split_names[part]) for part in PARTS)
        return Split(train, val, test)

    def shards(self) -> dict[str, dict[str, Any]]:
        """path -> {"file_sha256", "bytes", "rows", "digest", "digests", "moments"}."""
        return {entry["path"]: entry for entry in self.content["shards"]}

    def shard_print(self, path: str) -> ShardPrint:
        """The recorded digest and fingerprints of one shard."""
        entry = self.shards()[path]
        columns = {}
        for (name, form), digest, moments in zip(
            self.content["columns"], entry["digests"], entry["moments"], strict=True
        ):
            form = form.replace("(rows", f"({entry['rows']}")
            columns[name] = ColumnPrint(name, form, digest, tuple(moments) if moments else None)
        return ShardPrint(entry["rows"], entry["digest"], columns)


@dataclass(frozen=True)
class Verdict:
    """Whether a folder is a release. status: "identical", "equal within tolerance" or "different".

    largest: the largest difference of a fingerprint, in standard deviations of its column; where: its shard and column.
    problems: what makes it different, a line each.
    """

    release: str
    release_sha256: str
    status: str
    largest: float
    where: str
    problems: tuple[str, ...]
    shards: int

    def __str__(self) -> str:
        if self.status == "identical":
            return f"identical to {self.release}: {self.shards} shards"
        if self.status == "different":
            return f"different from {self.release}:\n" + "\n".join(f"  {line}" for line in self.problems)
        return (
            f"equal to {self.release} within tolerance: {self.shards} shards, largest difference {self.largest:.2g} "
            f"standard deviations ({self.where}; tolerance {TOLERANCE:g})"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.release,
            "sha256": self.release_sha256,
            "status": self.status,
            "largest_difference": self.largest,
            "problems": list(self.problems),
        }


def known_releases() -> list[str]:
    """Names of the shipped releases."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find_release(folder: Path) -> Release | None:
    """The shipped release that the manifest of `folder` claims to be (seed, size, generator); nothing is verified."""
    manifest = folder / MANIFEST
    try:
        plan = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    except ValueError:
        return None
    for name in known_releases():
        release = Release.load(name)
        if all(plan.get(key) == value for key, value in release.content["generator"].items()):
            return release
    return None


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def verify(
    folder: Path,
    release: Release,
    *,
    parts: tuple[str, ...] = PARTS,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Compare the shards of `folder` with the release, one at a time.

    A file whose bytes are the release's is not opened. Of any other, digests and fingerprints are made. Damaged,
    missing and additional shards make the folder different; nothing raises.
    """
    recorded = release.shards()
    wanted = [path for part in parts for path in release.split_names[part]]
    problems = [f"{path}: not of the release" for path in _present(folder) if path not in recorded]
    largest, where, same = 0.0, "", not problems
    for done, path in enumerate(wanted, 1):
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"... {len(wanted) - done + 1} shards not looked at")
            break
        if done % 20 == 0:
            say(f"{done} of {len(wanted)} shards verified")
        file = folder / path
        if not file.is_file():
            problems.append(f"{path}: missing")
            continue
        entry = recorded[path]
        if file.stat().st_size == entry["bytes"] and file_sha256(file) == entry["file_sha256"]:
            continue
        try:
            found = print_shard(file)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        if found.digest == entry["digest"]:
            continue
        same = False
        apart, column, lines = _compare(found, release.shard_print(path))
        problems.extend(f"{path}: {line}" for line in lines)
        if apart > largest:
            largest, where = apart, f"{path} {column}"
    status = "different" if problems else "identical" if same else "equal within tolerance"
    return Verdict(release.name, release.sha256, status, largest, where, tuple(problems), len(wanted))


def _present(folder: Path) -> list[str]:
    found = (p for p in folder.rglob("*.hdf5") if not p.name.startswith("."))
    return sorted(p.relative_to(folder).as_posix() for p in found)


def _compare(found: ShardPrint, wanted: ShardPrint) -> tuple[float, str, list[str]]:
    """Largest difference within tolerance, its column, and a line for each column beyond it."""
    lines = [f"column {name} is missing" for name in wanted.columns if name not in found.columns]
    lines += [f"column {name} is not of the release" for name in found.columns if name not in wanted.columns]
    largest, where = 0.0, ""
    for name in wanted.columns.keys() & found.columns.keys():
        mine, theirs = found.columns[name], wanted.columns[name]
        apart = largest_difference(mine, theirs)
        if mine.form != theirs.form:
            lines.append(f"column {name} is {mine.form}, wanted {theirs.form}")
        elif apart > TOLERANCE:
            far = "other text" if apart == float("inf") else f"{apart:.2g} standard deviations apart"
            lines.append(f"column {name} differs ({far})")
        elif apart >= largest:
            largest, where = apart, name
    return largest, where, sorted(lines)


def make_release(
    folder: Path,
    name: str,
    *,
    table_shards: int,
    pools: tuple[int, ...],
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Release:
    """The release of a survey made by `astroclip simulate`; raises InputError for a folder without a complete one."""
    manifest = folder / MANIFEST
    plan = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    if not plan.get("complete"):
        raise InputError(
            f"{folder.name} holds no complete survey ({MANIFEST} missing or unfinished); wanted the output of "
            "`astroclip simulate`; run it again to complete it",
            code="no_survey",
        )
    paths = _present(folder)
    split = split_shards(folder / path for path in paths)
    columns: list[list[str]] = []
    shards: list[dict[str, Any]] = []
    for path in paths:
        file = folder / path
        found = print_shard(file)
        forms = [[c.name, c.form.replace(f"({found.rows}", "(rows", 1)] for c in found.columns.values()]
        if columns and forms != columns:
            raise InputError(f"{path} has other columns than {paths[0]}; wanted shards of one survey", code="no_survey")
        columns = forms
        shards.append(
            {
                "path": path,
                "healpix": shard_number(file),
                "rows": found.rows,
                "bytes": file.stat().st_size,
                "file_sha256": file_sha256(file),
                "digest": found.digest,
                "digests": [c.digest for c in found.columns.values()],
                "moments": [c.moments for c in found.columns.values()],
            }
        )
        say(f"{len(shards)} of {len(paths)} shards")
    rows = {entry["path"]: entry["rows"] for entry in shards}
    content = {
        "format": FORMAT,
        "name": name,
        "command": f"astroclip simulate --n {plan['n']} --seed {plan['seed']}",
        "generator": {key: plan[key] for key in ("format_version", "n", "seed", "mix", "shard_size")},
        "code": {"astroclip": __version__, **{p: metadata.version(p) for p in ("bagpipes", "galsim", "numpy")}},
        "note": plan["note"],
        "split": split.names(),
        "table_shards": table_shards,
        "pools": list(pools),
        "pools_sha256": {
            str(size): pools_sha256(draw_pools(sum(rows[path] for path in split.names()["test"]), size, seed=seed))
            for size in pools
        },
        "evaluation_seed": seed,
        "columns": columns,
        "shards": shards,
    }
    return Release(name, json.loads(json.dumps(content)))


def write_release(release: Release, path: Path) -> None:
    """One line a shard, so that a change can be read; written aside and renamed."""
    content = dict(release.content)
    shards = content.pop("shards")
    head = json.dumps(content, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(entry, separators=(",", ":")) for entry in shards)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(f'{head},\n "shards": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    os.replace(aside, path)
