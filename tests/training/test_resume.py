"""A run that is killed and started again has the loss curve of one that was not, step for step."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import main, stage
from pair_files import write_shards

from astroclip.errors import InputError
from training.checkpoints import CurveLogger, SafeCheckpointIO, read_curves, resume_point, steps_done
from training.loader import PairLoader, epoch_order
from training.pairs import open_pairs
from training.run import run_stage
from training.settings import StreamSettings

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("survey"), shards=4, rows=16)


def losses(out: Path) -> dict[int, float]:
    rows = [row for row in read_curves(out) if "train_loss" in row]
    assert len({row["step"] for row in rows}) == len(rows), "a step stands twice in the curve"
    return {int(row["step"]): row["train_loss"] for row in rows}


def killed(name: str, data: Path, out: Path, after: int) -> None:
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), name, str(data), str(out), str(after)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "after", "held", "tolerance"),
    [("align", 7, 6, 0.0), ("image", 7, 6, 0.0), ("v1", 5, 4, 0.0), ("bf16", 7, 6, 1e-3)],
)
def test_kill_and_resume_repeats_the_uninterrupted_loss_curve(data, tmp_path, name, after, held, tolerance):
    """In float32 to the last digit. The kill falls between two checkpoints, so a step is done again.

    An epoch has four steps: the last checkpoint lies in mid-epoch, or at an epoch's end before its validation (v1).
    """
    main(name, str(data), str(tmp_path / "whole"))
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == list(range(STEPS)) and len(set(whole.values())) > STEPS // 2
    killed(name, data, tmp_path / "parts", after)
    assert steps_done(tmp_path / "parts" / "last.ckpt") == held
    main(name, str(data), str(tmp_path / "parts"))
    resumed = losses(tmp_path / "parts")
    assert sorted(resumed) == list(range(STEPS))
    for step, loss in whole.items():
        assert abs(resumed[step] - loss) <= tolerance, f"step {step}: {loss} uninterrupted, {resumed[step]} resumed"
    first, second = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "parts"))
    for key, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][key], value, rtol=0, atol=10 * tolerance, msg=key)


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = epoch_order(1000, seed=3, epoch=2, chunk=16, window=128)
    assert sorted(order) == list(range(1000))
    np.testing.assert_array_equal(order, epoch_order(1000, 3, 2, 16, 128))
    for seed, epoch in ((3, 1), (4, 2)):
        assert (order != epoch_order(1000, seed, epoch, 16, 128)).mean() > 0.9
    # A window reads from few places: its rows lie in about window / chunk chunks, and not next to each other.
    places = np.unique(np.sort(order[:128]) // 16)
    assert len(places) <= 128 // 16 * 2 + 2
    assert (np.abs(np.diff(order)) == 1).mean() < 0.1
    assert epoch_order(0, 1, 1, 16, 128).size == 0 and epoch_order(5, 1, 1, 16, 128).size == 5


def test_batches_do_not_depend_on_processes_or_workers(data):
    source = open_pairs(data, "train", image_size=8)

    def flux(world: int, workers: int, step: int = 0) -> list[torch.Tensor]:
        stream = StreamSettings(enabled=True, workers=workers, chunk=4, window=16)
        loaders = [
            PairLoader(source, 8, stream, seed=1, rank=rank, world=world, position=lambda: step)
            for rank in range(world)
        ]
        return [torch.cat([part["flux"] for part in parts]) for parts in zip(*loaders, strict=True)]

    alone = flux(1, 0)
    assert len(alone) == len(source) // 8 == 4
    for other in (flux(2, 0), flux(4, 1), flux(1, 2)):
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))
    later = flux(1, 2, step=3)
    assert len(later) == 1 and torch.equal(later[0], alone[3])
    second = flux(1, 0, step=4)
    assert len(second) == 4 and not torch.equal(second[0], alone[0])


def test_a_damaged_file_met_by_a_worker_is_one_clear_error(tmp_path):
    root = write_shards(tmp_path, rows=6)
    source = open_pairs(root, "train", image_size=8)
    loader = PairLoader(source, 4, StreamSettings(enabled=True, workers=1))
    for path in source.files:
        path.write_bytes(b"not HDF5")
    with pytest.raises(InputError, match="which HDF5 cannot open") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    saver = SafeCheckpointIO()
    saver.save_checkpoint({"global_step": 1}, tmp_path / "last.ckpt")
    saver.save_checkpoint({"global_step": 2}, tmp_path / "last.ckpt")
    assert steps_done(tmp_path / "previous.ckpt") == 1

    class Killed(BaseException):
        pass

    def cut(checkpoint, file):
        file.write(b"PK half of a checkpoint")
        raise Killed

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(Killed):
        saver.save_checkpoint({"global_step": 3}, tmp_path / "last.ckpt")
    assert resume_point(tmp_path) == tmp_path / "last.ckpt" and steps_done(tmp_path / "last.ckpt") == 2


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    assert resume_point(tmp_path) is None
    saver = SafeCheckpointIO()
    for step in (1, 2):
        saver.save_checkpoint({"global_step": step, "weights": torch.arange(1000.0)}, tmp_path / "last.ckpt")
    last = tmp_path / "last.ckpt"
    whole = last.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:1500] + b"\xff" * 8 + whole[1508:], b""):
        last.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"going on from previous\.ckpt"):
            assert resume_point(tmp_path) == tmp_path / "previous.ckpt"
    last.unlink()  # a kill between the two renames
    assert resume_point(tmp_path) == tmp_path / "previous.ckpt"
    (tmp_path / "previous.ckpt").write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"damaged checkpoints in .*previous\.ckpt.*remove them"):
        resume_point(tmp_path)


def test_curves_go_on_where_the_checkpoint_was(tmp_path):
    first = CurveLogger(tmp_path, 0, flush_every=1)
    for step in range(5):
        first.log_metrics({"train_loss": step / 8}, step)
    first.save()
    with (tmp_path / "curves" / "metrics.csv").open("a") as file:
        file.write("5,0.6")  # cut by the kill, or a half-written number
        file.write("x\n")
    second = CurveLogger(tmp_path, 3, flush_every=1)
    assert [row["step"] for row in read_curves(tmp_path)] == [0, 1, 2]
    second.log_metrics({"train_loss": 0.5, "val_loss": 1.0}, 3)
    second.save()
    assert [row["train_loss"] for row in read_curves(tmp_path)] == [0, 0.125, 0.25, 0.5]


@pytest.mark.parametrize(("size", "message"), [(0, None), (40, "whole batch")])
def test_batches_larger_than_the_data_are_refused(data, tmp_path, size, message):
    module = stage("v1", str(data), str(tmp_path))
    if message is None:
        module.settings = dataclasses.replace(module.settings, batch_size=32, epochs=1)
        run_stage(module, progress=False)
        return
    module.settings = dataclasses.replace(module.settings, batch_size=size)
    with pytest.raises(InputError, match=message):
        run_stage(module, progress=False)


def test_stream_settings_are_checked():
    for wrong in ({"workers": -1}, {"window": 0}, {"chunk": 0}, {"prefetch": 0}, {"val_objects": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StreamSettings(**wrong)
    assert StreamSettings(workers=0, window=1, chunk=1, prefetch=1, val_objects=1).workers == 0
