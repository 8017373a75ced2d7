"""Multipart forms whose texts are no UTF-8: decoded in the event loop, so what a client may name is bounded."""

from __future__ import annotations

import time

import pytest
from survey import npy

from service.errors import error_body


def form(*parts: tuple[bytes, bytes]) -> bytes:
    pieces = [b"--x\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + body for head, body in parts]
    return b"\r\n".join([*pieces, b"--x--\r\n"])


def post(client, path, body, charset=""):
    return client.post(path, content=body, headers={"content-type": f"multipart/form-data; boundary=x{charset}"})


@pytest.mark.parametrize("path", ["/v1/embed/image", "/v1/search"])
@pytest.mark.parametrize(
    ("charset", "head"),
    [
        ("punycode", b'name="A"'),  # quadratic: 0.2 s for 80 kB
        ("punycode", b'name="file"'),
        ("undefined", b'name="file"; filename="a"'),  # raises whatever it is given
        ("unicode_escape", rb'name="\ud800"'),  # what no answer can hold
        ("raw_unicode_escape", b'name="file"; filename="\\ud800"'),
        ("utf-7", b'name="image"; filename="a"'),
        ("no-such-charset", b'name="request"'),
    ],
)
def test_charsets_other_than_utf8_are_refused_at_once(client, path, charset, head):
    start = time.perf_counter()
    answer = post(client, path, form((head, b"A" * 1_000_000)), f"; charset={charset}")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_multipart"
    assert charset in answer.json()["error"]["message"] and time.perf_counter() - start < 2.0


@pytest.mark.parametrize("charset", ["", "; charset=utf-8", '; charset="UTF-8"', "; charset=utf8"])
def test_utf8_by_any_name_is_taken(client, galaxy, charset):
    body = form(('name="file"; filename="grün.npy"'.encode(), npy(galaxy.pixels)))
    answer = post(client, "/v1/embed/image", body, charset)
    assert answer.status_code == 200 and answer.json()["items"][0]["name"] == "grün.npy"


def test_a_text_part_just_below_and_just_above(client, settings):
    most = settings.max_json_bytes
    below = post(client, "/v1/search", form((b'name="request"', b" " * most)))
    assert below.status_code == 400 and below.json()["error"]["code"] == "bad_json"  # read whole
    above = post(client, "/v1/search", form((b'name="request"', b" " * (most + 1))))
    assert above.status_code == 413 and above.json()["error"]["limit"] == most


def test_an_error_can_always_be_written():
    assert error_body("c", "\ud800", field="\ud800", limit=None, request_id="r")["field"] == "?"


@pytest.mark.parametrize("text", ['{"column":"survey","in":["\\ud800"]}', "[" * 300, '{"column":'])
@pytest.mark.parametrize("path", ["/v1/search", "/v1/search/vectors"])
def test_json_of_an_address_is_read_as_strictly_as_that_of_a_body(client, engine, path, text):
    known = engine.index.catalog.row(0)["object_id"]
    asked = {"modality": "spectrum"} if path.endswith("vectors") else {"query": f'{{"object_id": "{known}"}}'}
    answer = client.post(path, params={**asked, "filter": text}, content=b"")
    assert answer.status_code == 400 and answer.json()["error"]["field"] == "filter"
