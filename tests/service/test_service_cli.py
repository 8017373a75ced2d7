"""The commands: in process and over a URL give the same answer; formats; errors end with a message."""

from __future__ import annotations

import io
import json
import os
import signal

import pytest
import typer
from astropy.io.votable import parse_single_table
from survey import image_fits, sdss_fits
from typer.testing import CliRunner

from astroclip.errors import InputError, NotFoundError, ProvenanceError
from service import cli

ID = "sim-00000020"


@pytest.fixture(scope="module")
def run(settings):
    app = typer.Typer()
    cli.register(app)
    where = ["--index", str(settings.index_dir), "--model", str(settings.model_dir)]

    def run(command: str, *arguments: str) -> str:
        result = CliRunner().invoke(app, [command, *arguments, *where])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_search_by_id_in_every_format(run):
    answer = json.loads(run("search", "--id", ID, "-k", "3", "--format", "json"))
    expected = [hit["object_id"] for hit in answer["hits"]]
    csv = run("search", "--id", ID, "-k", "3", "--format", "csv").splitlines()
    assert [line.split(",")[0] for line in csv] == ["object_id", *expected]
    table = run("search", "--id", ID, "-k", "3", "--format", "table")
    assert all(name in table for name in expected) and "exact search" in table
    votable = run("search", "--id", ID, "-k", "3", "--format", "votable")
    assert list(parse_single_table(io.BytesIO(votable.encode())).to_table()["object_id"]) == expected


def test_estimate_of_a_file_and_of_a_place(run, tmp_path, spectrum):
    path = tmp_path / "spectrum.fits"
    path.write_bytes(sdss_fits(spectrum))
    answer = json.loads(run("estimate", "--spectrum", str(path), "--coverage", "0.9", "--format", "json"))
    assert answer["estimates"][0]["coverage"] == 0.9
    place = json.loads(run("estimate", "--radec", "12:00:48 -00:12:00", "--target", "image", "--format", "json"))
    assert place["query"]["object_id"] == ID and place["query"]["modalities"] == ["image"]


def test_filter_and_columns(run):
    expression = '{"column": "redshift", "range": [0.2, 0.4]}'
    lines = run("search", "--id", ID, "--filter", expression, "--columns", "redshift", "--format", "csv").splitlines()
    assert lines[0].endswith(",redshift")
    assert all(0.2 <= float(line.split(",")[-1]) <= 0.4 for line in lines[1:])


def test_query_forms_as_options(run, tmp_path, galaxy, spectrum):
    whole = json.loads(run("search", "--id", ID, "--target", "image", "-k", "58", "--format", "json"))["hits"]
    names, bound = [hit["object_id"] for hit in whole], str((whole[4]["score"] + whole[5]["score"]) / 2)

    def ids(*options):
        answer = json.loads(run("search", *options, "--target", "image", "--format", "json"))
        return [hit["object_id"] for hit in answer["hits"]]

    assert ids("--id", ID, "-k", "58", "--score-threshold", bound) == names[:5]
    assert ids("--id", ID, "-k", "3", "--order", "least_similar") == names[::-1][:3]
    query = {"combine": {"positive": [{"object_id": ID}], "strategy": "best_score"}}
    assert ids("--query", json.dumps(query), "-k", "58") == names
    image, other = tmp_path / "image.fits", tmp_path / "spectrum.fits"
    image.write_bytes(image_fits(galaxy)), other.write_bytes(sdss_fits(spectrum))
    both = ("--image", str(image), "--spectrum", str(other))
    assert ids(*both, "--fuse", '{"spectrum": 0}') == ids("--image", str(image)) != ids(*both, "--fuse", '{"image": 0}')


def test_over_a_url_is_the_same(run, settings, engine, monkeypatch):
    import httpx2

    from service.app import make_app

    transport = httpx2.ASGITransport(make_app(settings, engine))
    original = httpx2.AsyncClient.__init__

    def in_process(self, **keywords):
        assert str(keywords["base_url"]) == "http://node:8000"
        original(self, **{**keywords, "transport": transport})

    local = run("search", "--id", ID, "-k", "4", "--format", "csv")
    monkeypatch.setattr(httpx2.AsyncClient, "__init__", in_process)
    assert run("search", "--id", ID, "-k", "4", "--format", "csv", "--url", "http://node:8000") == local


def test_key_goes_to_the_url(run, settings, engine, monkeypatch, tmp_path):
    import httpx2

    from astroclip.errors import AccessError
    from service.app import make_app
    from service.keys import changing, new_key

    with changing(tmp_path / "keys.json") as held:
        text, key = new_key(["read"])
        held.append(key)
    keyed = settings.model_copy(update={"keys_file": tmp_path / "keys.json"})
    transport = httpx2.ASGITransport(make_app(keyed, engine))
    original = httpx2.AsyncClient.__init__
    monkeypatch.setattr(
        httpx2.AsyncClient, "__init__", lambda self, **given: original(self, **{**given, "transport": transport})
    )
    monkeypatch.delenv("ASTROCLIP_API_KEY", raising=False)
    commands = (["search", "--id", ID], ["estimate", "--id", ID])
    for command in commands:
        with pytest.raises(AccessError):
            run(*command, "--url", "http://node:8000")
        assert run(*command, "--url", "http://node:8000", "--api-key", text)
    with pytest.raises(AccessError):
        run("lists", "isolated", "--url", "http://node:8000")
    with pytest.raises(NotFoundError, match="lists"):  # let in; the test index has none
        run("lists", "isolated", "--url", "http://node:8000", "--api-key", text)
    monkeypatch.setenv("ASTROCLIP_API_KEY", text)
    for command in commands:
        assert run(*command, "--url", "http://node:8000")
    assert text not in run("search", "--help")


def test_errors_are_the_librarys(run, tmp_path):
    with pytest.raises(NotFoundError):
        run("search", "--id", "nope")
    with pytest.raises(InputError, match="Nothing to ask with"):
        run("search")
    with pytest.raises(InputError, match="not JSON"):
        run("search", "--id", ID, "--filter", "{")
    with pytest.raises(InputError, match="--query is not JSON"):
        run("search", "--query", "[" * 100_000)
    with pytest.raises(InputError, match="cannot be read"):
        run("search", "--spectrum", str(tmp_path / "none.fits"))


def test_index_of_another_model_is_not_served(settings, tmp_path):
    import shutil

    other = tmp_path / "model"
    shutil.copytree(settings.model_dir, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ProvenanceError):
        cli._load(settings.model_copy(update={"model_dir": other}))


def test_explanation_is_drawn_into_a_file(run, tmp_path, spectrum, galaxy):
    (tmp_path / "spectrum.fits").write_bytes(sdss_fits(spectrum))
    (tmp_path / "cutout.fits").write_bytes(image_fits(galaxy))
    one = ["--spectrum", str(tmp_path / "spectrum.fits")]
    run("search", *one, "--explain", str(tmp_path / "why.svg"))
    assert (tmp_path / "why.svg").read_text().startswith("<svg")
    both = [*one, "--image", str(tmp_path / "cutout.fits")]
    answer = json.loads(run("estimate", *both, "--explain", str(tmp_path / "two.svg"), "--format", "json"))
    assert {path.name for path in tmp_path.glob("two*")} == {"two-image.svg", "two-spectrum.svg"}
    assert set(answer["explanation"]) == {"image", "spectrum"}
    with pytest.raises(InputError, match="ending in .svg"):
        run("search", *one, "--explain", str(tmp_path / "why.png"))
    with pytest.raises(InputError, match="without an upload"):
        run("search", "--id", ID, "--explain", str(tmp_path / "why.svg"))


def test_a_signal_to_reload_that_comes_while_loading_ends_nothing(settings, monkeypatch):
    heard = []

    def load(*_, **__):
        os.kill(os.getpid(), signal.SIGHUP)
        raise ProvenanceError("another model")

    monkeypatch.setattr("service.engine.Engine.load", load)
    before = signal.signal(signal.SIGHUP, lambda *_: heard.append(1))
    try:
        with pytest.raises(ProvenanceError):
            cli._load(settings, to_serve=True)
        assert not heard
        signal.signal(signal.SIGHUP, lambda *_: heard.append(1))
        with pytest.raises(ProvenanceError):
            cli._load(settings)  # a command that answers once and ends: the signal is its shell's
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == [1]
