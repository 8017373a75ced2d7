"""Two processes give the gradients of one with the joined batch, in every stage; and without each part they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from joined import CASES, free_port, start
from pair_files import write_shards
from torch import nn

from training.distributed import JoinedBatchNorm, join_batchnorm, joined_mean

SAME = [case for case in CASES if case != "v2-own-negatives"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("survey"), shards=4, rows=20, true=False)


def run(data: Path, out: Path, world: int, broken: str = "") -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    out.mkdir()
    mp.spawn(start, args=(world, str(data), str(out), free_port(), broken), nprocs=world)
    return {case: torch.load(out / f"{case}.pt", weights_only=True) for case in CASES}


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("one") / "out", 1)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("two") / "out", 2)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Largest difference of any entry (over the largest entry, where above 1); norm of the difference over a's."""
    assert a.keys() == b.keys() and a
    largest = max(float((a[name] - b[name]).abs().max()) for name in a)
    largest /= max(1.0, *(float(value.abs().max()) for value in a.values()))
    norms = [torch.cat([(x[n] - y[n] if y else x[n]).flatten() for n in a]).norm() for x, y in ((a, b), (a, {}))]
    return largest, float(norms[0] / norms[1])


@pytest.mark.parametrize("case", SAME)
def test_two_processes_give_the_gradients_of_the_joined_batch(one, two, case):
    largest, relative = difference(one[case]["gradients"], two[case]["gradients"])
    assert largest <= 1e-5 and relative <= 3e-5, (largest, relative)
    moving = {n for n in one[case]["buffers"] if "running" in n or n == "queue"}
    for name in moving:  # BatchNorm's statistics and MoCo's queue
        torch.testing.assert_close(two[case]["buffers"][name], one[case]["buffers"][name], rtol=1e-4, atol=1e-5)
    assert moving or case in ("masked", "v2")


def test_the_scale_of_the_logits_has_a_gradient(one):
    for case in ("align", "v1", "v2"):
        assert one[case]["gradients"]["model.logit_scale"].abs() > 0
    assert one["align"]["gradients"]["pair_scale"].abs() > 0


def test_frozen_encoders_have_none(one):
    for case in ("v1", "v2"):
        names = [n for n in one[case]["gradients"] if n != "model.logit_scale"]
        assert names and all(".head." in name for name in names)


def test_without_gathering_the_gradients_are_others(one, two):
    """Published v2: each process contrasts its own rows alone."""
    case = "v2-own-negatives"
    assert difference(one[case]["gradients"], one["v2"]["gradients"])[1] < 1e-6
    assert difference(one[case]["gradients"], two[case]["gradients"])[1] > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "noticed"),
    [
        ("gather", {"align", "streamed", "v1", "v2"}),
        ("batchnorm", {"spectrum", "image", "align", "streamed"}),
        ("mean", {"spectrum", "masked"}),
    ],
)
def test_each_part_is_needed(data, one, tmp_path, broken, noticed):
    spoiled = run(data, tmp_path / "out", 2, broken)
    differing = {c for c in SAME if difference(one[c]["gradients"], spoiled[c]["gradients"])[1] > 1e-4}
    assert differing == noticed


def test_one_process_needs_no_joining():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(3)))
    joined = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(3)))
    joined.load_state_dict(plain.state_dict())
    join_batchnorm(joined, cuda=False)
    assert isinstance(joined[1], JoinedBatchNorm) and isinstance(joined[3][0], JoinedBatchNorm)
    x = torch.randn(4, 2, 9)
    torch.testing.assert_close(joined(x), plain(x))
    torch.testing.assert_close(joined.eval()(x), plain.eval()(x))
    assert joined.state_dict().keys() == plain.state_dict().keys()
    assert float(joined_mean(torch.tensor(6.0), torch.tensor(4.0))) == 1.5
