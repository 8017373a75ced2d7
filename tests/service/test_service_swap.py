"""Replacing the index while serving: whole, proven, or not at all."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import time
import weakref
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest

from index import SurveyIndex
from index.manifest import Manifest
from service.app import make_app
from service.engine import Engine
from service.keys import changing, new_key
from service.settings import Settings


def publish(root: Path, source: Path, name: str, **changes) -> str:
    """A version of the index made from the plain one in `source`; the digest of its manifest."""
    folder = root / "versions" / name
    shutil.copytree(source, folder)
    manifest, _ = Manifest.read(folder)
    manifest = replace(manifest, **{"survey": f"survey {name}", **changes}).with_files(folder, manifest.files)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    (root / "CURRENT.new").symlink_to(Path("versions") / name)
    os.replace(root / "CURRENT.new", root / "CURRENT")
    return Manifest.read(folder)[1]


@pytest.fixture
def root(index_dir, tmp_path) -> Path:
    publish(tmp_path, index_dir, "v1")
    return tmp_path


@asynccontextmanager
async def serving(root: Path, model: Path, **settings):
    """(app, client) of a service over `root`; its lifespan runs."""
    with changing(root / "keys.json") as held:
        text, key = new_key(["read", "admin"])
        held.append(key)
    given = Settings(index_dir=root, model_dir=model, keys_file=root / "keys.json", **{"watch_index_s": 0, **settings})
    engine = Engine.load(given)
    app = make_app(given, engine)
    del engine
    try:
        async with app.router.lifespan_context(app):
            transport = httpx2.ASGITransport(app=app)
            headers = {"Authorization": f"Bearer {text}"}
            async with httpx2.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
                yield app, client
    finally:
        app.state.engine.close()


def run(test):
    return asyncio.run(asyncio.wait_for(test, 120))


async def served(client) -> str:
    return (await client.get("/readyz")).json()["index"]["manifest_sha256"]


def test_the_admin_call_swaps_to_what_current_names(root, index_dir, tiny_model_dir, caplog):
    async def test():
        async with serving(root, tiny_model_dir) as (app, client):
            first = await served(client)
            unchanged = (await client.post("/v1/admin/index/reload")).json()
            assert unchanged["outcome"] == "unchanged" and unchanged["manifest_sha256"] == first
            second = publish(root, index_dir, "v2")
            assert await served(client) == first  # not before it is asked to
            answer = (await client.post("/v1/admin/index/reload")).json()
            assert answer["outcome"] == "swapped"
            assert (answer["before_sha256"], answer["manifest_sha256"]) == (first, second)
            (line,) = [r.audit for r in caplog.records if getattr(r, "audit", {}).get("outcome") == "swapped"]
            assert line["action"] == "reload_index" and line["now"] == second
            assert await served(client) == second
            info = (await client.get("/v1/info")).json()
            assert info["indexes"][0]["survey"] == "survey v2"
            text = app.state.metrics.text().decode()
            assert 'astroclip_index_swaps_total{outcome="swapped"} 1.0' in text and second in text

    run(test())


@pytest.mark.parametrize("how", ["signal", "watch"])
def test_signal_and_changed_current_swap_too(root, index_dir, tiny_model_dir, how):
    async def test():
        async with serving(root, tiny_model_dir, watch_index_s=0.1 if how == "watch" else 0) as (_, client):
            second = publish(root, index_dir, "v2")
            if how == "signal":
                os.kill(os.getpid(), signal.SIGHUP)
            for _ in range(100):
                if await served(client) == second:
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("not swapped")

    run(test())


def test_who_asks_while_the_next_swap_is_due_joins_it(root, index_dir, tiny_model_dir):
    """The one at work has ended, and the next, which waited for it, has not begun: two would run at once."""

    async def test():
        async with serving(root, tiny_model_dir) as (app, _):
            swapper, swaps = app.state.swapper, []
            real = swapper._swap

            async def counted():
                swaps.append(1)
                return await real()

            swapper._swap = counted
            first = asyncio.create_task(swapper.reload())
            await asyncio.sleep(0)
            second = asyncio.create_task(swapper.reload())
            await asyncio.sleep(0)
            running = swapper._running
            while not running.done():
                await asyncio.sleep(0)
            await asyncio.gather(swapper.reload(), first, second)
            assert len(swaps) == 2

    run(test())


def test_a_root_that_cannot_be_looked_at_for_a_while_is_watched_on(
    root, index_dir, tiny_model_dir, monkeypatch, caplog
):
    async def test():
        import service.swap

        real, away = service.swap._signature, [True]

        def signature(path):
            if path == root and away[0]:  # other applications of this process look after theirs
                away.append(True)
                raise PermissionError(13, "the file server is away", str(path))
            return real(path)

        monkeypatch.setattr(service.swap, "_signature", signature)
        async with serving(root, tiny_model_dir, watch_index_s=0.02) as (_, client):
            second = publish(root, index_dir, "v2")
            while len(away) < 5:
                await asyncio.sleep(0.01)
            assert await served(client) != second
            away[0] = False
            for _ in range(200):
                if await served(client) == second:
                    break
                await asyncio.sleep(0.02)
            assert await served(client) == second
        assert caplog.text.count("cannot look for another version") == 1

    run(test())


def test_an_index_of_another_model_is_refused_and_the_old_one_serves(root, index_dir, tiny_model_dir):
    async def test():
        async with serving(root, tiny_model_dir) as (_, client):
            first = await served(client)
            publish(root, index_dir, "v2", model={"id": "other", "sha256": "cd" * 32})
            answer = await client.post("/v1/admin/index/reload")
            assert answer.status_code == 409 and answer.json()["error"]["code"] == "model_index_mismatch"
            ready = (await client.get("/readyz")).json()
            assert ready["index"]["manifest_sha256"] == first and "cdcdcd" in ready["warnings"][0]
            publish(root, index_dir, "v3")
            assert (await client.post("/v1/admin/index/reload")).json()["outcome"] == "swapped"
            assert (await client.get("/readyz")).json()["warnings"] == []

    run(test())


def test_a_damaged_index_is_refused_by_name_and_logged_once(root, index_dir, tiny_model_dir, caplog):
    async def test():
        async with serving(root, tiny_model_dir, watch_index_s=0.05) as (app, client):
            first = await served(client)
            publish(root, index_dir, "v2")
            content = bytearray((root / "CURRENT" / "vectors-image.npy").read_bytes())
            content[-1] ^= 1
            (root / "CURRENT" / "vectors-image.npy").write_bytes(content)
            for _ in range(3):
                answer = await client.post("/v1/admin/index/reload")
                assert answer.status_code == 503 and "vectors-image.npy" in answer.json()["error"]["message"]
            await asyncio.sleep(0.3)
            assert await served(client) == first

    run(test())
    said = [record for record in caplog.records if record.name == "astroclip.service"]
    assert sum("the index was not replaced" in record.getMessage() for record in said) == 1


def test_an_index_that_does_not_find_itself_is_refused(root, index_dir, tiny_model_dir, monkeypatch):
    """A table whose rows are exchanged finds vectors, but other objects; one of another scale finds nothing near."""

    async def test():
        async with serving(root, tiny_model_dir) as (_, client):
            first = await served(client)
            publish(root, index_dir, "v2")
            real = SurveyIndex.search

            def broken(self, queries, **more):
                hits, report = real(self, np.roll(np.atleast_2d(queries), 1, axis=1), **more)
                return hits, report

            monkeypatch.setattr(SurveyIndex, "search", broken)
            answer = await client.post("/v1/admin/index/reload")
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "canary_failed"
            assert await served(client) == first

    run(test())


def test_a_model_that_answers_otherwise_keeps_the_old_index(root, index_dir, tiny_model_dir):
    async def test():
        async with serving(root, tiny_model_dir) as (app, client):
            publish(root, index_dir, "v2")
            app.state.engine._known = {kind: -vector for kind, vector in app.state.engine._known.items()}
            answer = await client.post("/v1/admin/index/reload")
            assert answer.status_code == 503
            assert app.state.engine.index.manifest.survey == "survey v1"

    run(test())


def test_triggers_during_a_swap_share_the_next_one(root, index_dir, tiny_model_dir, monkeypatch):
    async def test():
        async with serving(root, tiny_model_dir) as (app, _):
            import service.swap

            real, loads = service.swap._load, []

            def slow(*arguments):
                loads.append(time.monotonic())
                time.sleep(0.2)
                return real(*arguments)

            monkeypatch.setattr(service.swap, "_load", slow)
            publish(root, index_dir, "v2")
            first = asyncio.create_task(app.state.swapper.reload())
            await asyncio.sleep(0.05)
            last = publish(root, index_dir, "v3")
            others = await asyncio.gather(*(app.state.swapper.reload() for _ in range(10)))
            await first
            assert len(loads) == 2 and {swap.manifest_sha256 for swap in others} == {last}

    run(test())


def test_a_request_keeps_its_index_and_the_old_one_is_freed_after_it(root, index_dir, tiny_model_dir):
    async def test():
        async with serving(root, tiny_model_dir) as (app, client):
            first = await served(client)
            request = {"query": {"object_id": "sim-00000010"}, "target": "spectrum", "k": 3}
            await client.post("/v1/search", json=request)
            old = weakref.ref(app.state.engine.index)
            held = app.state.engine  # as a request at work holds it
            publish(root, index_dir, "v2")
            await client.post("/v1/admin/index/reload")
            assert held.index.manifest_sha256 == first and old() is not None
            del held
            answer = (await client.post("/v1/search", json=request)).json()
            assert answer["index"]["manifest_sha256"] != first
            for _ in range(50):
                gc.collect()
                if old() is None:
                    return
                await asyncio.sleep(0.05)
            raise AssertionError([type(r) for r in gc.get_referrers(old())])

    run(test())


def test_new_lists_beside_the_same_index_are_served(root, index_dir, tiny_model_dir):
    from index.lists_build import build_lists

    async def test():
        async with serving(root, tiny_model_dir) as (_, client):
            assert (await client.get("/v1/lists/isolated")).status_code == 404
            build_lists(root)
            assert (await client.post("/v1/admin/index/reload")).json()["outcome"] == "lists"
            assert (await client.get("/v1/lists/isolated")).status_code == 200
            assert (await client.post("/v1/admin/index/reload")).json()["outcome"] == "unchanged"

    run(test())


def test_the_admin_call_takes_no_path(root, index_dir, tiny_model_dir):
    async def test():
        async with serving(root, tiny_model_dir) as (app, client):
            answer = await client.post("/v1/admin/index/reload", json={"path": str(index_dir)})
            assert answer.json()["outcome"] == "unchanged"
            assert app.state.engine.index.manifest.survey == "survey v1"

    run(test())
