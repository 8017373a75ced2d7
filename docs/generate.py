"""Fill the generated tables of docs/*.md from the code: settings, limits, calls, metrics, error codes, flags,
commands.

    python docs/generate.py           write the tables between their markers
    python docs/generate.py --check   exit 1 and name the files that are out of step

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``; tests/test_docs.py checks that
every table is in step, so a new setting or error code cannot go undocumented.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MARKED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end: \2 -->)", flags=re.DOTALL)
SPOKEN_BY_SERVICE = ("astroclip", "index", "service")
# Their errors end a command, never a request.
COMMANDS_ONLY = (
    "astroclip/batch.py",
    "astroclip/client",
    "astroclip/commands.py",
    "astroclip/io/sources.py",
    "astroclip/parts.py",
    "index/build.py",
    "index/cli.py",
    "index/lists_build.py",
    "index/parts.py",
    "index/publish.py",
    "service/cli.py",
    "service/key_commands.py",
    "service/keys.py",
    "service/telemetry.py",
)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; pipes in cells are escaped."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def settings() -> str:
    from service.settings import Settings

    prefix = Settings.model_config["env_prefix"]
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, Path):
            default = default.relative_to(ROOT)
        if is_dataclass(default):
            default = "as below"
        rows.append((f"`{prefix}{name.upper()}`", f"`{default}`", field.description))
    return table(("variable", "default", "what it does, and why this default"), rows)


def reader_limits() -> str:
    from astroclip.limits import DEFAULT_LIMITS, LOCAL_LIMITS, ReaderLimits

    reasons = docstring_items(ReaderLimits.__doc__ or "")
    rows = []
    for field in fields(ReaderLimits):
        upload, local = (getattr(limits, field.name) for limits in (DEFAULT_LIMITS, LOCAL_LIMITS))
        second = "same" if local == upload else f"{local:,}"
        rows.append((f"`ASTROCLIP_READER__{field.name.upper()}`", f"{upload:,}", second, reasons[field.name]))
    return table(("variable", "uploads", "command line", "what it bounds, and why"), rows)


def filter_limits() -> str:
    from index.filters import FilterLimits

    reasons = docstring_items(FilterLimits.__doc__ or "")
    rows = [
        (f"`ASTROCLIP_FILTER__{field.name.upper()}`", f"{field.default:,}", reasons[field.name])
        for field in fields(FilterLimits)
    ]
    return table(("variable", "default", "what it bounds, and why"), rows)


def docstring_items(text: str) -> dict[str, str]:
    """Return name -> text of a docstring's ``name:  text`` lines, continuation lines joined."""
    items: dict[str, str] = {}
    name = ""
    for line in text.splitlines()[1:]:
        if found := re.match(r"\s{4}(\w+):\s+(.*)", line):
            name, items[found[1]] = found[1], found[2]
        elif name and line.strip():
            items[name] += " " + line.strip()
    return items


def metrics() -> str:
    from service.metrics import Metrics

    rows = []
    for item in Metrics():
        rows.append((f"`{item.name}`", item.kind, ", ".join(f"`{label}`" for label in item.labels), item.text))
    return table(("metric", "kind", "labels", "what it says"), rows)


def calls() -> str:
    from service.app import make_app

    rows = []
    for path, methods in sorted(make_app().openapi()["paths"].items()):
        for method, call in methods.items():
            rows.append((f"`{method.upper()} {path}`", call["summary"]))
    return table(("call", "answer"), rows)


def error_codes() -> str:
    """Every code an answer can carry, found where errors are made, with the statuses it comes with."""
    from service.errors import status_of

    classes = error_classes()
    statuses: dict[str, set[int]] = {}
    for call in calls_in(SPOKEN_BY_SERVICE):
        name = name_of(call.func)
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in classes:
            code = constant(keywords.get("code"), classes[name].default_code if "code" not in keywords else None)
            kind = classes[name]
        elif name in ("refusal", "over_limit") and call.args:
            code = constant(call.args[0], None)
            default = "InputError" if name == "refusal" else "LimitError"
            kind = classes[name_of(keywords["kind"]) if "kind" in keywords else default]
        elif name == "_refuse" and len(call.args) == 4:  # of connections: status, code, message, limit
            if isinstance(call.args[0], ast.Constant) and isinstance(call.args[1], ast.Constant):
                statuses.setdefault(call.args[1].value, set()).add(call.args[0].value)
            continue
        else:
            continue
        if code:
            error = kind.__new__(kind)  # only its class decides the status
            statuses.setdefault(code, set()).add(status_of(error))
    rows = [(f"`{code}`", ", ".join(map(str, sorted(found)))) for code, found in sorted(statuses.items())]
    return table(("code", "status"), rows)


def error_classes() -> dict[str, type]:
    import astroclip.errors
    from service.errors import MalformedRequest

    found = {name: getattr(astroclip.errors, name) for name in astroclip.errors.__all__}
    return {**found, "MalformedRequest": MalformedRequest}


def flags() -> str:
    """Every flag of `quality` and `trust`, with its sentence as the code writes it."""
    sentences: dict[str, str] = {}
    for call in calls_in(SPOKEN_BY_SERVICE):
        if name_of(call.func) in ("Flag", "FlagModel"):
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            code = constant(given[0], None) if given else None
            if code and len(given) > 1:
                sentences.setdefault(code, sentence(given[1]))
    return table(("flag", "what it says"), ((f"`{code}`", text) for code, text in sorted(sentences.items())))


def sentence(node: ast.expr) -> str:
    """Return the text of a string literal or f-string; what is filled in at run time becomes an ellipsis."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return sentence(node.left) + sentence(node.right)
    return "…"


def commands() -> str:
    """Every command with the first sentence of its help."""
    import typer.main

    from astroclip.cli import build_app

    def walk(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        for name, child in sorted(getattr(command, "commands", {}).items()):
            if getattr(child, "commands", None):
                yield from walk(child, (*words, name))
            else:
                yield f"`{' '.join((*words, name))}`", (child.help or "").strip().partition("\n")[0]

    return table(("command", "what it does"), walk(typer.main.get_command(build_app()), ("astroclip",)))


def calls_in(packages: Iterable[str]) -> Iterator[ast.Call]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.relative_to(ROOT).as_posix().startswith(COMMANDS_ONLY):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield node


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def constant(node: ast.expr | None, default: str | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else default


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "reader-limits": reader_limits,
    "filter-limits": filter_limits,
    "calls": calls,
    "metrics": metrics,
    "error-codes": error_codes,
    "flags": flags,
    "commands": commands,
}


def render(text: str) -> str:
    """Return `text` with every marked table replaced by the current one."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> int:
    stale = []
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        current = render(text)
        if current != text:
            stale.append(path.name)
            if "--check" not in sys.argv[1:]:
                path.write_text(current)
    print("\n".join(stale) or "in step")
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
