"""Bad requests and bad files: 4xx in the one error shape, and the next good request answers."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from survey import image_fits, npy, sdss_fits, spectrum_csv

ID = "sim-00000020"


def refused(response, *statuses: int) -> dict:
    """The error of a refused request, its shape checked."""
    assert response.status_code in statuses, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"code", "message", "field", "limit", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    assert isinstance(error["code"], str) and error["code"] == error["code"].lower()
    assert len(error["message"]) > 20 and "Traceback" not in error["message"]
    return error


@pytest.fixture(autouse=True)
def still_answers(client):
    yield
    assert client.post("/v1/search", json={"query": {"object_id": ID}, "k": 1}).status_code == 200


# --- files -----------------------------------------------------------------------------------------------------------


def _columns(wave: np.ndarray, flux: np.ndarray | None = None, ivar: np.ndarray | None = None) -> bytes:
    flux = np.random.default_rng(0).normal(5, 1, wave.size) if flux is None else flux
    ivar = np.ones(wave.size) if ivar is None else ivar
    return npy(np.column_stack([wave, flux, ivar]))


def _cube(*shape: int) -> bytes:
    stream = io.BytesIO()
    fits.PrimaryHDU(np.random.default_rng(0).normal(size=shape).astype(np.float32)).writeto(stream)
    return stream.getvalue()


def _object_npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


GRID = np.linspace(3600, 9824, 3000)
BAD_IMAGES = {
    "truncated": lambda g: image_fits(g)[:9000],
    "text renamed": lambda g: b"this is not a FITS file at all, just words\n" * 20,
    "empty": lambda g: b"",
    "one pixel": lambda g: npy(np.ones((3, 1, 1), np.float32)),
    "all NaN": lambda g: npy(np.full((3, 96, 96), np.nan, np.float32)),
    "constant": lambda g: npy(np.ones((3, 96, 96), np.float32)),
    "band missing": lambda g: npy(g.pixels[:2].copy()),
    "many planes": lambda g: _cube(7, 64, 64),
    "four axes": lambda g: _cube(2, 2, 3, 64, 64),
    "object array": lambda g: _object_npy(),
    "random bytes": lambda g: np.random.default_rng(1).bytes(5000),
    "gzip bomb": lambda g: gzip.compress(b"SIMPLE  =" + bytes(80 * 2**20), 9),
    "a spectrum": lambda g: spectrum_csv_of_grid(),
}
BAD_SPECTRA = {
    "twelve pixels": lambda: _columns(np.linspace(4000, 4011, 12)),
    "NaN wavelengths": lambda: _columns(np.where(np.arange(3000) % 7 == 0, np.nan, GRID)),
    "negative wavelengths": lambda: _columns(-GRID),
    "no ivar": lambda: _columns(GRID, ivar=np.zeros(3000)),
    "all NaN": lambda: _columns(GRID, flux=np.full(3000, np.nan)),
    "object array": lambda: _object_npy(),
    "words": lambda: b"wave,flux\nred,blue\ngreen,yellow\n" * 40,
    "html": lambda: b"<!doctype html><html><body>404</body></html>",
    "one column": lambda: npy(GRID),
}


def spectrum_csv_of_grid() -> bytes:
    return b"wave,flux\n" + b"".join(b"%.2f,%.3f\n" % (w, 1.0) for w in GRID)


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("path", ["/v1/embed/image", "/v1/search?modality=image", "/v1/estimate?modality=image"])
def test_bad_image(client, galaxy, name, path):
    error = refused(client.post(path, content=BAD_IMAGES[name](galaxy)), 400, 413, 415, 422)
    assert error["code"] != "internal_error"


@pytest.mark.parametrize("name", BAD_SPECTRA)
@pytest.mark.parametrize("path", ["/v1/embed/spectrum", "/v1/estimate?modality=spectrum"])
def test_bad_spectrum(client, name, path):
    refused(client.post(path, content=BAD_SPECTRA[name]()), 400, 413, 415, 422)


def test_file_whose_name_lies(client):
    files = {"file": ("galaxy.fits", b"plain text, no FITS\n" * 50)}
    error = refused(client.post("/v1/embed/image", files=files), 415)
    assert error["code"] == "media_type_mismatch"


def test_declared_type_that_lies(client, galaxy):
    headers = {"content-type": "image/png"}
    refused(client.post("/v1/embed/image", content=image_fits(galaxy), headers=headers), 415)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_never_fail_the_service(client, galaxy, spectrum, data):
    whole = data.draw(
        st.sampled_from([image_fits(galaxy)[:30000], sdss_fits(spectrum)[:60000], spectrum_csv(spectrum)])
    )
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    damaged = (whole[:at] + bytes([byte]) + whole[at + 1 :])[: data.draw(st.integers(1, len(whole)))]
    path = data.draw(st.sampled_from(["/v1/embed/image", "/v1/embed/spectrum", "/v1/estimate?k=3"]))
    assert client.post(path, content=damaged).status_code < 500


# --- requests --------------------------------------------------------------------------------------------------------

QUERY = {"object_id": ID}
DEEP: dict = {"object_id": ID}
for _ in range(6):
    DEEP = {"combine": {"positive": [DEEP]}}
BAD_REQUESTS = {
    "no query": ({}, 400, "query"),
    "unknown field": ({"query": QUERY, "kk": 3}, 400, "kk"),
    "unknown field of a query": ({"query": {"object_id": ID, "radius": 3}}, 400, "query.radius"),
    "two queries in one": ({"query": {"object_id": ID, "upload": "image"}}, 400, "query"),
    "query of no kind": ({"query": {"name": "M31"}}, 400, "query"),
    "query is text": ({"query": "M31"}, 400, "query"),
    "k zero": ({"query": QUERY, "k": 0}, 422, "k"),
    "k negative": ({"query": QUERY, "k": -3}, 422, "k"),
    "k too large": ({"query": QUERY, "k": 101}, 422, "k"),
    "k huge": ({"query": QUERY, "k": 10**30}, 422, "k"),
    "k a word": ({"query": QUERY, "k": "many"}, 400, "k"),
    "k a fraction": ({"query": QUERY, "k": 2.5}, 400, "k"),
    "target unknown": ({"query": QUERY, "target": "radio"}, 422, "target"),
    "object unknown": ({"query": {"object_id": "none"}}, 404, "object_id"),
    "object empty": ({"query": {"object_id": ""}}, 422, "query.object_id"),
    "object without that modality": ({"query": {"object_id": "sim-00000003", "modality": "image"}}, 422, "modality"),
    "place empty": ({"query": {"position": {"ra": 10, "dec": 60}}}, 404, "position"),
    "place off the sky": ({"query": {"position": {"ra": 10, "dec": 95}}}, 422, "position"),
    "place in words": ({"query": {"position": {"ra": "north", "dec": "pole"}}}, 422, "position"),
    "place half": ({"query": {"position": {"ra": 10}}}, 400, "query.position.dec"),
    "vector short": ({"query": {"vector": [1.0, 2.0], "modality": "image"}}, 422, "query.vector"),
    "vector zero": ({"query": {"vector": [0.0] * 16, "modality": "image"}}, 422, "query.vector"),
    "vector of words": ({"query": {"vector": ["a"] * 16, "modality": "image"}}, 400, "query.vector.0"),
    "vector without modality": ({"query": {"vector": [1.0] * 16}}, 400, "query.modality"),
    "vector of another model": (
        {"query": {"vector": [1.0] * 16, "modality": "image", "model_sha256": "ab" * 32}},
        409,
        None,
    ),
    "upload that was not sent": ({"query": {"upload": "image"}}, 400, "image"),
    "combine of nothing": ({"query": {"combine": {"positive": []}}}, 422, "query.combine.positive"),
    "combine cancels": ({"query": {"combine": {"positive": [QUERY], "negative": [QUERY, QUERY]}}}, 200, None),
    "weights too few": ({"query": {"combine": {"positive": [QUERY, QUERY], "weights": [1]}}}, 422, "query.combine"),
    "weights negative": (
        {"query": {"combine": {"positive": [QUERY], "weights": [-1]}}},
        422,
        "query.combine.weights.0",
    ),
    "weights zero": (
        {"query": {"combine": {"positive": [QUERY, QUERY], "weights": [0, 0]}}},
        422,
        "query.combine",
    ),
    "weights of the positives zero": (
        {"query": {"combine": {"positive": [QUERY], "negative": [QUERY], "weights": [0, 1]}}},
        422,
        "query.combine",
    ),
    "strategy unknown": ({"query": {"combine": {"positive": [QUERY], "strategy": "worst"}}}, 422, None),
    "best score inside a combine": (
        {"query": {"combine": {"positive": [{"combine": {"positive": [QUERY], "strategy": "best_score"}}]}}},
        422,
        "query.combine",
    ),
    "fuse zero": ({"query": QUERY, "fuse": {"image": 0, "spectrum": 0}}, 422, "fuse"),
    "fuse negative": ({"query": QUERY, "fuse": {"image": -1}}, 422, "fuse.image"),
    "fuse of another modality": ({"query": QUERY, "fuse": {"radio": 1}}, 400, "fuse.radio"),
    "object without one of both": ({"query": {"object_id": "sim-00000003", "modality": "both"}}, 422, "modality"),
    "threshold above 1": ({"query": QUERY, "score_threshold": 1.5}, 422, "score_threshold"),
    "threshold a word": ({"query": QUERY, "score_threshold": "high"}, 400, "score_threshold"),
    "order unknown": ({"query": QUERY, "order": "random"}, 422, "order"),
    "k a billion": ({"query": QUERY, "k": 10**9}, 422, "k"),
    "radius negative": ({"query": {"position": {"ra": 1, "dec": 2, "radius_arcsec": -1}}}, 422, None),
    "cone of a negative radius": (
        {"query": QUERY, "filter": {"cone": {"ra": 1, "dec": 2, "radius_deg": -1}}},
        422,
        "filter.radius_deg",
    ),
    "range upside down": ({"query": QUERY, "filter": {"column": "redshift", "range": [0.3, 0.1]}}, 422, "filter.range"),
    "in of nothing": ({"query": QUERY, "filter": {"column": "redshift", "in": []}}, 422, "filter.in"),
    "ranges that do not meet": (
        {
            "query": QUERY,
            "filter": {
                "and": [{"column": "redshift", "range": [0.1, 0.2]}, {"column": "redshift", "range": [0.3, None]}]
            },
        },
        422,
        "filter.and",
    ),
    "combine too deep": ({"query": DEEP}, 422, "query"),
    "combine too wide": ({"query": {"combine": {"positive": [QUERY] * 65}}}, 422, "query"),
    "filter of an unknown column": ({"query": QUERY, "filter": {"column": "no", "range": [0, 1]}}, 422, "filter"),
    "filter of no form": ({"query": QUERY, "filter": {"xor": []}}, 422, None),
    "filter a list": ({"query": QUERY, "filter": [1]}, 400, "filter"),
    "exclusion without a place": (
        {"query": {"vector": [1.0] * 16, "modality": "image"}, "exclude_arcsec": 5},
        422,
        "exclude_arcsec",
    ),
    "exclusion negative": ({"query": QUERY, "exclude_arcsec": -1}, 422, "exclude_arcsec"),
    "column unknown": ({"query": QUERY, "columns": ["nope"]}, 422, "columns"),
    "columns too many": ({"query": QUERY, "columns": ["redshift"] * 65}, 422, "columns"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(client, name):
    request, status, field = BAD_REQUESTS[name]
    response = client.post("/v1/search", json=request)
    if status == 200:
        assert response.status_code == 200
        return
    error = refused(response, status)
    if field is not None:
        assert error["field"] == field


@pytest.mark.parametrize("strategy", ["average", "best_score"])
def test_weights_that_are_all_zero(client, strategy):
    combine = {"positive": [QUERY, {"object_id": "sim-00000021"}], "weights": [0, 0], "strategy": strategy}
    error = refused(client.post("/v1/search", json={"query": {"combine": combine}}), 422)
    assert error["field"] == "query.combine" and "are zero" in error["message"]
    combine["weights"] = [0, 1]
    assert client.post("/v1/search", json={"query": {"combine": combine}}).status_code == 200


@pytest.mark.parametrize(
    ("request_", "status", "field"),
    [
        ({"query": QUERY, "coverage": 1.5}, 422, "coverage"),
        ({"query": QUERY, "properties": ["nope"]}, 422, "properties"),
        ({"query": QUERY, "properties": ["target_class"]}, 422, "properties"),
        ({"query": QUERY, "order": "least_similar"}, 422, "order"),
        ({"query": QUERY, "propertys": ["redshift"]}, 400, "propertys"),
    ],
)
def test_bad_estimate(client, request_, status, field):
    assert refused(client.post("/v1/estimate", json=request_), status)["field"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'"text"',
        b'{"query": {"object_id": "\\ud800"}}',
        b'{"query": {"vector": [NaN], "modality": "image"}}',
        b'{"query": {"vector": [1e999], "modality": "image"}}',
        b"[" * 100000,
        b'{"query": {"object_id": "x"}, "filter": ' + b'{"not": ' * 1000 + b"1" + b"}" * 1001,
        b'{"query": {"object_id": "x"}, "filter": ' + b'{"not": ' * 100000 + b"1" + b"}" * 100001,
        b'{"query": ' + b'{"combine": {"positive": [' * 1000 + b'{"object_id": "x"}' + b"]}}" * 1000 + b"}",
        b'{"a":' * 5000,
        b'{"query": {"combine": {"positive": [' * 3000,
        b'{"k": ' + b"9" * 10000 + b"}",
        b"\xff\xfe{}",
    ],
)
def test_bodies_that_are_no_request(client, body):
    refused(client.post("/v1/search", content=body, headers={"content-type": "application/json"}), 400, 422)


@pytest.mark.parametrize("depth", [9, 50, 150, 1000, 20000])
def test_filters_nested_too_deep(client, galaxy, depth):
    """In the body and in the address alike."""
    expression = '{"not": ' * depth + '{"column": "redshift", "range": [0, 1]}' + "}" * depth
    body = f'{{"query": {{"object_id": "{ID}"}}, "filter": {expression}}}'
    refused(client.post("/v1/search", content=body, headers={"content-type": "application/json"}), 400, 413)
    if len(expression) < 60_000:  # longer addresses are refused before they get here
        refused(client.post(f"/v1/search?filter={expression}", content=npy(galaxy.pixels)), 400, 413)


def test_nan_in_a_vector(client):
    body = json.dumps({"query": {"vector": [float("nan")] + [0.0] * 15, "modality": "image"}})
    error = refused(client.post("/v1/search", content=body, headers={"content-type": "application/json"}), 422)
    assert error["field"] == "query.vector.0"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=x", b"not the boundary"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nhi\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/mixed; boundary=x", b"--x--"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/embed/image", "/v1/search"])
def test_broken_multipart(client, path, content_type, body):
    refused(client.post(path, content=body, headers={"content-type": content_type}), 400, 415)


def test_unknown_parts(client, galaxy):
    assert refused(client.post("/v1/embed/image", files={"files": ("a", b"x")}), 400)["field"] == "files"
    assert refused(client.post("/v1/search", files={"picture": ("a", b"x")}), 400)["field"] == "picture"
    assert refused(client.post("/v1/embed/image", data={"file": "text"}, files={"file2": ("a", b"")}), 400)
    two = [("image", ("a.fits", image_fits(galaxy)))] * 2
    assert refused(client.post("/v1/search", files=two), 400)["field"] == "image"


@pytest.mark.parametrize(
    ("url", "status", "field"),
    [
        ("/v1/embed/image?pixel_scale=0.3", 400, "pixel_scale"),
        ("/v1/embed/image?pixel_scale_arcsec=wide", 422, "pixel_scale_arcsec"),
        ("/v1/embed/image?pixel_scale_arcsec=nan", 422, None),
        ("/v1/embed/image?pixel_scale_arcsec=-1", 422, None),
        ("/v1/embed/image?medium=water", 422, "medium"),
        ("/v1/embed/image?bands=u,v,w", 422, None),
        ("/v1/search?k=sixteen", 400, "k"),
        ("/v1/search?k=100000", 422, "k"),
        ("/v1/search?modality=sound", 422, "modality"),
        ("/v1/search?format=xls", 422, "format"),
        ("/v1/search?filter={", 400, "filter"),
    ],
)
def test_bad_parameters(client, galaxy, url, status, field):
    error = refused(client.post(url, content=npy(galaxy.pixels)), status)
    if field is not None:
        assert error["field"] == field


@pytest.mark.parametrize(
    ("method", "url", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/favicon.ico", 404),
        ("GET", "/v1/search", 405),
        ("DELETE", "/v1/objects/x", 405),
        ("POST", "/v1/info", 405),
        ("GET", "/v1/objects/none", 404),
        ("GET", "/v1/objects/%00", 404),
        ("GET", "/v1/objects/%F0%28%8C%28", 404),
        ("GET", "/v1/objects/none/image.jpg", 404),
        ("GET", "/v1/objects/none/spectrum.json", 404),
        ("GET", "/v1/objects", 400),
        ("GET", "/v1/objects?ra=1", 400),
        ("GET", "/v1/objects?ra=1&dec=2&random=3", 400),
        ("GET", "/v1/objects?random=0", 422),
        ("GET", "/v1/objects?random=1000", 422),
        ("GET", "/v1/objects?random=x", 400),
        ("GET", "/v1/objects?ra=1&dec=2&radius_arcsec=-1", 422),
        ("GET", "/v1/objects?ra=1&dec=2&radius_arcsec=inf", 422),
        ("GET", "/v1/objects?ra=1&dec=2&radius_arcsec=1e9", 422),
        ("GET", "/v1/objects?ra=1&dec=91", 422),
        ("GET", "/v1/objects?ra=12:99:00&dec=0", 422),
        ("GET", "/v1/objects?random=1&format=xls", 422),
    ],
)
def test_bad_addresses(client, method, url, status):
    refused(client.request(method, url), status)


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.sampled_from(
        [ID, "redshift", "target_class", "image", "spectrum", "12:00:48", "5/8-10", [0, 1], [[1, 2], [3, 4], [5, 6]]]
    ),
)
_KEYS = st.sampled_from(
    "query target k filter exclude_arcsec columns properties coverage object_id position ra dec radius_arcsec vector "
    "modality upload combine positive negative weights and or not column range in cone box polygon moc "
    "radius_deg".split()
)
_TREES = st.recursive(
    _VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12
)
_QUERIES = st.sampled_from([{"object_id": ID}, {"position": {"ra": 180.2, "dec": -0.2}}]) | _TREES


@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=st.dictionaries(_KEYS, _TREES, max_size=3), query=_QUERIES, path=st.sampled_from(["search", "estimate"]))
def test_any_json_is_answered_or_refused(client, request, query, path):
    body = json.dumps({**request, "query": query})
    response = client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert response.status_code < 500, (body, response.text)


_FILTERS = st.sampled_from(["and", "or", "not", "cone", "box", "polygon", "moc", "range", "in"]).flatmap(
    lambda key: st.fixed_dictionaries({key: _TREES}, optional={"column": _VALUES})
)


@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(expression=_FILTERS)
def test_any_filter_is_answered_or_refused(client, expression):
    body = json.dumps({"query": {"object_id": ID}, "filter": expression})
    response = client.post("/v1/search", content=body, headers={"content-type": "application/json"})
    assert response.status_code < 500, (body, response.text)
