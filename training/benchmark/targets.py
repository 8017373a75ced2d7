"""The marks: numbers the project set itself, where each stands in a result, and whether it was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["QUALITY", "TARGETS", "Quality", "Target", "judge"]


@dataclass(frozen=True)
class Target:
    """A number to reach.

    path:  keys from the root of the result to the entry {"value", "lo", "hi"} (or to a bare number).
    sense: ">=" or "<=".
    less:  keys of an entry to subtract first (a comparison, which has no interval of its own).
    pool:  size that the pools beside the entry must have; in others nothing is measured.
    """

    name: str
    path: tuple[str, ...]
    sense: str
    wanted: float
    less: tuple[str, ...] | None = None
    pool: int = 0

    def judge(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """{"name", "sense", "wanted", "value", "lo", "hi", "passed"}; None where not measured."""
        out: dict[str, Any] = {"name": self.name, "sense": self.sense, "wanted": self.wanted}
        value, lo, hi = _at(result, self.path)
        base = _at(result, self.less)[0] if self.less else 0.0
        if self.pool and _at(result, (*self.path[:-1], "pool_size"))[0] != self.pool:
            value = None
        if value is None or base is None:
            return {**out, "value": None, "lo": None, "hi": None, "passed": None}
        if self.less:
            value, lo, hi = value - base, None, None
        passed = value >= self.wanted if self.sense == ">=" else value <= self.wanted
        return {**out, "value": value, "lo": lo, "hi": hi, "passed": bool(passed)}


@dataclass(frozen=True)
class Quality:
    """What time-to-quality is measured to: `key` of a training log's eval events at `wanted` or above."""

    key: str
    pool: int
    wanted: float


# recall@10, image to spectrum, among the first 1,000 validation objects, measured after every epoch.
QUALITY = Quality("recall@10", 1000, 0.5)


def _zero_shot(direction: str, name: str, section: str = "simulated") -> tuple[str, ...]:
    return (section, "zero_shot", "tuned", direction, name)


def _real(where: str, number: str) -> tuple[str, ...]:
    return ("real", "redshift", "desi", where, "knn", number)


_WAYS = (
    ("spectrum", "spectrum->spectrum"),
    ("image", "image->image"),
    ("image to spectra", "image->spectrum"),
    ("spectrum to images", "spectrum->image"),
)
_LABELS = (("redshift", "redshift"), ("log_stellar_mass", "stellar mass"))

# AstroCLIP's published zero-shot figures (ResNet version, NeurIPS 2023 workshop).
_PUBLISHED = {"redshift": (0.97, 0.71, 0.64, 0.64), "log_stellar_mass": (0.86, 0.66, 0.58, 0.58)}

TARGETS: tuple[Target, ...] = (
    *(
        Target(f"{label} R2, {name}", _zero_shot(direction, key), ">=", wanted)
        for key, label in _LABELS
        for (name, direction), wanted in zip(_WAYS, _PUBLISHED[key], strict=True)
    ),
    *(
        Target(
            f"{label} R2, aligned less unaligned image encoder",
            _zero_shot("image->image", key),
            ">=",
            0.0,
            less=_zero_shot("image->image", key, "unaligned"),
        )
        for key, label in _LABELS
    ),
    *(
        Target(
            f"{label} R2, aligned image encoder less supervised ResNet-18",
            _zero_shot("image->image", key),
            ">=",
            -0.02,
            less=("supervised", "resnet", "test", key),
        )
        for key, label in _LABELS
    ),
    Target(
        "recall@10 in pools of 1,000, image to spectrum",
        ("simulated", "retrieval", "image->spectrum", "recall@10"),
        ">=",
        0.5,
        pool=1000,
    ),
    Target("real DESI, z < 0.6: sigma_NMAD", _real("z<0.6", "sigma_nmad"), "<=", 0.005),
    Target("real DESI, z < 0.6: outliers (0.05)", _real("z<0.6", "outliers_0.05"), "<=", 0.10),
    Target("photometric realism: sigma_NMAD", ("photometric_realism", "simulated_on_real", "sigma_nmad"), "<=", 0.020),
    Target("photometric realism: R2", ("photometric_realism", "simulated_on_real", "r2"), ">=", 0.80),
    # The second, higher set.
    *(
        Target(f"{label} R2, {name} (second mark)", _zero_shot(direction, key), ">=", wanted)
        for key, label, name, direction, wanted in (
            ("redshift", "redshift", "spectrum", "spectrum->spectrum", 0.99),
            ("redshift", "redshift", "image", "image->image", 0.79),
            ("log_stellar_mass", "stellar mass", "spectrum", "spectrum->spectrum", 0.87),
            ("log_stellar_mass", "stellar mass", "image", "image->image", 0.74),
        )
    ),
    Target(
        "recall@10 in pools of 2,000, image to spectrum",
        ("simulated", "retrieval_2000", "image->spectrum", "recall@10"),
        ">=",
        0.5,
        pool=2000,
    ),
    *(
        Target(
            f"{label} R2, aligned image encoder above supervised ResNet-18",
            _zero_shot("image->image", key),
            ">=",
            0.0,
            less=("supervised", "resnet", "test", key),
        )
        for key, label in _LABELS
    ),
    Target("real DESI, z < 0.6: sigma_NMAD (second mark)", _real("z<0.6", "sigma_nmad"), "<=", 0.002),
    Target("real DESI, z < 0.6: outliers (0.05) (second mark)", _real("z<0.6", "outliers_0.05"), "<=", 0.05),
    Target("real DESI, 0.6 < z < 1.5: outliers (0.05)", _real("0.6<z<1.5", "outliers_0.05"), "<=", 0.25),
)


def judge(result: Mapping[str, Any], targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
    """Every target against the result."""
    return [target.judge(result) for target in targets]


def _at(result: Mapping[str, Any], path: tuple[str, ...]) -> tuple[float | None, float | None, float | None]:
    node: Any = result
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return None, None, None
        node = node[key]
    if isinstance(node, Mapping):
        value, lo, hi = (node.get(key) for key in ("value", "lo", "hi"))
    else:
        value, lo, hi = node, None, None
    return (None, None, None) if value is None else (float(value), lo, hi)
