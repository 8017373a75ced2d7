"""The shape of the project: who imports whom, what is declared, and what the command line promises.

Static checks parse every module (no import); the start-up checks run a fresh interpreter, because this one
has long imported torch.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest
from typer.testing import CliRunner

from astroclip.cli import COMMAND_GROUP, EXTRA_OF_MODULE, build_app

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("astroclip", "index", "service", "training")
MAY_IMPORT = {
    "astroclip": set(),
    "index": {"astroclip"},
    "service": {"astroclip", "index"},
    "training": {"astroclip"},
    "training/evaluate": {"astroclip", "index"},
}
# Imported by us, released and pinned by another.
PART_OF = {"pydantic-core": "pydantic"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""


def requirement_names(lines: list[str]) -> set[str]:
    return {normal(re.split(r"[\[<>=!~; ]", line)[0]) for line in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    wrong = []
    for path in modules(package):
        relative = path.relative_to(ROOT)
        own = "/".join(relative.parts[:2])
        allowed = MAY_IMPORT.get(own, MAY_IMPORT[package]) | {package}
        for line, name in imported(path):
            top = name.partition(".")[0]
            if top in PACKAGES and top not in allowed:
                wrong.append(f"{relative}:{line} imports {name}")
    assert not wrong, "imports run service -> index -> astroclip <- training:\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_declared(package: str) -> None:
    """What a module imports is the standard library, the project, or a distribution of pyproject.toml."""
    declared = requirement_names(PROJECT["dependencies"])
    for extra, lines in PROJECT["optional-dependencies"].items():
        if extra != "dev":
            declared |= requirement_names(lines)
    distributions = packages_distributions()
    missing = []
    for path in modules(package):
        for line, name in imported(path):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in PACKAGES:
                continue
            providers = {normal(distribution) for distribution in distributions.get(top, [top])}
            providers = {PART_OF.get(provider, provider) for provider in providers}
            if not providers & declared:
                missing.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not missing, "not declared in pyproject.toml (dev does not count):\n" + "\n".join(missing)


def test_modules_are_named_after_a_noun() -> None:
    names = [path.relative_to(ROOT) for package in PACKAGES for path in modules(package)]
    assert names
    assert not [name for name in names if name.stem in {"utils", "util", "helpers", "misc"}]


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in modules(package)
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, "modules without a docstring: " + ", ".join(silent)


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("astroclip", {"torch", "faiss", "astropy"}),
        ("astroclip.cli", {"torch", "faiss", "transformers", "astropy"}),
        ("astroclip.client", {"torch", "faiss", "transformers"}),
    ],
)
def test_light_imports_stay_light(module: str, banned: set[str]) -> None:
    loaded = modules_after(f"import {module}")
    assert not banned & loaded


def test_help_loads_neither_torch_nor_faiss() -> None:
    """Registering every group's commands is cheap: the weight is inside the commands."""
    loaded = modules_after("from astroclip.cli import build_app; build_app()")
    assert not {"torch", "faiss", "transformers", "lightning", "galsim", "bagpipes"} & loaded


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*{{m.partition('.')[0] for m in sys.modules}}, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_entry_points_are_those_of_pyproject_and_load() -> None:
    wanted = PROJECT["entry-points"][COMMAND_GROUP]
    found = {point.name: point for point in entry_points(group=COMMAND_GROUP)}
    assert {name: point.value for name, point in found.items()} == wanted, "mend: pip install -e . again"
    for point in found.values():
        assert callable(point.load())


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", ["--port", "--host"]),
        ("serve", ["--index", "--model", "--host", "--port"]),
        ("embed", ["--out", "--model"]),
        ("index build", ["--out"]),
        ("index append", []),
        ("index verify", []),
        ("index info", []),
        ("index lists", ["--kinds", "--limit", "--threshold"]),
        ("lists", ["--modality", "--offset", "--limit", "--index", "--url", "--api-key", "--format"]),
        ("keys create", ["--file", "--scope", "--days", "--note"]),
        ("keys list", ["--file"]),
        ("keys revoke", ["--file"]),
        (
            "search",
            ["--image", "--spectrum", "--id", "--radec", "--target", "--index", "--url", "--api-key", "--format"],
        ),
        ("estimate", ["--image", "--spectrum", "--id", "--radec", "--index", "--url", "--api-key", "--format"]),
        ("simulate", ["--n", "--out", "--seed"]),
        ("train spectrum", ["--config"]),
        ("train image", ["--config"]),
        ("train align", ["--config"]),
        ("evaluate", ["--model", "--data", "--out"]),
        ("weights import", ["--out", "--kind", "--set"]),
    ],
)
def test_command_line_contract(command: str, options: list[str]) -> None:
    plain = {"COLUMNS": "200", "NO_COLOR": "1"}
    result = CliRunner().invoke(build_app(), [*command.split(), "--help"], env=plain)
    assert result.exit_code == 0, result.output
    for option in options:
        assert option in result.output, f"`astroclip {command}` has no {option}"


def test_an_unknown_command_exits_with_two(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from astroclip.cli import main; main()", "no-such-command"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "no-such-command" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_ours_is_one_line_and_exit_code_two(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import typer

    from astroclip import cli
    from astroclip.errors import InputError

    def failing() -> typer.Typer:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.command()
        def only() -> None:
            raise InputError("found 12 pixels; wanted 200", field="spectrum")

        return app

    monkeypatch.setattr(cli, "build_app", failing)
    monkeypatch.setattr(sys, "argv", ["astroclip"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message == "astroclip: unusable_input [spectrum]: found 12 pixels; wanted 200\n"


def test_a_missing_extra_is_explained(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from astroclip import cli

    def failing() -> None:
        raise ModuleNotFoundError("No module named 'galsim'", name="galsim")

    monkeypatch.setattr(cli, "build_app", lambda: lambda prog_name: failing())
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "pip install 'astroclip[simulate]'" in capsys.readouterr().err


def test_extras_named_by_the_command_line_exist() -> None:
    assert set(EXTRA_OF_MODULE.values()) <= set(PROJECT["optional-dependencies"])


def test_extras_are_those_of_the_design_and_faiss_is_in_exactly_two() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"cpu", "gpu", "simulate", "train", "map", "dev"} <= set(extras)
    with_faiss = {extra for extra, lines in extras.items() if any("faiss" in line for line in lines)}
    assert with_faiss == {"cpu", "gpu"}
    assert not any("faiss" in line for line in PROJECT["dependencies"])


def test_constraints_pin_every_direct_dependency() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^\s=]+", line) for line in lines), "one exact pin a line"
    pinned = requirement_names(lines)
    direct = requirement_names(PROJECT["dependencies"])
    for extra_lines in PROJECT["optional-dependencies"].values():
        direct |= requirement_names(extra_lines)
    assert direct <= pinned, f"without a pin: {sorted(direct - pinned)}"


def test_the_wheel_holds_the_library_alone() -> None:
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["astroclip"]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script[-1] == "exec make test"
    assert "make test" in (ROOT / "README.md").read_text()
