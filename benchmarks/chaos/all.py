"""Every campaign of this package in turn, each in a process of its own with a limit of time.

    python -m benchmarks.chaos.all [--short] [--out benchmarks/results] [NAME ...]

The exit code is 1 when a campaign ended badly, passed its limit or missed a mark.
"""

from __future__ import annotations

import argparse
import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.chaos.server import ROOT

__all__ = ["campaigns"]

# Those that measure time go first, on a quiet machine; the longest last. New ones come between, by name.
FIRST = ("throughput", "searching", "overload", "poison")
LAST = ("soak",)
# Options beside the defaults, by result: glibc's arenas as the image has them; a second kind of poison.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "poison": {"poison": (), "poison_strangers": ("--strangers", "--fault", "early", "--fault", "late")},
    "soak": {"soak": ("--arenas", "2")},
}
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


def _run(command: Sequence[str], limit_s: float) -> str | None:
    """What went wrong. With a campaign that takes too long goes all it started, which would be on the cores beside
    the next."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit_s)
        return f"ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        return f"was stopped after {limit_s:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(campaigns())}")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    arguments = parser.parse_args()
    bad = []
    limit = SHORT_LIMIT_S if arguments.short else LIMIT_S
    for name in arguments.names or campaigns():
        for result, more in VARIANTS.get(name, {name: ()}).items():
            print(f"== {result}", flush=True)
            started = time.perf_counter()
            out = ["--out", str(arguments.out / f"{result}.json")]
            command = [sys.executable, "-m", f"benchmarks.chaos.{name}", *out, *more, *_short(name, arguments.short)]
            words = _run(command, limit)
            if words:
                bad.append(result)
                print(f"{result} {words} after {time.perf_counter() - started:.0f} s", flush=True)
    print(f"all campaigns passed: {not bad}" + (f"; not: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
