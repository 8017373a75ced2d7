"""Tables on answers and how far they can be trusted: filtered search, intervals, trust. Rendered by `readme_tables`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["filtered_search", "intervals", "trust"]

Report = Mapping[str, Any]

PROPERTIES = {
    "redshift": "redshift",
    "log_stellar_mass": "stellar mass",
    "log_metallicity": "metallicity",
    "age_gyr": "age",
    "log_ssfr": "sSFR",
}
PAIRS = ("spectrum->spectrum", "image->image", "image->spectrum", "spectrum->image")
COVERAGES = ("0.68", "0.90", "0.95")


def filtered_search(report: Report) -> str:
    """recall@10 and latency of each backend by the share of the table that a filter lets pass."""
    rows = []
    for name, backend in report["backends"].items():
        for cell in backend["cells"]:
            kind = {"none": "no filter", "random": "random rows", "region": "a region"}[cell["filter"]]
            modes = ", ".join(f"{mode} {count / cell['queries']:.0%}" for mode, count in sorted(cell["modes"].items()))
            rows.append([name, f"{100 * cell['share']:g} %", kind, f"{cell['recall_at_10']:.4f}",
                         _milliseconds(cell["p50_ms"]), _milliseconds(cell["p99_ms"]), modes])  # fmt: skip
    campaign = report["marks"]["rows outside the filter"]
    data = report["data"]
    said = (
        f"{data['vectors']:,} clustered vectors of {data['dim']}; recall against exact search under the same filter. "
        f"In {campaign['queries']:,} random filtered queries {campaign['found']} rows outside the filter came back."
    )
    head = ["backend", "passes", "filter", "recall@10", "p50 ms", "p99 ms", "answered by"]
    return _table(head, rows) + "\n\n" + said


def intervals(report: Report) -> str:
    """k, error and coverage of the estimates of held-out objects, and of real redshifts."""
    rows = []
    for pair in PAIRS:
        for name, label in PROPERTIES.items():
            entry = report["simulated"][pair][name]
            rows.append([_way(pair), label, entry["k"], f"{entry['r2']:.3f}", *_coverages(entry),
                         f"{entry['pit_ks']:.3f}", f"{entry['crps']:.2g}"])  # fmt: skip
    for name, entry in report["real"].items():
        if name.endswith("spectrum->spectrum"):
            rows.append([f"real {name.rsplit(' ', 1)[0]} ({entry['n']})", "redshift", entry["k"], f"{entry['r2']:.3f}",
                         *_coverages(entry), f"{entry['pit_ks']:.3f}", f"{entry['crps']:.2g}"])  # fmt: skip
    worst, held_out = report["worst"], max(report["objects"]["held_out"].values())
    off, off_in_third = (100 * worst[f"coverage_off_{where}"][0] for where in ("overall", "in_a_tercile"))
    pit = worst["pit_ks"][0]
    said = (
        f"{held_out:,} held-out simulated galaxies, an index of {report['objects']['index']:,}. Over all pairs of "
        f"query and target and all properties ({worst['coverages']} coverages) the largest deviation is {off:.1f} "
        f"points, {off_in_third:.1f} in a third of neighbour distance; the largest PIT distance is {pit:.3f}."
    )
    head = ["from", "property", "k", "R²", "in 68 %", "in 90 %", "in 95 %", "PIT KS", "CRPS"]
    return _table(head, rows) + "\n\n" + said


def trust(report: Report) -> str:
    """What is flagged at the 5 % level: galaxies, junk, real objects, exchanged partners."""
    rows = []
    for modality, entry in report["false_alarms"].items():
        rows.append([f"held-out galaxies, {modality}", f"{entry['n']:,}", _percent(entry["ood"]["0.05"])])
    for kind, found in report["junk"].items():
        each = {name: entry for name, entry in found.items() if isinstance(entry, Mapping)}
        least = min(each, key=lambda name: each[name]["detected"])
        said = f"{_percent(found['mean of the kinds'])}; least {_percent(each[least]['detected'])} ({least})"
        label = kind if kind.startswith("damaged") else f"{kind} of nothing astronomical"
        rows.append([f"{label}, {len(each)} kinds", f"{sum(entry['n'] for entry in each.values()):,}", said])
    for kind, entry in (*report["real"]["spectra"].items(), *report["real"]["images"].items()):
        if isinstance(entry, Mapping):
            rows.append([f"real: {kind}", entry["n"], _percent(entry["ood"]["0.05"])])
    pairs = report["pairs"]
    for name in ("random", "similar z and r"):
        lo, hi = pairs[name]["auc_95"]
        rows.append([f"exchanged partners, {name}", f"{pairs['n']:,}",
                     f"AUC {pairs[name]['auc']:.3f} ({lo:.3f} to {hi:.3f})"])  # fmt: skip
    return _table(["what", "n", "flagged"], rows)


def _coverages(entry: Report) -> list[str]:
    return [f"{entry['coverage'][level]['all']:.3f}" for level in COVERAGES]


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _way(pair: str) -> str:
    query, _, target = pair.partition("->")
    return query if query == target else f"{query} → {target}"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
