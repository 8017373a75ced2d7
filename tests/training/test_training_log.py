"""The training log: complete for a run, added up over a stop and a kill, and accepted by the compliance check."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluate.conftest import small_survey  # noqa: F401
from training.align import train_align
from training.benchmark.compliance import check_log
from training.benchmark.mllog import read_log
from training.benchmark.timing import run_so_far, time_to_quality
from training.settings import AlignSettings
from training.timing import FILE


def settings(survey: Path, out: Path, epochs: int = 2) -> AlignSettings:
    return AlignSettings(
        preset="tiny", data=str(survey), out=str(out), batch_size=8, epochs=epochs, warmup_steps=2,
        precision="32-true", checkpoint_steps=1, devices=1, moved_fraction=0.0,
    )  # fmt: skip


def test_a_run_logs_its_epochs_quality_and_time(small_survey: Path, tmp_path: Path):  # noqa: F811
    train_align(settings(small_survey, tmp_path), progress=False)
    assert check_log(tmp_path / FILE) == []
    events = read_log(tmp_path / FILE)
    quality = [event for event in events if event.key == "eval_accuracy"]
    assert len(quality) == 2 and all(0 <= event.value <= 1 for event in quality)
    assert [event.metadata["pool"] for event in quality] == [16, 16]  # all the validation objects there are
    assert quality[0].metadata["samples_count"] < quality[1].metadata["samples_count"] == 2 * 48
    assert events[-1].key == "run_stop" and events[-1].metadata["status"] == "success"
    found = time_to_quality([tmp_path / FILE])
    assert found["stages"][0]["stage"] == "Alignment" and found["stages"][0]["samples"] == 96


def test_a_killed_run_goes_on_in_its_log_and_time_adds_up(small_survey: Path, tmp_path: Path):  # noqa: F811
    class Killed(Exception):
        pass

    from lightning.pytorch.callbacks import Callback

    import training.run as run
    from training.align import Alignment
    from training.run import load_split, run_stage

    class Kill(Callback):
        def on_train_batch_end(self, trainer, *rest) -> None:  # type: ignore[no-untyped-def]
            if trainer.global_step == 8:
                raise Killed

    chosen = settings(small_survey, tmp_path)
    with pytest.raises(Killed):
        run_stage(Alignment(chosen, *load_split(chosen)), [Kill()], progress=False)
    before = read_log(tmp_path / FILE)
    assert not run_so_far(before).finished
    with (tmp_path / FILE).open("a") as file:
        file.write(':::MLLOG {"namespace": "", "time')  # the line that was being written
    run.run_stage(Alignment(chosen, *load_split(chosen)), progress=False)
    events = read_log(tmp_path / FILE)
    assert check_log(tmp_path / FILE) == []
    sessions = [event for event in events if event.key == "session_start"]
    assert len(sessions) == 2 and events[: len(before)] == before
    assert sessions[1].metadata["step_num"] > 0 and sessions[1].metadata["run_time_ms"] > 0
    after = run_so_far(events)
    assert after.finished and after.run_time_ms > run_so_far(before).run_time_ms


def test_a_finished_log_is_set_aside_when_training_goes_on(small_survey: Path, tmp_path: Path):  # noqa: F811
    train_align(settings(small_survey, tmp_path, epochs=1), progress=False)
    spent = run_so_far(read_log(tmp_path / FILE)).run_time_ms
    train_align(settings(small_survey, tmp_path, epochs=2), progress=False)
    assert (tmp_path / "mllog-1.txt").is_file() and check_log(tmp_path / FILE) == []
    (session,) = [event for event in read_log(tmp_path / FILE) if event.key == "session_start"]
    assert session.metadata["run_time_ms"] == pytest.approx(spent, rel=0.2) and session.metadata["samples_count"] > 0
