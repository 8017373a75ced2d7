"""API keys: who is let in, what a key file may look like, what is written down; CORS and security headers."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import stat
import time
from datetime import UTC, datetime, timedelta

import pytest
import typer
from fastapi import Request
from starlette.routing import Route
from starlette.testclient import TestClient
from typer.testing import CliRunner

from astroclip.errors import InputError
from service import cli, key_commands, keys
from service.access import needed_scope
from service.app import make_app
from service.audit import audit
from service.keys import FORM, KeyRing, changing, new_key, read_keys
from service.settings import Settings

READ = "/v1/objects/sim-00000020"
ADMIN = "/v1/admin/who"  # a route of these tests
OPEN = ["/livez", "/readyz", "/docs", "/openapi.json", "/", "/page/page.css", "/page/js/app.js"]


def add(path, *scopes, **options) -> str:
    with changing(path) as held:
        text, key = new_key(scopes or ("read",), **options)
        held.append(key)
    return text


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def serve(settings, engine):
    def serve(**update) -> TestClient:
        app = make_app(settings.model_copy(update=update), engine)

        @app.post(ADMIN)
        async def who(request: Request) -> dict[str, str]:
            audit(request, "look", "done", index="a\nb")
            return {"caller": request.state.trace.caller}

        return TestClient(app)

    return serve


def refused(response, status: int, code: str) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code and error["request_id"] == response.headers["x-request-id"]
    assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert response.headers["x-content-type-options"] == "nosniff"
    return error


# --- who is let in ---------------------------------------------------------------------------------------------------


def test_open_service_takes_all_but_admin_calls(serve, path):
    client = serve()
    assert client.get(READ).status_code == 200
    assert client.get(READ, headers=bearer("ac_whatever")).status_code == 200  # a client may have a key for elsewhere
    for headers in ({}, bearer(add(path, "admin"))):
        error = refused(client.post(ADMIN, headers=headers), 403, "admin_off")
        assert "astroclip keys create --scope admin" in error["message"]


def test_read_key_reads_and_admin_key_administers(serve, path):
    reader, chief, both = add(path), add(path, "admin"), add(path, "read", "admin")
    client = serve(keys_file=path)
    for headers in (bearer(reader), {"x-api-key": reader}, {"authorization": f"bearer  {reader} "}, bearer(both)):
        assert client.get(READ, headers=headers).status_code == 200
    assert "this call wants admin" in refused(client.post(ADMIN, headers=bearer(reader)), 403, "key_scope")["message"]
    refused(client.get(READ, headers=bearer(chief)), 403, "key_scope")
    for key in (chief, both):
        assert client.post(ADMIN, headers=bearer(key)).json() == {"caller": key.split("_")[1]}


def test_without_a_good_key_nothing_is_answered_but_what_is_open(serve, path):
    """Every route of the application: a new one is closed unless it is named open."""
    add(path)
    client = serve(keys_file=path)
    routes = {route.path for route in client.app.routes if isinstance(route, Route)} | set(
        client.app.openapi()["paths"]
    )
    assert len(routes) > 15
    for route in routes - {"/page/{name:path}"}:
        for method in ("GET", "POST", "OPTIONS"):
            response = client.request(method, route)
            if route in OPEN:
                assert response.status_code in (200, 405), route
            else:
                refused(response, 401, "key_missing")
    for name in OPEN:
        assert client.get(name, headers=bearer("junk")).status_code == 200, name
    for name in ("/nowhere", "/page", "//v1/info", "/livez/../v1/info", "/v1", "/openapi.json/", "/V1/info"):
        assert client.get(name).status_code == 401, name


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/admin", "admin"),
        ("/v1/admin/", "admin"),
        ("/v1/admin/index", "admin"),
        ("/v1/administrators", "read"),
        ("/v1/search", "read"),
        ("/metrics", "read"),
        ("/pages/", "read"),
        ("/page/x", None),
        ("/readyz", None),
    ],
)
def test_scope_goes_by_the_path(path, scope):
    assert needed_scope(path) == scope


def test_a_prefix_before_the_path_does_not_lower_the_scope(settings, engine, path):
    reader, chief = add(path), add(path, "admin")
    app = make_app(settings.model_copy(update={"keys_file": path}), engine)
    client = TestClient(app, root_path="/galaxies")
    assert client.get("/galaxies/livez").status_code == 200
    refused(client.post("/galaxies/v1/admin/x", headers=bearer(reader)), 403, "key_scope")
    assert client.post("/galaxies/v1/admin/x", headers=bearer(chief)).status_code == 404


def test_bad_keys(serve, path):
    good = add(path)
    client = serve(keys_file=path)
    other, _ = new_key(["read"])
    for wrong in (
        other,
        good[:-1],
        good + "0",
        good[:-1] + ("0" if good[-1] != "0" else "1"),
        good.upper(),
        "é",
        "ac_",
    ):
        refused(client.get(READ, headers={b"x-api-key": wrong.encode("latin-1", "replace")}), 401, "key_unknown")
        assert wrong not in client.get(READ, headers={b"x-api-key": wrong.encode()}).text
    for empty in ({"x-api-key": " "}, {"authorization": "Bearer "}, {"authorization": "Basic dTpw"}):
        refused(client.get(READ, headers=empty), 401, "key_missing")
    assert client.get(READ, headers={"authorization": "Basic dTpw", "x-api-key": good}).status_code == 200


def test_expiry(serve, path):
    now = datetime.now(UTC)
    soon, past = add(path, expires=now + timedelta(minutes=1)), add(path, expires=now - timedelta(seconds=1))
    client = serve(keys_file=path)
    assert client.get(READ, headers=bearer(soon)).status_code == 200
    refused(client.get(READ, headers=bearer(past)), 401, "key_expired")
    key = read_keys(path)[0]
    assert not key.expired(key.expires.timestamp() - 1) and key.expired(key.expires.timestamp())


def test_metrics_want_a_key_unless_opened(serve, path):
    key = add(path)
    refused(serve(keys_file=path).get("/metrics"), 401, "key_missing")
    assert serve(keys_file=path).get("/metrics", headers=bearer(key)).status_code not in (401, 403)
    opened = serve(keys_file=path, metrics_open=True)
    assert opened.get("/metrics").status_code not in (401, 403)
    answers = opened.get("/openapi.json").json()["paths"]["/metrics"]["get"]["responses"]
    assert "429" in answers and "401" not in answers  # its rate is bounded all the same


@pytest.mark.parametrize("presented", ["known", "other secret", "unknown id", "no form", ""])
def test_every_key_costs_one_digest_and_one_comparison(path, monkeypatch, presented):
    """By construction, not by the clock: the same work whether the id exists, the secret is wrong, or all is noise."""
    text = add(path)
    ring = KeyRing(path)
    ask = {
        "known": text,
        "other secret": text[:12] + "0" * 64,
        "unknown id": "ac_zzzzzzzz" + text[11:],
        "no form": "hunter2",
        "": "",
    }[presented]
    digests, comparisons = [], []
    sha256, compare = hashlib.sha256, hmac.compare_digest
    monkeypatch.setattr(keys.hashlib, "sha256", lambda data: digests.append(data) or sha256(data))
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: comparisons.append((a, b)) or compare(a, b))
    assert (ring.holder(ask) is not None) == (presented == "known")
    assert digests == [ask.encode()]
    [(found, expected)] = comparisons
    assert len(found) == len(expected) == 32 and isinstance(found, bytes) and isinstance(expected, bytes)


# --- the file --------------------------------------------------------------------------------------------------------


def test_keys_are_long_random_and_kept_as_hashes(path):
    texts = [add(path, note="a") for _ in range(3)]
    content = path.read_text()
    for text in texts:
        assert FORM.fullmatch(text) and len(bytes.fromhex(text.split("_")[2])) == 32
        assert text not in content and text.split("_")[2] not in content
        assert hashlib.sha256(text.encode()).hexdigest() in content
    assert len(set(texts)) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing left beside it


def test_a_failed_change_leaves_the_file_as_it_was(path, monkeypatch):
    add(path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), changing(path) as held:
        held.clear()
        raise RuntimeError
    monkeypatch.setattr(keys.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"), changing(path) as held:
        held.clear()
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_link_to_the_file_stays_one(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    add(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(read_keys(path)) == 1


DAMAGED = {
    "half": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "not json": lambda good: b"\xff\x00",
    "a list": lambda good: b"[]",
    "other version": lambda good: good.replace(b'"version": 1', b'"version": 2'),
    "short hash": lambda good: good.replace(json.loads(good)["keys"][0]["sha256"].encode(), b"ab"),
    "unknown scope": lambda good: good.replace(b'"read"', b'"root"'),
    "no scope": lambda good: json.dumps({"keys": [json.loads(good)["keys"][0] | {"scopes": []}]}).encode(),
    "misspelt expiry": lambda good: good.replace(b'"expires"', b'"expire"'),
    "naive time": lambda good: good.replace(b'"expires": null', b'"expires": "2030-01-01T00:00:00"'),
    "twice": lambda good: json.dumps({"keys": json.loads(good)["keys"] * 2}).encode(),
    "huge": lambda good: good + b" " * keys.MAX_BYTES,
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_file_is_refused_at_the_start_and_by_the_commands(settings, engine, path, how):
    add(path)
    damaged = DAMAGED[how](path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"keys\.json"):
        make_app(settings.model_copy(update={"keys_file": path}), engine)
    with pytest.raises(InputError, match=r"keys\.json"):
        add(path)
    assert path.read_bytes() == damaged


def test_file_just_within_its_size(path):
    add(path)
    path.write_bytes(path.read_bytes().ljust(keys.MAX_BYTES))
    assert len(read_keys(path)) == 1


def test_missing_file_is_refused_at_the_start(settings, engine, path):
    with pytest.raises(InputError, match="astroclip keys create"):
        make_app(settings.model_copy(update={"keys_file": path}), engine)


def test_changed_file_is_read_anew(serve, path, monkeypatch):
    monkeypatch.setattr(keys, "CHECK_S", 0.0)
    first = add(path)
    client = serve(keys_file=path)
    second = add(path)
    assert client.get(READ, headers=bearer(second)).status_code == 200
    with changing(path) as held:
        held[:] = [key for key in held if key.id != first.split("_")[1]]
    refused(client.get(READ, headers=bearer(first)), 401, "key_unknown")
    assert client.get(READ, headers=bearer(second)).status_code == 200


@pytest.mark.parametrize("how", [*DAMAGED, "away"])
def test_file_that_goes_bad_keeps_the_old_keys_and_says_so_once(path, monkeypatch, caplog, how):
    monkeypatch.setattr(keys, "CHECK_S", 0.0)
    text = add(path)
    ring = KeyRing(path)
    good = path.read_bytes()
    path.unlink() if how == "away" else path.write_bytes(DAMAGED[how](good))
    for _ in range(3):
        assert ring.holder(text)
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "stay in force" in caplog.text
    assert text not in caplog.text and hashlib.sha256(text.encode()).hexdigest() not in caplog.text
    other = add(path) if how == "away" else None  # mended
    if other is None:
        path.write_bytes(good)
    assert (ring.holder(text) is None) == (how == "away")


def test_file_is_looked_at_once_a_second_at_most(path, monkeypatch):
    text = add(path)
    ring = KeyRing(path)
    looked = []
    monkeypatch.setattr(ring, "_signature", lambda: looked.append(1) or ring._seen)
    now = time.monotonic()
    for after, times in ((0.5, 0), (1.5, 1), (2.0, 1), (2.6, 2)):
        monkeypatch.setattr(keys.time, "monotonic", lambda after=after: now + after)
        ring.holder(text)
        assert len(looked) == times


@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o620, True)]
)
def test_warns_of_a_file_that_others_may_use(path, caplog, mode, warned):
    add(path)
    path.chmod(mode)
    KeyRing(path)
    assert ("chmod 600" in caplog.text) == warned


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(path):
    app = typer.Typer()
    key_commands.register(app)

    def run(*words: str, **environment: str):
        result = CliRunner().invoke(app, ["keys", *words], env=environment)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return run


def test_create_list_revoke(run, path, serve):
    options = ["--note", "night batch", "--days", "30", "--rate-per-s", "2.5", "--in-flight", "4"]
    made = run("create", "--file", str(path), "--scope", "read", "--scope", "admin", *options)
    text = made.stdout.strip()
    assert FORM.fullmatch(text) and "shown once" in made.stderr and text not in made.stderr
    [key] = read_keys(path)
    assert key.scopes == {"read", "admin"} and key.note == "night batch"
    assert (key.max_rate_per_s, key.max_in_flight) == (2.5, 4)
    assert abs(key.expires.timestamp() - time.time() - 30 * 86400) < 60
    assert serve(keys_file=path).get(READ, headers=bearer(text)).status_code == 200
    plain = run("create", ASTROCLIP_KEYS_FILE=str(path)).stdout.strip()  # read alone, never expires
    listed = run("list", ASTROCLIP_KEYS_FILE=str(path)).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["id", key.id, plain.split("_")[1]]
    assert "night batch" in listed and "never" in listed and text not in listed and key.sha256 not in listed
    run("revoke", key.id, "--file", str(path))
    assert [left.scopes for left in read_keys(path)] == [{"read"}]
    with pytest.raises(InputError, match="holds no key"):
        run("revoke", key.id, "--file", str(path))


def test_commands_refuse_what_makes_no_sense(run, path, tmp_path):
    for days in ("0", "-1", "36501", "nan"):
        with pytest.raises(InputError, match="--days"):
            run("create", "--file", str(path), "--days", days)
    assert not path.exists()
    run("create", "--file", str(path), "--days", "36500")
    with pytest.raises(InputError, match="no directory"):
        run("create", "--file", str(tmp_path / "none" / "keys.json"))
    with pytest.raises(InputError, match="cannot be read"):
        run("list", "--file", str(tmp_path / "none.json"))


def test_in_process_search_needs_no_key(settings, path, monkeypatch):
    """Who can read the index needs no key to it, though the environment names a key file for a service."""
    add(path)
    monkeypatch.setenv("ASTROCLIP_KEYS_FILE", str(path))
    app = typer.Typer()
    cli.register(app)
    where = ["--index", str(settings.index_dir), "--model", str(settings.model_dir), "--format", "csv"]
    result = CliRunner().invoke(app, ["search", "--id", "sim-00000020", *where])
    assert result.exit_code == 0 and result.stdout.startswith("object_id"), result.output


# --- what is written down --------------------------------------------------------------------------------------------


def test_audit_line_of_an_admin_action(serve, path, caplog):
    chief = add(path, "admin")
    client = serve(keys_file=path)
    with caplog.at_level(logging.INFO, "astroclip.audit"):
        client.post(ADMIN, headers={**bearer(chief), "x-request-id": "mine-1"})
    [record] = caplog.records
    line = json.loads(record.getMessage())
    assert "\n" not in record.getMessage() and record.audit == line
    assert line == {
        "action": "look",
        "outcome": "done",
        "key": chief.split("_")[1],
        "address": "testclient",
        "call": f"POST {ADMIN}",
        "request_id": "mine-1",
        "index": "a\nb",
    }


def test_audit_line_of_an_action_that_writes_none(serve, path, caplog):
    chief = add(path, "admin")
    client = serve(keys_file=path)

    @client.app.post(ADMIN + "/silent")
    async def silent() -> dict[str, str]:
        return {}

    with caplog.at_level(logging.INFO, "astroclip.audit"):
        assert client.post(ADMIN + "/silent", headers=bearer(chief)).status_code == 200
    (line,) = [record.audit for record in caplog.records if record.name == "astroclip.audit"]
    assert (line["action"], line["outcome"]) == ("admin_call", "done") and "reason" not in line


def test_audit_line_of_what_never_reached_an_action(serve, path, caplog):
    chief = add(path, "admin")
    client = serve(keys_file=path, max_rate_per_s=0.1)
    with caplog.at_level(logging.INFO, "astroclip.audit"):
        for call in (ADMIN + "/nothing", ADMIN):  # one passes in ten seconds
            client.post(call, headers=bearer(chief))
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "astroclip.audit"]
    assert [(line["key"], line["outcome"], line["reason"]) for line in lines] == [
        (chief.split("_")[1], "refused", "not_found"),
        (chief.split("_")[1], "refused", "too_many_requests"),
    ]


def test_audit_line_of_refused_attempts(serve, path, caplog):
    reader, past = add(path), add(path, "admin", expires=datetime.now(UTC) - timedelta(days=1))
    client = serve(keys_file=path)
    with caplog.at_level(logging.INFO, "astroclip.audit"):
        for headers in ({}, bearer("ac_junk"), bearer(reader), bearer(past)):
            client.post(ADMIN + "/%0Ax", headers=headers)
        client.get(READ)  # refused as well, and no admin call
        serve().post(ADMIN)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "astroclip.audit"]
    assert all(line["action"] == "admin_call" and line["outcome"] == "refused" for line in lines)
    ids = [key.split("_")[1] for key in (reader, past)]
    assert [(line["key"], line["reason"]) for line in lines] == [
        ("anonymous", "key_missing"),
        ("anonymous", "key_unknown"),
        (ids[0], "key_scope"),
        (ids[1], "key_expired"),
        ("anonymous", "admin_off"),
    ]
    assert not any(secret in caplog.text for secret in (reader, past, "ac_junk"))


# --- browsers --------------------------------------------------------------------------------------------------------


def test_no_cors_by_default(client):
    origin = {"origin": "https://elsewhere.example"}
    assert not [name for name in client.get(READ, headers=origin).headers if name.startswith("access-control")]
    preflight = client.options("/v1/search", headers={**origin, "access-control-request-method": "POST"})
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


def test_cors_of_named_origins_with_keys(serve, path):
    key = add(path)
    client = serve(keys_file=path, cors_origins=("https://a.example",))
    for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = client.options("/v1/search", headers={"origin": origin, **asked})
        assert preflight.headers.get("access-control-allow-origin") == allowed
        assert (preflight.status_code == 200) == bool(allowed)
        found = client.get(READ, headers={"origin": origin, **bearer(key)})
        assert found.status_code == 200 and found.headers.get("access-control-allow-origin") == allowed
        assert "access-control-allow-credentials" not in found.headers
        missing = client.get(READ, headers={"origin": origin})  # a script may read why it was refused
        assert missing.status_code == 401 and missing.headers.get("access-control-allow-origin") == allowed


def test_origins_as_a_setting(monkeypatch):
    monkeypatch.setenv("ASTROCLIP_CORS_ORIGINS", "https://a.example, http://localhost:3000")
    assert Settings().cors_origins == ("https://a.example", "http://localhost:3000")
    monkeypatch.setenv("ASTROCLIP_CORS_ORIGINS", "*")
    assert Settings().cors_origins == ("*",)
    for wrong in ("a.example", "https://a.example/", "https://a.example/page", "file:///x"):
        monkeypatch.setenv("ASTROCLIP_CORS_ORIGINS", wrong)
        with pytest.raises(ValueError, match="without a path"):
            Settings()


def test_security_headers(client):
    for name in ("/", "/docs", "/page/js/app.js", "/nowhere", READ, "/livez", f"{READ}/image.jpg"):
        assert client.get(name).headers["x-content-type-options"] == "nosniff", name
    policy = client.get("/").headers["content-security-policy"]
    for rule in ("default-src 'self'", "object-src 'none'", "base-uri 'none'", "form-action 'none'", "frame-ancestors"):
        assert rule in policy
    assert client.get("/").headers["referrer-policy"] == "no-referrer"
    assert "strict-transport-security" not in client.get("/").headers
    assert "unsafe" not in policy


def test_thumbnails_are_for_the_askers_own_cache(client):
    previews = client.get(READ).json()["object"]["previews"]
    for url in previews.values():
        assert client.get(url).headers["cache-control"].startswith("private")


def test_openapi_says_where_a_key_is_wanted(serve, path):
    add(path)
    keyed, opened = serve(keys_file=path).app.openapi(), serve().app.openapi()
    for document in (keyed, opened):
        schemes = document["components"]["securitySchemes"]
        assert {(scheme["type"], scheme.get("scheme", scheme.get("name"))) for scheme in schemes.values()} == {
            ("http", "bearer"),
            ("apiKey", "X-API-Key"),
        }
    for name, methods in keyed["paths"].items():
        for method, call in methods.items():
            wanted = needed_scope(name) is not None
            assert ("401" in call["responses"]) == ("403" in call["responses"]) == ("security" in call) == wanted
            assert "security" not in opened["paths"][name][method]
            assert ("429" in call["responses"]) == wanted or name in OPEN
    assert "403" in opened["paths"][ADMIN]["post"]["responses"]


def test_a_file_that_root_changes_stays_its_owners(path):
    """Else the service, which is not root, could no longer read it."""
    if os.geteuid() != 0:
        pytest.skip("needs root to give files away")
    add(path)
    os.chown(path, 1234, 1234)
    add(path)
    assert (path.stat().st_uid, path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (1234, 1234, 0o600)


@pytest.mark.parametrize("mend", ["mode", "nothing"])
def test_a_key_file_that_could_not_be_read_is_read_when_it_can_be(path, monkeypatch, caplog, mend):
    """A revoked key stays good until then, so no longer; owner and mode change neither time nor size."""
    monkeypatch.setattr(keys, "CHECK_S", 0.0)
    first = add(path)
    ring = KeyRing(path)
    with changing(path) as held:
        held.clear()
    second = add(path)
    read, shut = keys.read_keys, [True]

    def guarded(where):
        if shut:
            raise InputError("The key file cannot be read (Permission denied).", code="no_keys_file")
        return read(where)

    monkeypatch.setattr(keys, "read_keys", guarded)
    assert ring.holder(first) and ring.holder(first) and not ring.holder(second)
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    if mend == "mode":
        path.chmod(0o400)
    shut.clear()
    assert ring.holder(second) and not ring.holder(first)


def test_an_audit_line_is_short_whoever_is_refused(serve, caplog):
    client = serve()
    with caplog.at_level(logging.INFO, "astroclip.audit"):
        client.post("/v1/admin/" + "%00" * 20_000)
    (line,) = [record.audit for record in caplog.records if record.name == "astroclip.audit"]
    assert line["outcome"] == "refused" and len(line["call"]) <= 200
