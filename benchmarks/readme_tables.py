"""The result tables of README.md and docs/benchmark.md, rendered from committed JSON so that none is typed by hand.

    python benchmarks/readme_tables.py            rewrite the tables
    python benchmarks/readme_tables.py --check    exit 1 where they are not in step with benchmarks/results/

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; NAME is one of `TABLES` or
`OF_SEVERAL`. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import answer_tables
import service_tables

__all__ = ["TABLES", "render", "update"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmark.md")
BLOCK = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table:\2 -->)", re.DOTALL)
NOT_YET = "_Not measured yet._"
DASH = "–"

LABELS = {
    "redshift": "redshift",
    "log_stellar_mass": "stellar mass",
    "log_metallicity": "metallicity",
    "age_gyr": "age",
    "log_ssfr": "sSFR",
}
SUPERVISED = {
    "resnet": ("image", "supervised ResNet-18"),
    "photometry": ("g, r, z photometry", "supervised MLP"),
    "redshift": ("spectrum", "supervised 1-D CNN"),
}
Report = Mapping[str, Any]


def update(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked table rendered anew; raises KeyError for a table that is not known."""
    return BLOCK.sub(lambda found: f"{found[1]}{render(found[2], results)}\n{found[3]}", text)


def render(name: str, results: Path = RESULTS) -> str:
    """The Markdown of one table, or a line saying that its result is not there yet."""
    if name in OF_SEVERAL:
        return OF_SEVERAL[name](results)
    file, table = TABLES[name]
    path = results / file
    if not path.is_file():
        return NOT_YET
    return table(json.loads(path.read_text(encoding="utf-8")))


def marks(report: Report) -> str:
    """What was promised, and what came out."""
    rows = []
    for mark in report["marks"]:
        verdict = {True: "yes", False: "**no**", None: "not measured"}[mark["passed"]]
        rows.append([mark["name"], f"{mark['sense'].replace('>=', '≥').replace('<=', '≤')} {mark['wanted']:g}",
                     _number(mark["value"]), verdict])  # fmt: skip
    return _table(["mark", "wanted", "measured", "reached"], rows) + "\n\n" + _source(report)


def leaderboard(results: Path) -> str:
    """Every committed result of the benchmark, one row an encoder or baseline, grouped by release."""
    rows = []
    for path in sorted(results.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if report.get("kind") == "evaluation" and "benchmark" in report:
            rows += _leaders(report)
    if not rows:
        return NOT_YET
    head = ["release", "division", "model", "from", "redshift", "stellar mass", "recall@10 (pool)", "DESI σ_NMAD",
            "DESI outliers"]  # fmt: skip
    return _table(head, rows)


def _leaders(report: Report) -> list[list[Any]]:
    benchmark, model = report["benchmark"], report["model"]
    start = [benchmark["release"]["name"] or "none", benchmark["division"]]
    sky = report["real"].get("redshift", {}).get("desi", {}).get("z<0.6", {})
    named = {
        f"**{model['id']}** ({model['sha256'][:8]})": (report["simulated"], "knn"),
        "before alignment": (report["unaligned"], "knn_unaligned"),
        **{name: (tasks, f"knn_{name}") for name, tasks in report["encoders"].items()},
    }
    rows = []
    for name, (tasks, method) in named.items():
        for way, values in tasks.get("zero_shot", {}).get("tuned", {}).items():
            found = _largest_pool(tasks) if way == "image->spectrum" else DASH
            stars = sky.get(method) if way == "spectrum->spectrum" else None
            rows.append([*start, name, _direction(way), *_cells(values)[:2], found, *_sky_cells(stars)])
    for kind, entry in report["supervised"].items():
        test = {"redshift": entry["test"]["r2"]} if kind == "redshift" else entry["test"]
        stars = sky.get("cnn") if kind == "redshift" else None
        source, title = SUPERVISED[kind]
        rows.append([*start, title, source, *_cells(test)[:2], DASH, *_sky_cells(stars)])
    if "templates" in sky:
        rows.append([*start, "redrock templates", "spectrum", DASH, DASH, DASH, *_sky_cells(sky["templates"])])
    return rows


def _largest_pool(tasks: Report) -> str:
    """recall@10, image to spectrum, in the largest pool of test objects."""
    kept = [v["image->spectrum"] for k, v in tasks.items() if re.fullmatch(r"retrieval(_\d+)?", k)]
    best = max(kept, key=lambda entry: entry["pool_size"], default=None)
    return f"{_value(best['recall@10'])} in {best['pool_size']:,}" if best else DASH


def _sky_cells(numbers: Report | None) -> list[str]:
    return [_value(numbers[key]) for key in ("sigma_nmad", "outliers_0.05")] if numbers else [DASH, DASH]


def zero_shot(report: Report) -> str:
    """R2 of every property by query, table and encoder."""
    rows = []
    for protocol, title in (("tuned", "k chosen on validation"), ("upstream", "upstream's protocol, k = 64")):
        for name, values in report["simulated"]["zero_shot"][protocol].items():
            rows.append([_direction(name), f"aligned, {title}", *_cells(values)])
    for name, values in report["simulated"].get("near", {}).get("zero_shot", {}).get("tuned", {}).items():
        rows.append([_direction(name), "aligned, k chosen on validation, z < 0.6 only", *_cells(values)])
    for name, values in report.get("unaligned", {}).get("zero_shot", {}).get("tuned", {}).items():
        rows.append([_direction(name), "own pretraining alone, k chosen on validation", *_cells(values)])
    for encoder, tasks in report.get("encoders", {}).items():
        for name, values in tasks.get("zero_shot", {}).get("tuned", {}).items():
            rows.append([_direction(name), f"{encoder}, k chosen on validation", *_cells(values)])
    for labels, ways in report["simulated"].get("few_shot", {}).items():
        for name, values in ways.items():
            count = "all labels" if labels == "all" else f"{int(labels):,} labels"
            rows.append([_direction(name), f"aligned, MLP on {count}", *_cells(values)])
    for kind, (source, title) in SUPERVISED.items():
        if kind in report.get("supervised", {}):
            test = dict(report["supervised"][kind]["test"])
            rows.append([source, title, *_cells({"redshift": test["r2"]} if kind == "redshift" else test)])
    objects = report["data"]["objects"]
    note = (
        f"R2 on {objects['test']:,} held-out simulated galaxies, {objects['train']:,} in the table; half of the 95 % "
        "bootstrap interval in brackets."
    )
    return _table(["from", "method", *LABELS.values()], rows) + "\n\n" + note + " " + _source(report)


def retrieval(report: Report) -> str:
    """Finding the partner among a pool, both ways."""
    rows = []
    near = report["simulated"].get("near", {}).get("retrieval", {})
    pools = {k: v for k, v in report["simulated"].items() if re.fullmatch(r"retrieval(_\d+)?", k)}
    for objects, entries in (*(("all", entry) for entry in pools.values()), ("z < 0.6", near)):
        for name, entry in entries.items():
            cells = [_value(entry[f"recall@{k}"]) for k in (1, 5, 10)]
            rows.append([_direction(name), objects, f"{entry['pool_size']:,}", *cells,
                         _number(entry["median_rank"]["value"])])  # fmt: skip
    return _table(["from", "objects", "pool", "recall@1", "recall@5", "recall@10", "median rank"], rows)


def retrieval_limits(report: Report) -> str:
    """recall@10 by what an image is made to say (`benchmarks/retrieval_limits.py`)."""
    classes = sorted(next(iter(report["known"].values()))["recall@10 by class"])
    rows = [
        [
            said,
            _value(entry["image->spectrum"]["recall@10"]),
            *(_number(entry["recall@10 by class"][c]) for c in classes),
        ]
        for said, entry in report["known"].items()
    ]
    return _table(["what the image says", "recall@10", *classes], rows)


def real_sky(report: Report) -> str:
    """Redshifts of real objects, partners of real pairs, strangers."""
    real = report["real"]
    if "skipped" in real:
        return f"_Real sky skipped: {real['skipped']}._"
    rows = []
    methods = {"knn": "k-NN, aligned", "knn_unaligned": "k-NN, pretraining alone", "cnn": "supervised CNN",
               "templates": "redrock templates"}  # fmt: skip
    methods |= {f"knn_{name}": f"k-NN, {name}" for name in report.get("encoders", {})}
    groups = {"desi": "DESI", "sdss": "SDSS / BOSS", "desi_edr_scaled": "DESI EDR, rescaled, class unknown",
              "simulated": "simulated test spectra"}  # fmt: skip
    for group, title in groups.items():
        for label, entry in real["redshift"].get(group, {}).items():
            for method, words in methods.items():
                if method in entry:
                    v = {key: _value(entry[method][key]) for key in entry[method]}
                    rows.append([f"{title}, {label}", entry["n"], words, v["sigma_nmad"], v["bias"],
                                 v["outliers_0.05"], v["outliers_0.15"], v["r2"]])  # fmt: skip
    head = ["galaxies", "n", "method", "σ_NMAD", "bias", "outliers > 0.05", "> 0.15", "R2"]
    return "\n\n".join([_table(head, rows), *_pairs(real), *_strangers(real)])


def _pairs(real: Report) -> list[str]:
    pairs = real.get("pairs") or {}
    rows = [
        [_direction(name), f"{entry['pool_size']:,}", ", ".join(map(str, entry["rank"])),
         ", ".join(map(str, entry["rank_among_pairs"]))]
        for name, entry in pairs.items() if name != "names"
    ]  # fmt: skip
    return [_table(["real pairs", "pool", "ranks of the true partners", "among the pairs alone"], rows)] if rows else []


def _strangers(real: Report) -> list[str]:
    entry = real.get("out_of_class") or {}
    rows = [
        [name, entry[name]["n"], _number(entry[name]["auc_real_galaxies"]),
         _number(entry[name]["detected_at_5pct_real"]), _number(entry[name]["detected_at_5pct_simulated"])]
        for name in ("QSO", "STAR") if name in entry and entry[name]["n"]
    ]  # fmt: skip
    head = ["out of class", "n", "AUC against real galaxies", "found at 5 % false alarms", "alarm set on simulations"]
    return [_table(head, rows)] if rows else []


def steps(results: Path) -> str:
    """The shipped model's training, part by part: what each changed, on held-out simulated galaxies and real ones."""
    rows = []
    for name, file in STEPS.items():
        path = results / file
        if not path.is_file():
            return NOT_YET
        report = json.loads(path.read_text(encoding="utf-8"))
        mark = {entry["name"]: entry["value"] for entry in report["marks"]}
        pairs, strangers = report["real"]["pairs"], report["real"]["out_of_class"]
        rows.append([
            name,
            _number(mark["redshift R2, image"]),
            _number(mark["stellar mass R2, image"]),
            _number(mark["recall@10 in pools of 1,000, image to spectrum"]),
            _number(mark["recall@10 in pools of 2,000, image to spectrum"]),
            _number(mark["real DESI, z < 0.6: outliers (0.05)"]),
            _number(mark["real DESI, 0.6 < z < 1.5: outliers (0.05)"]),
            _number(strangers["QSO"]["detected_at_5pct_real"]),
            _number(strangers["STAR"]["detected_at_5pct_real"]),
            f"{pairs['image->spectrum']['median_rank']:.0f} of {pairs['image->spectrum']['pool_size']:,}",
        ])  # fmt: skip
    head = ["after", "z R2, image", "mass R2, image", "recall@10 in 1,000", "in 2,000", "DESI outliers, z < 0.6",
            "0.6 < z < 1.5", "QSO found", "stars found", "rank of real partners"]  # fmt: skip
    return _table(head, rows)


STEPS = {
    "alignment (`demo-align`)": "steps/aligned.json",
    "image tower and heads, narrow views; heads alone (`demo-refine`, `demo-finish`)": "steps/finished.json",
    "mean of the weights before and after the heads alone: shipped": "evaluation.json",
}
# Made of several results each.
OF_SEVERAL: dict[str, Callable[[Path], str]] = {
    "leaderboard": leaderboard,
    "steps": steps,
    "service": service_tables.service_marks,
}
TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "marks": ("evaluation.json", marks),
    "evaluation": ("evaluation.json", zero_shot),
    "retrieval": ("evaluation.json", retrieval),
    "retrieval-limits": ("retrieval_limits.json", retrieval_limits),
    "real-sky": ("evaluation.json", real_sky),
    "filtered-search": ("filtered_search.json", answer_tables.filtered_search),
    "intervals": ("coverage.json", answer_tables.intervals),
    "trust": ("trust.json", answer_tables.trust),
}


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _cells(values: Mapping[str, Any]) -> list[str]:
    return [_value(values[name]) if name in values else DASH for name in LABELS]


def _value(entry: Mapping[str, Any]) -> str:
    """A number with half its interval: 0.712 (±0.015)."""
    value, lo, hi = entry["value"], entry.get("lo"), entry.get("hi")
    if value is None or lo is None or hi is None:
        return _number(value)
    return f"{_number(value)} (±{_number((hi - lo) / 2)})"


def _number(value: float | None) -> str:
    """Two or three digits that mean something; small numbers keep their first two."""
    if value is None:
        return DASH
    size = abs(value)
    return f"{value:.0f}" if size >= 10 else f"{value:.3f}" if size >= 0.00995 or size == 0 else f"{value:.2g}"


def _direction(name: str) -> str:
    query, _, table = name.partition("->")
    return query if query == table else f"{query} → {table}"


def _source(report: Report) -> str:
    """Where the numbers come from, in one line."""
    machine = report["machine"]
    accelerator = f", {machine['accelerator']}" if machine.get("accelerator") else ""
    return (
        f"Model `{report['model']['id']}` ({report['model']['sha256'][:12]}), {report['created'][:10]}, "
        f"{machine['cores']} cores of {machine['processor']}{accelerator}: `{report['command']}`"
    )


def main() -> None:
    """Rewrite the pages, or with --check say whether it would change."""
    parser = argparse.ArgumentParser(description="Render the result tables from benchmarks/results/.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is out of step")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        wanted = update(text)
        if check and wanted != text:
            sys.exit(f"{page.name} is not in step with benchmarks/results/: run python benchmarks/readme_tables.py")
        if not check:
            page.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
