"""The clients against the real application, sync and async, and against a server that misbehaves."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys

import httpx2
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from survey import CENTRE, desi_fits, image_fits, npy, spectrum_csv

from astroclip.client import AsyncClient, Client, InProcessTransport, Retry, calls
from astroclip.errors import (
    AccessError,
    AstroClipError,
    ForbiddenError,
    InputError,
    LimitError,
    MediaTypeError,
    NotFoundError,
    NotReadyError,
    OverloadError,
    ProvenanceError,
)
from service.app import make_app

ID = "sim-00000020"


@pytest.fixture(scope="module")
def app(settings, engine):
    return make_app(settings, engine)


@pytest.fixture(scope="module")
def api(app):
    with Client("http://test", transport=InProcessTransport(app)) as api:
        yield api


def test_embed_takes_paths_bytes_and_arrays(api, engine, galaxy, spectrum, tmp_path):
    path = tmp_path / "galaxy.fits"
    path.write_bytes(image_fits(galaxy))
    got = api.embed_image(path, str(path), image_fits(galaxy), galaxy.pixels, pixel_scale_arcsec=0.262)
    assert got.shape == (4, engine.embedder.dim) and got.dtype == np.float32
    np.testing.assert_allclose(got, np.tile(engine.embedder.embed([galaxy]), (4, 1)), atol=1e-4)
    columns = (spectrum.wave, spectrum.flux, spectrum.ivar)
    spectra = api.embed_spectrum(np.column_stack(columns), columns, spectrum_csv(spectrum))
    assert float(spectra[0] @ spectra[1]) > 0.99999 and float(spectra[0] @ spectra[2]) > 0.9999


def test_embed_raises_for_a_bad_item_and_embed_table_reports_it(api, galaxy):
    flat = np.ones((3, 96, 96), np.float32)
    with pytest.raises(InputError, match="one value 1 throughout"):
        api.embed_image(galaxy.pixels, flat)
    table = api.embed("image", galaxy.pixels, flat)
    assert list(np.isnan(table["embedding"]).any(axis=1)) == [False, True]
    assert "one value" in table["error"][1] and table.meta["model"]["sha256"]


def test_search_gives_a_table_with_provenance(api, engine):
    table = api.search(object_id=ID, target="spectrum", k=5)
    assert len(table) == 5 and table.colnames[:3] == ["object_id", "score", "percentile"]
    assert table["ra"].unit == "deg" and "redshift" in table.colnames
    assert table.meta["model"]["sha256"] == engine.embedder.model_sha256
    assert table.meta["index"]["manifest_sha256"] == engine.index.manifest_sha256
    assert table.meta["request_id"] and table.meta["trust"]["ood_p"] is not None


def test_every_form_of_position_is_the_same_place(api):
    ra, dec = CENTRE[0] + 0.2, CENTRE[1]
    forms = [
        (ra, dec),
        ("12:00:48", "-00:12:00"),
        "12:00:48 -00:12:00",
        f"{ra} {dec}",
        SkyCoord(ra, dec, unit="deg"),
        SkyCoord(ra, dec, unit="deg").galactic,
    ]
    found = {tuple(api.search(position=form, radius_arcsec=3, k=3)["object_id"]) for form in forms}
    assert len(found) == 1
    assert api.objects((ra, dec), 50)["object_id"][0] == ID


def test_vector_query_and_estimate(api, galaxy, spectrum):
    vector = api.embed_image(galaxy.pixels)[0]
    assert len(api.search(vector=vector, modality="image", k=4)) == 4
    estimates = api.estimate(spectrum=spectrum_csv(spectrum), k=6, coverage=0.9, properties=["redshift"])
    assert list(estimates["name"]) == ["redshift"] and estimates["coverage"][0] == 0.9
    assert estimates["lo"][0] <= estimates["value"][0] <= estimates["hi"][0]
    assert len(estimates.meta["hits"]) == 6


def test_fused_and_combined(api, galaxy, spectrum):
    both = api.search(image=galaxy.pixels, spectrum=spectrum_csv(spectrum), k=3, target="image")
    assert both.meta["query"]["modalities"] == ["image", "spectrum"]
    combine = {"combine": {"positive": [{"upload": "image"}, {"object_id": ID}]}}
    assert ID not in api.search(query=combine, image=galaxy.pixels, k=50)["object_id"]


def test_order_threshold_and_weights(api, galaxy, spectrum):
    near = api.search(object_id=ID, target="image", k=50)
    far = api.search(object_id=ID, target="image", k=3, order="least_similar")
    assert far["score"].max() < near["score"].max() and list(far["score"]) == sorted(far["score"])
    bound = float(near["score"][4] + near["score"][5]) / 2
    assert list(api.search(object_id=ID, target="image", k=50, score_threshold=bound)["object_id"]) == list(
        near["object_id"][:5]
    )
    alone = api.search(image=galaxy.pixels, k=5, target="image")
    both = {"image": galaxy.pixels, "spectrum": spectrum_csv(spectrum), "k": 5, "target": "image"}
    assert list(api.search(**both, fuse={"spectrum": 0})["object_id"]) == list(alone["object_id"])
    assert len(api.estimate(**both, fuse={"image": 2}, score_threshold=-1)) > 0
    assert len(api.search(object_id=ID, modality="both", k=2)) == 2
    examples = {"positive": [{"object_id": ID}, {"object_id": "sim-00000050"}], "strategy": "best_score"}
    assert len(api.search(query={"combine": examples}, k=4)) == 4


def test_many_vectors_at_once(api, engine):
    rows = np.flatnonzero(engine.index.catalog.flag("has_spectrum"))[:3]
    vectors = np.stack([engine.index.vector(int(row), "spectrum") for row in rows])
    table = api.search_vectors(
        vectors, "spectrum", target="spectrum", k=4, filter={"column": "redshift", "range": [0, 9]}
    )
    assert list(table["query"]) == [i for i in range(3) for _ in range(4)]
    own = [engine.index.catalog.row(int(row))["object_id"] for row in rows]
    assert list(table["object_id"][::4]) == own and table.meta["index"]["id"] == "test"
    with pytest.raises(InputError, match="shape"):
        api.search_vectors(np.ones((2, 3)), "spectrum")
    line = calls.search_vectors(vectors, "spectrum", k=2).curl("http://host")
    assert "--data-binary @FILE" in line and "modality=spectrum&k=2" in line


def test_missing_values_are_masked(api):
    table = api.search(object_id="sim-00000010", k=50, target="spectrum")
    row = list(table["object_id"]).index("sim-00000011")
    assert table["log_stellar_mass"].mask[row]


def test_objects_and_info(api):
    assert api.object(ID)["object_id"] == ID
    assert len(api.random_objects(4, seed=1)) == 4
    assert api.info()["indexes"][0]["id"] == "test"


def test_errors_are_those_of_the_library(api, spectrum):
    with pytest.raises(NotFoundError, match="no object"):
        api.object("a/b c?d#e")
    with pytest.raises(InputError) as caught:
        api.search(object_id=ID, k=100000)
    assert caught.value.field == "k" and caught.value.limit == 100
    with pytest.raises(MediaTypeError):
        api.embed_image(b"\x00\x01\x02" * 100)
    with pytest.raises(ProvenanceError):
        api.search(query={"vector": [1.0] * 16, "modality": "image", "model_sha256": "00"})
    with pytest.raises(LimitError):
        api.embed_spectrum(bytes(40 * 2**20))
    with pytest.raises(InputError, match="unreadable|cannot be read"):
        api.embed_image("/no/such/file.fits")


@pytest.mark.parametrize(
    "asked", [{}, {"object_id": ID, "position": (1, 2)}, {"vector": [1.0]}, {"position": "somewhere"}]
)
def test_nonsense_is_refused_before_it_is_sent(asked):
    with pytest.raises(InputError):
        calls.search(**asked)


def test_sync_and_async_agree(app, api, galaxy, spectrum):
    """The same calls through both clients, answer by answer."""
    steps = [
        lambda c: c.embed_image(galaxy.pixels),
        lambda c: c.embed_spectrum(desi_fits([spectrum])),
        lambda c: c.embed("image", galaxy.pixels),
        lambda c: c.search(object_id=ID, k=3, filter={"column": "redshift", "range": [0, 1]}),
        lambda c: c.estimate(spectrum=spectrum_csv(spectrum), k=3),
        lambda c: c.object(ID),
        lambda c: c.objects((180.2, -0.2), 40),
        lambda c: c.random_objects(3, seed=2),
    ]

    async def asynchronously():
        async with AsyncClient("http://test", transport=httpx2.ASGITransport(app)) as client:
            return [await step(client) for step in steps]

    for one, other in zip([step(api) for step in steps], asyncio.run(asynchronously()), strict=True):
        if isinstance(one, dict):
            assert one == other
        elif isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one.pformat() == other.pformat()


def test_both_clients_offer_the_same_methods():
    def methods(kind):
        public = {name: f for name, f in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
        return {name: list(inspect.signature(f).parameters) for name, f in public.items()}

    assert methods(Client) == methods(AsyncClient)


# --- a server that misbehaves ----------------------------------------------------------------------------------------


class Server:
    """Answers from a list, and counts."""

    def __init__(self, *answers: httpx2.Response) -> None:
        self.answers, self.seen = list(answers), 0

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        answer = self.answers[min(self.seen, len(self.answers) - 1)]
        self.seen += 1
        return answer


def busy(status: int = 429, wait: str | None = "0") -> httpx2.Response:
    error = {"code": "overloaded", "message": "Full house just now.", "field": None, "limit": None, "request_id": "r"}
    return httpx2.Response(status, json={"error": error}, headers={"retry-after": wait} if wait else {})


def client_of(server: Server, **retry) -> Client:
    return Client("http://test", transport=httpx2.MockTransport(server), retry=Retry(**{"backoff_s": 0.0, **retry}))


def test_retries_until_there_is_room():
    server = Server(busy(), busy(503, None), httpx2.Response(200, json={"indexes": []}))
    assert client_of(server).info() == {"indexes": []} and server.seen == 3


def test_gives_up_after_its_tries():
    server = Server(busy(wait="0"))
    with pytest.raises(OverloadError, match="Full house"):
        client_of(server, times=2).info()
    assert server.seen == 3
    with pytest.raises(NotReadyError):
        client_of(Server(busy(503)), times=0).info()


def test_does_not_wait_longer_than_told():
    server = Server(busy(wait="3600"))
    with pytest.raises(OverloadError) as caught:
        client_of(server).info()
    assert server.seen == 1 and caught.value.retry_after_s == 3600


def test_other_errors_are_not_retried():
    server = Server(httpx2.Response(422, json={"error": {"code": "x", "message": "no good"}}))
    with pytest.raises(InputError, match="no good"):
        client_of(server).info()
    assert server.seen == 1


@pytest.mark.parametrize("answer", [httpx2.Response(502, text="<html>"), httpx2.Response(200, text="<html>hello")])
def test_foreign_answers(answer):
    with pytest.raises(AstroClipError) as caught:
        client_of(Server(answer)).info()
    assert caught.value.code == "foreign_answer"


def test_nobody_there():
    with pytest.raises(AstroClipError) as caught:
        Client("http://127.0.0.1:1").info()
    assert caught.value.code == "unreachable" and "astroclip demo" in str(caught.value)


def test_curl_says_the_same_request(tmp_path):
    path = tmp_path / "s.fits"
    path.write_bytes(b"x")
    line = calls.search(spectrum=path, k=3).curl("http://host:8000/")
    assert line == (
        f"""curl -X POST http://host:8000/v1/search -F spectrum=@{path} -F 'request={{"k": 3}};type=application/json'"""
    )
    line = calls.search(object_id="a b", k=3).curl("http://host")
    assert json.loads(line.split(" -d ")[1].strip("'")) == {"query": {"object_id": "a b"}, "k": 3}


def test_client_is_light():
    """Neither torch nor faiss, and astropy not before a table is made."""
    heavy = "torch", "faiss", "transformers", "astropy", "pyarrow", "fastapi", "astroclip.io", "astroclip.models"
    code = f"import sys, astroclip.client; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_array_that_is_none():
    with pytest.raises(InputError, match="wanted numbers"):
        calls.embed_array("image", [np.array(["a"])], {})
    with pytest.raises(InputError, match="no option"):
        calls.embed_array("image", [npy(np.ones(3))], {"pixelscale": 1})


# --- API keys --------------------------------------------------------------------------------------------------------

KEY = "ac_abcdefgh_" + "0123456789abcdef" * 4


def sends(answer, **options):
    """What a client of a server that gives `answer` sent, sync and async: two lists of requests."""
    heard: tuple[list, list] = ([], [])

    def handler(seen):
        def handle(request):
            seen.append(request)
            return answer(request)

        return handle

    async def ask():
        transport = httpx2.MockTransport(handler(heard[1]))
        async with AsyncClient("http://service.example", transport=transport, **options) as client:
            client._http.follow_redirects = True  # not what we do; the key must be safe even so
            await client.info()

    with Client("http://service.example", transport=httpx2.MockTransport(handler(heard[0])), **options) as client:
        client._http.follow_redirects = True
        client.info()
    asyncio.run(ask())
    return heard


@pytest.mark.parametrize(
    ("given", "environment", "sent"),
    [(KEY, None, KEY), (None, KEY, KEY), (f" {KEY}\n", "other", KEY), (None, None, None), ("", KEY, None)],
)
def test_key_is_sent_as_given_or_as_in_the_environment(monkeypatch, given, environment, sent):
    monkeypatch.delenv("ASTROCLIP_API_KEY", raising=False)
    if environment:
        monkeypatch.setenv("ASTROCLIP_API_KEY", environment)
    for heard in sends(lambda request: httpx2.Response(200, json={}), api_key=given):
        assert [request.headers.get("authorization") for request in heard] == [sent and f"Bearer {sent}"]


def test_key_is_not_sent_to_where_a_redirect_leads():
    def answer(request):
        if request.url.host == "service.example":
            return httpx2.Response(302, headers={"location": "http://elsewhere.example/v1/info"})
        return httpx2.Response(200, json={})

    for heard in sends(answer, api_key=KEY):
        assert [request.url.host for request in heard] == ["service.example", "elsewhere.example"]
        assert heard[0].headers["authorization"] == f"Bearer {KEY}"
        assert KEY not in str(heard[1].headers.raw)


def test_redirects_are_not_followed_at_all():
    transport = httpx2.MockTransport(lambda request: httpx2.Response(302, headers={"location": "http://else.example/"}))
    with Client("http://service.example", transport=transport, api_key=KEY) as client:
        with pytest.raises(AstroClipError, match="is service.example an astroclip service"):
            client.info()


def test_key_appears_in_no_log_repr_or_error(caplog):
    caplog.set_level("DEBUG")

    def fail(request):
        raise httpx2.ConnectError("refused")

    with Client("http://service.example", transport=httpx2.MockTransport(fail), api_key=KEY) as client:
        with pytest.raises(AstroClipError) as caught:
            client.info()
        assert KEY not in str(caught.value) + repr(client._http.headers) + repr(client) + caplog.text
    with pytest.raises(AstroClipError) as caught:  # over the real transport, to a port where nobody listens
        Client("http://127.0.0.1:9", api_key=KEY, timeout_s=1).info()
    assert KEY not in str(caught.value) + caplog.text


@pytest.mark.parametrize("wrong", ["ac_x y", "ac_x\r\nx-evil: 1", "clé", "ac_\x00"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_can_be_no_key_is_refused_without_being_shown(kind, wrong):
    with pytest.raises(InputError) as caught:
        kind(api_key=wrong)
    assert caught.value.code == "bad_api_key" and wrong not in str(caught.value)


def test_refusals_are_access_errors(settings, engine, tmp_path):
    from service.keys import changing, new_key

    with changing(tmp_path / "keys.json") as held:
        for scope in ("read", "admin"):
            text, key = new_key([scope])
            held.append(key)
            if scope == "read":
                reader = text
    app = make_app(settings.model_copy(update={"keys_file": tmp_path / "keys.json"}), engine)
    for key, kind, code in (
        (None, AccessError, "key_missing"),
        (KEY, AccessError, "key_unknown"),
        (text, ForbiddenError, "key_scope"),
    ):
        with Client("http://test", transport=InProcessTransport(app), api_key=key) as api:
            with pytest.raises(kind) as caught:
                api.object(ID)
            assert type(caught.value) is kind and caught.value.code == code
    with Client("http://test", transport=InProcessTransport(app), api_key=reader) as api:
        assert api.object(ID)["object_id"] == ID
