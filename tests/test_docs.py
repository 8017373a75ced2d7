"""The documentation says what the code does: generated tables in step, links and commands real."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
from serving import client, engine, index_dir, settings  # noqa: F401
from starlette.testclient import TestClient

from service.engine import Engine

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
    for group in ("reader", "filter"):
        default = Settings.model_fields[group].default
        known |= {f"ASTROCLIP_{group}__{field.name}".upper() for field in dataclasses.fields(default)}
    known |= {"ASTROCLIP_API_KEY"}  # astroclip/client/credentials.py
    named = {name for page in PAGES for name in re.findall(r"\bASTROCLIP_[A-Z_]+\b", page.read_text())}
    assert named <= known


# What the examples call their files -> a real one, relative to the survey data.
EXAMPLE_FILES = {
    "coadd": "desi/coadd-special-dark-27247.fits",
    "cutout": "legacy_fits/457431f_example_b.fits.gz",
    "spec": "sdss/firefly_spec-0266-51602-0001.fits",
}


def curl_commands() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    return re.findall(r"^ {4}(curl .+)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("command", curl_commands())
def test_curl_examples_of_the_docs_are_answered(
    command: str,
    client: TestClient,  # noqa: F811
    engine: Engine,  # noqa: F811
    shared_data: Path,
) -> None:
    words = shlex.split(command)[1:]
    body, files, form, url = None, {}, {}, ""
    headers = {"content-type": "application/x-www-form-urlencoded"}  # what curl declares for a bare --data-binary
    while words:
        word = words.pop(0)
        if word == "-F":
            name, _, value = words.pop(0).partition("=")
            if value.startswith("@"):
                files[name] = (value[1:], example(value[1:], shared_data))
            else:
                form[name] = value.partition(";type=")[0]
        elif word == "--data-binary":
            name = words.pop(0)[1:]
            body = own_vectors(engine) if name == "vectors.npy" else example(name, shared_data)
        elif word == "-H":
            key, _, value = words.pop(0).partition(":")
            headers[key.lower()] = value.strip()
        elif not word.startswith("-"):
            url = word.removeprefix("http://127.0.0.1:8000")
    if files:
        answer = client.post(url, files=files, data=form)
    else:
        answer = client.post(url, content=body, headers=headers)
    if "/v1/admin/" in url:  # off without keys, as the page says
        assert answer.json()["error"]["code"] == "admin_off"
        return
    assert answer.status_code == 200, answer.text
    if "/vectors" in url:
        assert pa.ipc.open_stream(answer.content).read_all().num_rows == 10
        return
    wanted = "items" if "/embed/" in url else "hits"
    assert answer.json()[wanted]
    if "/estimate" in url:
        assert {estimate["name"] for estimate in answer.json()["estimates"]} >= {"redshift", "log_stellar_mass"}


def own_vectors(engine: Engine) -> bytes:  # noqa: F811
    stream = io.BytesIO()
    np.save(
        stream, engine.index.vector(int(np.flatnonzero(engine.index.catalog.flag("has_spectrum"))[0]), "spectrum")[None]
    )
    return stream.getvalue()


def example(name: str, data: Path) -> bytes:
    return (data / EXAMPLE_FILES[re.split(r"[-.]", name)[0]]).read_bytes()


def test_the_readme_shows_a_coadd_a_spectrum_and_a_cutout() -> None:
    shown = {name for command in curl_commands() for name in EXAMPLE_FILES if f"@{name}" in command}
    assert shown == set(EXAMPLE_FILES)
