"""Every campaign of this package in turn, each in a process of its own with a limit of time.

    python -m benchmarks.chaos.all [--short] [--out benchmarks/results] [NAME ...]

The exit code is 1 when a campaign ended badly, passed its limit or missed a mark.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.chaos.server import ROOT

__all__ = ["campaigns"]

# Those that measure time go first, on a quiet machine; the longest last. New ones come between, by name.
FIRST = ("throughput", "searching", "overload", "poison")
LAST = ("soak",)
LIMIT_S, SHORT_LIMIT_S = 3 * 3600.0, 300.0


def campaigns() -> list[str]:
    """Modules of this package that have a `main` and write a result (take --out)."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text()
        defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
        if path.stem != "all" and "main" in defined and ("--out" in text or "parser(__doc__" in text):
            found.append(path.stem)
    others = [name for name in found if name not in FIRST + LAST]
    return [*(n for n in FIRST if n in found), *others, *(n for n in LAST if n in found)]


def _short(name: str, short: bool) -> list[str]:
    """Options of a short run: --short, or what the module's literal SHORT says."""
    if not short:
        return []
    text = (Path(__file__).parent / f"{name}.py").read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SHORT":
            return [str(word) for word in ast.literal_eval(node.value)]
    return ["--short"] if '"--short"' in text or "parser(__doc__" in text else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(campaigns())}")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    arguments = parser.parse_args()
    bad = []
    for name in arguments.names or campaigns():
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.chaos.{name}", "--out", str(arguments.out / f"{name}.json")]
        try:
            limit = SHORT_LIMIT_S if arguments.short else LIMIT_S
            code = subprocess.run([*command, *_short(name, arguments.short)], cwd=ROOT, timeout=limit).returncode
            words = f"ended with code {code}"
        except subprocess.TimeoutExpired:
            code, words = 1, f"was stopped after {limit:.0f} s"
        if code:
            bad.append(name)
            print(f"{name} {words} after {time.perf_counter() - started:.0f} s", flush=True)
    print(f"all campaigns passed: {not bad}" + (f"; not: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
