"""The model in a process of its own: the same vectors, and nothing that happens to it happens to the service."""

from __future__ import annotations

import errno
import multiprocessing.context
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.testclient import TestClient
from survey import npy

from astroclip.errors import InputError
from service.app import make_app
from service.canary import canary
from service.engine import Engine
from service.model_process import ModelDied, NoModel, RemoteEmbedder, _answer


@pytest.fixture(scope="module")
def restarts():
    return []


@pytest.fixture(scope="module")
def remote(settings, restarts):
    embedder = RemoteEmbedder(settings, lambda: restarts.append(1))
    yield embedder.wait()
    embedder.close()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"


def ends(pid, seconds=10.0):
    end = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


@pytest.mark.parametrize("modality", ["image", "spectrum"])
@pytest.mark.parametrize("count", [1, 5])
def test_vectors_are_those_of_the_model_here(remote, tiny_embedder, modality, count):
    grids = [remote.prepare(canary(modality))] * count
    found = remote.encode(grids)
    assert found.shape == (count, tiny_embedder.dim) and found.dtype == np.float32
    np.testing.assert_allclose(found, tiny_embedder.encode(grids), atol=1e-6)


def test_it_describes_itself_as_the_embedder_does(remote, tiny_embedder):
    for name in ("model_id", "model_sha256", "preprocess_version", "dim", "modalities", "image_grid", "spectrum_grid"):
        assert getattr(remote, name) == getattr(tiny_embedder, name)
    with pytest.raises(AttributeError):
        _ = remote._nothing
    assert remote.encode([]).shape == (0, tiny_embedder.dim)


def test_what_raises_there_raises_here_and_the_process_stays(remote, restarts):
    grid, pid = remote.prepare(canary("spectrum")), remote.pid
    wrong = replace(grid, flux=grid.flux[:100], ivar=grid.ivar[:100])
    with pytest.raises(RuntimeError, match="Error"):
        remote.encode([wrong])
    assert remote.pid == pid and not restarts
    assert np.isfinite(remote.encode([grid])).all()


def killed(remote):
    """While it has nothing to do."""
    os.kill(remote.pid, signal.SIGKILL)
    wait_until(lambda: not remote._process.is_alive())  # its threads end after it


def killed_at_work(remote, grid):
    """The answer of a pass that is at work when the process is killed."""
    pid = remote.pid
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(remote.encode, [grid])
        wait_until(lambda: remote._line)
        os.kill(pid, signal.SIGKILL)
        return asked.result(60)


def test_a_process_that_is_killed_at_work_is_replaced(remote, restarts):
    grid, pid = remote.prepare(canary("spectrum")), remote.pid
    with pytest.raises(ModelDied, match="process ended"):
        killed_at_work(remote, grid)
    assert remote.pid != pid and restarts.pop() and not restarts
    assert np.isfinite(remote.encode([grid])).all()


def test_one_that_died_idle_is_replaced_before_it_is_asked(remote, restarts):
    """What comes next had no part in it."""
    grid, pid = remote.prepare(canary("spectrum")), remote.pid
    killed(remote)
    assert np.isfinite(remote.encode([grid])).all()
    assert remote.pid != pid and restarts.pop() and not restarts


def test_two_threads_have_a_batch_there_and_each_gets_its_own_answer(remote, tiny_embedder):
    grids = {"image": remote.prepare(canary("image")), "spectrum": remote.prepare(canary("spectrum"))}
    wanted = {modality: tiny_embedder.encode([grid])[0] for modality, grid in grids.items()}

    def ask(number):
        modality, count = ("image", "spectrum")[number % 2], 1 + number % 5
        found = remote.encode([grids[modality]] * count)
        return found.shape == (count, remote.dim) and np.allclose(found, wanted[modality], atol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(60)))
    assert not remote._line


def test_a_batch_behind_one_that_ended_the_process_is_done_by_the_next(remote, restarts):
    """Whatever was at work may be at fault; what was not yet, is not."""
    grid, pid = remote.prepare(canary("spectrum")), remote.pid
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(remote.encode, [grid])
        wait_until(lambda: len(remote._line) == 1)
        second = pool.submit(remote.encode, [grid])
        wait_until(lambda: len(remote._line) == 2)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ModelDied):
            first.result(60)
        assert np.isfinite(second.result(60)).all()
    assert restarts == [1] and not remote._line
    restarts.clear()


def test_a_pass_that_hangs_ends_with_its_process(remote, restarts, monkeypatch):
    grid, pid = remote.prepare(canary("spectrum")), remote.pid
    monkeypatch.setattr(remote, "_settings", remote._settings.model_copy(update={"stuck_after_s": 0.2}))
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ModelDied, match=r"no answer in 0\.2 s"):
        remote.encode([grid])
    assert ends(pid) and restarts.pop()
    monkeypatch.undo()
    assert np.isfinite(remote.encode([grid])).all()


@pytest.fixture
def stillborn(remote, monkeypatch):
    """Children that are killed before their model is loaded: as many as the list says."""
    start, left = remote._start, []

    def starts():
        start()
        if left:
            left.pop()
            killed(remote)

    monkeypatch.setattr(remote, "_start", starts)
    return left


def test_a_replacement_that_dies_while_it_loads_is_replaced_as_well(remote, restarts, stillborn):
    grid = remote.prepare(canary("spectrum"))
    stillborn.append(1)
    killed(remote)
    assert np.isfinite(remote.encode([grid])).all()
    assert len(restarts) == 2
    restarts.clear()


def test_where_none_comes_to_life_no_input_is_at_fault_and_the_next_request_tries_again(remote, restarts, stillborn):
    grid = remote.prepare(canary("spectrum"))
    stillborn += [1, 1]
    killed(remote)
    with pytest.raises(NoModel, match="no process"):
        remote.encode([grid])
    assert len(restarts) == 2 and np.isfinite(remote.encode([grid])).all()
    restarts.clear()


def test_a_model_that_is_gone_when_its_process_is_replaced_blames_nobody(remote, restarts, monkeypatch, tmp_path):
    grid = remote.prepare(canary("spectrum"))
    with monkeypatch.context() as gone:
        gone.setattr(remote, "_settings", remote._settings.model_copy(update={"model_dir": tmp_path}))
        killed(remote)
        with pytest.raises(NoModel, match="holds no"):
            remote.encode([grid])
    assert np.isfinite(remote.encode([grid])).all()
    restarts.clear()


def test_where_the_system_gives_no_process_those_who_wait_are_answered_and_the_next_may_have_one(
    remote, restarts, monkeypatch
):
    grid, pid = remote.prepare(canary("spectrum")), remote.pid
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool, monkeypatch.context() as full:

        def refused(process):
            raise OSError(errno.EAGAIN, "no more processes")

        full.setattr(multiprocessing.context.SpawnProcess, "start", refused)
        asked = [pool.submit(remote.encode, [grid]) for _ in range(2)]
        wait_until(lambda: len(remote._line) == 2)
        os.kill(pid, signal.SIGKILL)
        errors = [each.exception(60) for each in asked]
        assert sorted(type(error).__name__ for error in errors) == ["ModelDied", "NoModel"]
        with pytest.raises(NoModel):
            remote.encode([grid])
    assert np.isfinite(remote.encode([grid])).all() and not remote._line
    restarts.clear()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_services_signals_are_not_its_own(remote, number):
    pid = remote.pid
    os.kill(pid, number)
    assert np.isfinite(remote.encode([remote.prepare(canary("spectrum"))])).all() and remote.pid == pid


def test_a_model_that_cannot_be_loaded_says_so(settings, tmp_path):
    broken = RemoteEmbedder(settings.model_copy(update={"model_dir": tmp_path}))
    with pytest.raises(InputError, match="holds no model.safetensors"):
        broken.wait()
    pid = broken.pid
    broken.close()
    assert ends(pid)


def test_the_service_goes_on_when_the_process_is_killed(settings, galaxy):
    """One answer is lost, health says so for a moment, the next request is served, and the end leaves nobody behind."""
    engine = Engine.load(settings, apart=True)
    try:
        with TestClient(make_app(settings, engine)) as client, ThreadPoolExecutor(1) as pool:
            body = npy(galaxy.pixels)
            first = client.post("/v1/embed/image", content=body).json()["items"][0]["embedding"]
            pid = engine.embedder.pid
            os.kill(pid, signal.SIGSTOP)
            asked = pool.submit(client.post, "/v1/embed/image", content=body)
            wait_until(lambda: engine.embedder._line)
            os.kill(pid, signal.SIGKILL)
            lost = asked.result(60)
            assert lost.status_code == 503 and lost.json()["error"]["code"] == "model_restarted"
            assert lost.headers["retry-after"]
            end = time.monotonic() + 150.0
            while client.get("/readyz").status_code != 200:  # seconds, more on a busy machine
                assert time.monotonic() < end
                time.sleep(0.2)
            again = client.post("/v1/embed/image", content=body).json()["items"][0]["embedding"]
            np.testing.assert_allclose(again, first, atol=1e-6)
            text = client.get("/metrics").text
            assert 'astroclip_worker_failures_total{what="restart",worker="inference"} 1.0' in text
            pid = engine.embedder.pid
    finally:
        engine.close()
    assert ends(pid)


def test_another_model_in_its_directory_blames_nobody_and_keeps_nobody_waiting(remote, restarts, monkeypatch):
    """What is alive and has another model is of no use; it must not be waited for."""
    grid = remote.prepare(canary("spectrum"))
    with monkeypatch.context() as exchanged:
        described = replace(remote._described, model_sha256="of the release before")
        exchanged.setattr(remote, "_described", described)
        killed(remote)
        for _ in range(2):
            start = time.monotonic()
            with pytest.raises(NoModel, match="another model"):
                remote.encode([grid])
            assert time.monotonic() - start < 60  # three children that load; START_S is 300
    assert np.isfinite(remote.encode([grid])).all()
    restarts.clear()


class Device:
    """An embedder whose pass fails on a device."""

    def __init__(self, device):
        self.device = device

    def encode_arrays(self, *batch):
        raise RuntimeError("device-side assert triggered")


@pytest.mark.parametrize(
    ("device", "broken", "ends"), [("cuda:0", True, True), ("cuda:0", False, False), ("cpu", True, False)]
)
def test_what_stays_with_the_process_ends_it(monkeypatch, device, broken, ends):
    """A fault of CUDA is there for every later call of the process; one of the input is not."""

    def synchronize():
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    said = []
    answer = partial(_answer, SimpleNamespace(send=said.append), Device(device), [np.zeros((1, 2), np.float32)])
    if ends:
        with pytest.raises(RuntimeError, match="illegal"):
            answer()
        assert not said
    else:
        answer()
        assert said == ["RuntimeError: device-side assert triggered"]


def test_a_process_that_ends_without_closing_it_ends(settings):
    """As a server does that is stopped by force: the child does not hear SIGTERM, and would be waited for."""
    script = (
        "from service.model_process import RemoteEmbedder; from service.settings import Settings;"
        f"kept = RemoteEmbedder(Settings(model_dir={str(settings.model_dir)!r})).wait(); print(kept.pid)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ends(int(done.stdout))
