"""The documentation says what the code does: generated tables in step, links and commands real."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(path: str) -> ModuleType:
    """Return the module at `path`, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_in_step(page: Path) -> None:
    text = page.read_text()
    assert load("docs/generate.py").render(text) == text, "mend: make docs"


def test_every_generated_table_stands_in_some_page() -> None:
    shown = set(re.findall(r"<!-- generated: (\S+) -->", "".join(page.read_text() for page in PAGES)))
    assert shown == set(load("docs/generate.py").TABLES)


def test_result_tables_of_the_readme_are_in_step() -> None:
    done = subprocess.run([sys.executable, "benchmarks/readme_tables.py", "--check"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, "mend: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_make_targets_named_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z][a-z-]+)", fenced(page.read_text()))}
    assert {"demo", "test"} <= named
    assert not [name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)]


def fenced(text: str) -> str:
    """Return the code of a page: inline code and indented or fenced blocks."""
    inline = re.findall(r"`([^`]+)`", text)
    blocks = [line for line in text.splitlines() if line.startswith("    ")]
    return "\n".join([*inline, *blocks])


def test_every_environment_variable_named_in_the_docs_is_read_somewhere() -> None:
    from service.settings import Settings

    known = {f"ASTROCLIP_{name.upper()}" for name in Settings.model_fields}
    known |= set(re.findall(r"\bASTROCLIP_[A-Z_]+", (ROOT / "docker/compose.yaml").read_text()))
    known |= {"ASTROCLIP_SHARED"}  # tests/conftest.py
    named = {name for page in PAGES for name in re.findall(r"\bASTROCLIP_[A-Z_]+\b", page.read_text())}
    assert named <= known
