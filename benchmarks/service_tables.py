"""The README's table of what the service withstands: one row a mark, of every campaign of `benchmarks/chaos`.

Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["service_marks"]

NAMES = {
    "throughput": "throughput, overhead",
    "searching": "vector search",
    "overload": "overload",
    "poison": "one bad object in 64",
    "poison_strangers": "the same, each never seen before",
    "soak": "mixed traffic for long",
}
SIGNS = {"least": "≥ ", "most": "≤ ", None: ""}


def service_marks(results: Path) -> str:
    """Every mark of every committed campaign; the word `service` says that a file is one."""
    rows, machines = [], []
    order = [*NAMES]
    for path in sorted(results.glob("*.json"), key=lambda p: (order.index(p.stem) if p.stem in order else 99, p.stem)):
        report = json.loads(path.read_text(encoding="utf-8"))
        marks = report.get("marks")
        if not isinstance(marks, Mapping) or not all(_is_mark(mark) for mark in marks.values()):
            continue
        for name, mark in marks.items():
            wanted = f"{SIGNS[mark.get('at')]}{_number(mark['wanted'])}"
            verdict = "yes" if mark["passed"] else "**no**"
            rows.append([NAMES.get(path.stem, path.stem), name, wanted, _number(mark["found"]), verdict])
        machines.append(f"`{path.name}` ({report['machine']['cores']} cores, {report['created'][:10]})")
    if not rows:
        return "_Not measured yet._"
    lines = [["campaign", "mark", "wanted", "measured", "reached"], ["---"] * 5, *rows]
    table = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    return f"{table}\n\nFrom {', '.join(machines)} in `benchmarks/results/`."


def _is_mark(mark: Any) -> bool:
    return isinstance(mark, Mapping) and {"found", "wanted", "passed"} <= set(mark)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}"
    if math.fabs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if value and math.fabs(value) < 1e-3 else f"{value:.3g}"
