"""The evaluation's JSON: where its numbers come from, and which marks they pass.

A report can be repeated from what it holds: command line, seeds, model and data checksums, the split's
shards, and the machine. Results also go out as MLPerf-logging lines (`:::MLLOG {json}`), which its
compliance checker and other tools read; the format is one line per event, written here directly.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["MARKS", "Mark", "data_checksum", "judge", "machine", "mllog_lines", "provenance", "write_json"]

FORMAT_VERSION = 1


def machine() -> dict[str, Any]:
    """What the numbers were made on: processor, cores, memory, accelerator, Python and library versions."""
    packages = ("numpy", "torch", "torchvision", "transformers", "scikit-learn", "h5py")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerator": _accelerator(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
    }


def data_checksum(shards: Iterable[Path]) -> str:
    """SHA-256 over every shard's name, size and digest: the same survey gives the same value anywhere."""
    total = hashlib.sha256()
    for path in sorted(shards, key=lambda p: p.parts[-2:]):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{'/'.join(path.parts[-2:])} {path.stat().st_size} {digest}\n".encode())
    return total.hexdigest()


def provenance(*, seed: int, started: float) -> dict[str, Any]:
    """The part of a report that is the same for every kind of result. `started` is a time.perf_counter()."""
    return {
        "format": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *_relative(sys.argv[1:])]),
        "seconds": round(time.perf_counter() - started, 1),
        "seed": seed,
        "machine": machine(),
    }


def write_json(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write `report` aside and rename; numbers to six significant digits, NaN and infinities as null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(_plain(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def mllog_lines(report: Mapping[str, Any]) -> list[str]:
    """`:::MLLOG` lines of a report: one per judged mark, between run_start and run_stop."""
    events: list[tuple[str, Any, dict[str, Any]]] = [
        ("submission_benchmark", "astroclip_evaluation", {}),
        ("seed", report.get("seed"), {}),
        ("run_start", None, {}),
    ]
    for mark in report.get("marks", []):
        events.append(("eval_accuracy", mark["value"], {"name": mark["name"], "wanted": mark["wanted"]}))
    events.append(("run_stop", None, {"status": "success"}))
    now = int(time.time() * 1000)
    kinds = {"run_start": "INTERVAL_START", "run_stop": "INTERVAL_END"}
    lines = []
    for key, value, extra in events:
        entry = {
            "namespace": "astroclip",
            "time_ms": now,
            "event_type": kinds.get(key, "POINT_IN_TIME"),
            "key": key,
            "value": _plain(value),
            "metadata": extra,
        }
        lines.append(":::MLLOG " + json.dumps(entry))
    return lines


@dataclass(frozen=True)
class Mark:
    """A number the project set itself: where it stands in the report, and what it must reach.

    path:  keys from the root of the report; less: keys of a number to subtract first (a comparison).
    sense: ">=" or "<=".
    """

    name: str
    path: tuple[str, ...]
    sense: str
    wanted: float
    less: tuple[str, ...] | None = None

    def judge(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """{"name", "sense", "wanted", "value", "passed"}; the last two None where not measured."""
        value, base = _at(report, self.path), _at(report, self.less) if self.less else 0.0
        if value is None or base is None:
            return {
                "name": self.name,
                "sense": self.sense,
                "wanted": self.wanted,
                "value": None,
                "passed": None,
            }
        value -= base
        passed = value >= self.wanted if self.sense == ">=" else value <= self.wanted
        return {
            "name": self.name,
            "sense": self.sense,
            "wanted": self.wanted,
            "value": value,
            "passed": bool(passed),
        }


def _zero_shot(direction: str, name: str, section: str = "simulated") -> tuple[str, ...]:
    return (section, "zero_shot", "tuned", direction, name, "value")


# The first eight are AstroCLIP's published zero-shot figures (ResNet version, NeurIPS 2023 workshop).
MARKS: tuple[Mark, ...] = (
    *(
        Mark(f"{label} R2, {name}", _zero_shot(direction, key), ">=", wanted)
        for key, label, wanteds in (
            ("redshift", "redshift", (0.97, 0.71, 0.64, 0.64)),
            ("log_stellar_mass", "stellar mass", (0.86, 0.66, 0.58, 0.58)),
        )
        for (name, direction), wanted in zip(
            (
                ("spectrum", "spectrum->spectrum"),
                ("image", "image->image"),
                ("image to spectra", "image->spectrum"),
                ("spectrum to images", "spectrum->image"),
            ),
            wanteds,
            strict=True,
        )
    ),
    *(
        Mark(
            f"{label} R2, aligned less unaligned image encoder",
            _zero_shot("image->image", key),
            ">=",
            0.0,
            less=_zero_shot("image->image", key, "unaligned"),
        )
        for key, label in (("redshift", "redshift"), ("log_stellar_mass", "stellar mass"))
    ),
    *(
        Mark(
            f"{label} R2, aligned image encoder less supervised ResNet-18",
            _zero_shot("image->image", key),
            ">=",
            -0.02,
            less=("supervised", "resnet", "test", key, "value"),
        )
        for key, label in (("redshift", "redshift"), ("log_stellar_mass", "stellar mass"))
    ),
    Mark(
        "recall@10 in pools of 1,000, image to spectrum",
        ("simulated", "retrieval", "image->spectrum", "recall@10", "value"),
        ">=",
        0.5,
    ),
    Mark(
        "real DESI, z < 0.6: sigma_NMAD",
        ("real", "redshift", "desi", "z<0.6", "knn", "sigma_nmad", "value"),
        "<=",
        0.005,
    ),
    Mark(
        "real DESI, z < 0.6: outliers (0.05)",
        ("real", "redshift", "desi", "z<0.6", "knn", "outliers_0.05", "value"),
        "<=",
        0.10,
    ),
    Mark("photometric realism: sigma_NMAD", ("photometric_realism", "simulated_on_real", "sigma_nmad"), "<=", 0.020),
    Mark("photometric realism: R2", ("photometric_realism", "simulated_on_real", "r2"), ">=", 0.80),
)


def judge(report: Mapping[str, Any], marks: Sequence[Mark] = MARKS) -> list[dict[str, Any]]:
    """Every mark against the report."""
    return [mark.judge(report) for mark in marks]


def _at(report: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    node: Any = report
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return None if node is None else float(node)


def _plain(value: Any) -> Any:
    """Nested plain Python; floats to six digits; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _relative(words: Sequence[str]) -> list[str]:
    """Arguments, absolute paths among them made relative: a report shows no one's folders."""
    return [os.path.relpath(word) if os.path.isabs(word) else word for word in words]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (OSError, ValueError):
        return None


def _accelerator() -> str | None:
    """Name of the GPU where torch is loaded and sees one; torch is not imported for this."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name(0)) if torch is not None and torch.cuda.is_available() else None
