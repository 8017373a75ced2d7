"""The page in a real browser: ask by id, place and file; errors as sentences; nothing from another host."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
import uvicorn
from browser import BINARY, Browser
from survey import image_fits, sdss_fits

from service.app import make_app
from service.keys import changing, new_key

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BINARY is None, reason="no chromium installed")]

ID = "sim-00000020"


@pytest.fixture(scope="module")
def site(settings, engine):
    with served(settings, engine) as address:
        yield address


@contextlib.contextmanager
def served(settings, engine):
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(settings, engine), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def browser(tmp_path, site):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def text(browser: Browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector('{selector}').innerText")


def results(browser: Browser) -> None:
    browser.wait("document.querySelectorAll('#hits .hit').length > 0 && !document.getElementById('results').hidden")


def test_samples_lead_to_results(browser, site):
    browser.open(site)
    browser.wait("document.querySelectorAll('#samples img').length > 10")
    assert "test survey" in text(browser, "#provenance")
    browser.evaluate("document.querySelector('#samples button').click()")
    results(browser)
    browser.wait("document.querySelectorAll('#hits .hit svg').length === 16")
    assert browser.evaluate("document.getElementById('start').hidden")
    assert browser.errors == []
    assert {url.split("/")[2] for url in browser.requested if url.startswith("http")} == {site.split("/")[2]}


@pytest.mark.parametrize("typed", [ID, "12:00:48 -00:12:00", "180.2, -0.2", "12 00 48 -00 12 00"])
def test_typed_queries(browser, site, typed):
    browser.open(site)
    browser.evaluate(f"document.getElementById('text').value = '{typed}'; document.getElementById('go').click()")
    results(browser)
    assert ID in text(browser, "#query")
    assert "Redshift" in text(browser, "#estimates")
    assert ID not in text(browser, "#hits")
    assert browser.errors == []


def test_uploads_alone_and_together(browser, site, tmp_path, galaxy, spectrum):
    (tmp_path / "cutout.fits").write_bytes(image_fits(galaxy))
    (tmp_path / "spec-1.fits").write_bytes(sdss_fits(spectrum))
    browser.open(site)
    browser.choose_files("#file", tmp_path / "cutout.fits")
    browser.wait("document.querySelector('#query img')")
    assert "cutout.fits" in text(browser, "#query")
    browser.choose_files("#file", tmp_path / "spec-1.fits")
    browser.wait("document.querySelector('#query svg') && !document.querySelector('#query img')")
    browser.choose_files("#file", tmp_path / "spec-1.fits", tmp_path / "cutout.fits")
    browser.wait("document.querySelector('#query svg') && document.querySelector('#query img')")
    assert "image + spectrum" in text(browser, "#query")
    assert browser.errors == []


def test_why_a_hit_matches_an_upload(browser, site, tmp_path, galaxy, spectrum):
    (tmp_path / "cutout.fits").write_bytes(image_fits(galaxy))
    (tmp_path / "spec-1.fits").write_bytes(sdss_fits(spectrum))
    browser.open(site)
    browser.choose_files("#file", tmp_path / "spec-1.fits")
    results(browser)
    hit = browser.evaluate("document.querySelectorAll('#hits .hit .id')[2].innerText")
    browser.evaluate("document.querySelectorAll('#hits .ask-why')[2].click()")
    drawn = "[...document.querySelectorAll('#why img')].filter((i) => i.complete && i.naturalWidth > 0).length"
    browser.wait(f"{drawn} === 1", timeout_s=60)
    assert hit in text(browser, "#why") and "Amber" in text(browser, "#why")
    browser.choose_files("#file", tmp_path / "spec-1.fits", tmp_path / "cutout.fits")
    browser.wait("document.querySelector('#query img') && !document.querySelector('#why img')")
    browser.evaluate("document.querySelector('#hits .ask-why').click()")
    browser.wait(f"{drawn} === 2", timeout_s=60)
    assert browser.errors == []


def test_objects_of_the_index_are_not_explained(browser, site):
    browser.open(f"{site}/#{ID}")
    results(browser)
    assert browser.evaluate("document.querySelectorAll('.ask-why').length") == 0


def test_options_are_obeyed(browser, site):
    browser.open(site)
    browser.evaluate(
        "document.getElementById('k').value = 5;"
        "document.querySelector('input[name=target][value=image]').click();"
        f"document.getElementById('text').value = '{ID}'; document.getElementById('go').click()"
    )
    results(browser)
    assert browser.evaluate("document.querySelectorAll('#hits .hit').length") == 5
    assert "by image" in text(browser, "#hits")


def test_errors_are_sentences(browser, site, tmp_path):
    (tmp_path / "notes.fits").write_bytes(b"just words\n" * 100)
    browser.open(site)
    browser.choose_files("#file", tmp_path / "notes.fits")
    browser.wait("!document.getElementById('problem').hidden")
    assert "wanted" in text(browser, "#problem")
    browser.evaluate("document.getElementById('text').value = 'no-such-id'; document.getElementById('go').click()")
    browser.wait("document.getElementById('problem').innerText.includes('no-such-id')")
    assert browser.evaluate("document.getElementById('problem').getAttribute('role')") == "alert"


def test_narrow_screen_does_not_scroll_sideways(tmp_path, site):
    browser = Browser(tmp_path / "narrow", width=500, height=900)
    try:
        browser.send("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)
        browser.open(f"{site}/#{ID}")
        results(browser)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    finally:
        browser.close()


def test_api_page_lists_the_calls(browser, site):
    browser.open(f"{site}/docs")
    browser.wait("document.querySelectorAll('.operation').length > 10")
    assert "/v1/estimate" in text(browser, "#docs")
    assert browser.errors == []


def test_page_of_a_service_with_keys(browser, settings, engine, tmp_path, galaxy):
    with changing(tmp_path / "keys.json") as held:
        key, kept = new_key(["read"])
        held.append(kept)
    (tmp_path / "cutout.fits").write_bytes(image_fits(galaxy))
    enter = "document.getElementById('key-text').value = '{}'; document.querySelector('#key button').click()"
    asked = "document.getElementById('key')?.hidden === false && !document.getElementById('problem').hidden"
    with served(settings.model_copy(update={"keys_file": tmp_path / "keys.json"}), engine) as address:
        browser.open(address)
        browser.wait(asked)
        assert "hold an API key" in text(browser, "#problem")
        browser.evaluate(enter.format("ac_wrong"))
        browser.wait(f"{asked} && document.getElementById('problem').innerText.includes('not known')")
        browser.errors.clear()  # the browser's own lines about the 401s
        browser.evaluate(enter.format(key))
        loaded = "[...document.querySelectorAll('{}')].filter((i) => i.naturalWidth > 0).length > {}"
        browser.wait(loaded.format("#samples img", 10))
        assert browser.evaluate("document.getElementById('key').hidden")
        browser.evaluate("document.querySelector('#samples button').click()")
        results(browser)
        browser.wait("document.querySelectorAll('#hits .hit svg').length === 16")
        browser.wait(loaded.format("#hits img", 3))
        browser.choose_files("#file", tmp_path / "cutout.fits")
        browser.wait("document.getElementById('query').innerText.includes('cutout.fits')")
        assert browser.errors == []
        assert key not in "".join(browser.requested)  # in no address, so in no access log and no history
        assert browser.evaluate("sessionStorage.length") == 1 and browser.evaluate("localStorage.length") == 0
        browser.open(f"{address}/docs")
        browser.wait("document.querySelectorAll('.operation').length > 10")
        assert "Wants an API key" in browser.evaluate("document.body.textContent")
        assert browser.errors == []
