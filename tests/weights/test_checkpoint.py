"""Reading untrusted files: nothing in them runs, and what is cut, bent or too large is refused with a sentence."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from astroclip.errors import InputError
from astroclip.weights import import_weights
from astroclip.weights.checkpoint import Foreign, read_checkpoint
from tests.weights.published import checkpoint, model_of, state_of, write


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Evaluated(Payload):
    def __reduce__(self):
        return eval, (f"open({str(self.target)!r}, 'w').close()",)


class ByState(Payload):
    """Runs from `__setstate__`, where the class is known to the loader."""

    def __reduce__(self):
        return ByState, (self.target,), {"target": self.target}

    def __setstate__(self, state):
        Path(state["target"]).touch()


@pytest.mark.parametrize("payload", [Payload, Evaluated, ByState])
@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict"])
def test_nothing_in_a_file_is_executed(payload, place, tmp_path):
    """The weights are read all the same: the payload stands beside them."""
    target = tmp_path / "executed"
    state = state_of("specformer", model_of("specformer"))
    extra = {"hyper_parameters": {"num_heads": 4, "cost": payload(target)}} if place == "hyper_parameters" else {}
    if place == "state_dict":
        state["logger"] = payload(target)
    file = write(tmp_path / "evil.ckpt", "specformer", state, **extra)
    made = import_weights(file, tmp_path / "model")
    assert not target.exists() and made.kind == "specformer"
    pickle.loads(pickle.dumps(payload(target)))
    assert target.exists()  # what an ordinary loader would have done


def test_foreign_classes_are_remembered_and_do_nothing(tmp_path):
    target = tmp_path / "executed"
    torch.save({"a": Payload(target), "b": torch.nn.Linear(2, 3), "c": torch.float32, "d": {1, 2}}, tmp_path / "f.ckpt")
    read = read_checkpoint(tmp_path / "f.ckpt")
    assert isinstance(read.data["a"], Foreign) and read.data["a"].given == (f"touch {target}",)
    assert read.data["b"].name == "torch.nn.modules.linear.Linear" and read.data["b"].state["in_features"] == 2
    assert read.data["d"] == {1, 2}
    assert any(name.endswith("system") for name in read.foreign)
    assert not target.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_tensors_are_read_as_torch_reads_them(dtype, tmp_path):
    """Views of one storage, transposed, empty and scalar ones; parameters."""
    base = (torch.randn(6, 4) * 10).to(dtype)
    tensors = {"view": base[2:5, 1:], "t": base.T, "empty": base[:0], "scalar": base[3, 2]}
    if dtype.is_floating_point:
        tensors["parameter"] = torch.nn.Parameter(base)
    torch.save(tensors, tmp_path / "t.ckpt")
    read = read_checkpoint(tmp_path / "t.ckpt").data
    expected = torch.load(tmp_path / "t.ckpt", weights_only=True)
    for name, stored in read.items():
        tensor = stored.read()
        assert tensor.is_contiguous() and tensor.dtype == dtype
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=0)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_truncated_files_are_refused(keep, tmp_path):
    data = checkpoint(tmp_path, "stein-moco").read_bytes()
    file = tmp_path / "cut.ckpt"
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match="cut.ckpt is") as caught:
        import_weights(file, tmp_path / "model")
    assert caught.value.code in ("damaged_checkpoint", "no_checkpoint")
    assert not (tmp_path / "model").exists()


def test_flipped_numbers_are_refused(tmp_path):
    file = checkpoint(tmp_path, "specformer")
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    data[entry.header_offset + 2000] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(InputError, match="numbers are damaged"):
        import_weights(file, tmp_path / "model")


def test_other_files_are_refused(tmp_path):
    page = tmp_path / "page.ckpt"
    page.write_text("<html>Not found</html>")
    with pytest.raises(InputError, match="is no PyTorch checkpoint.*Download the file itself"):
        read_checkpoint(page)
    with pytest.raises(InputError, match="Found no file"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="older PyTorch"):
        read_checkpoint(tmp_path / "old.ckpt")


def rewritten(file: Path, change, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with `change(name, data)` done to its entries; None leaves one out."""
    out = file.with_name("changed.ckpt")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return out


def test_bent_archives_are_refused(tmp_path):
    file = checkpoint(tmp_path, "specformer")
    with pytest.raises(InputError, match="compressed, which torch.save never does"):
        read_checkpoint(rewritten(file, lambda n, d: d, zipfile.ZIP_DEFLATED))
    for message, change in (
        ("0 entries are called data.pkl", lambda n, d: None if n.endswith("data.pkl") else d),
        ("storage 3 is missing", lambda n, d: None if n.endswith("/data/3") else d),
        ("storage 3 has 8 bytes", lambda n, d: d[:8] if n.endswith("/data/3") else d),
        ("big-endian", lambda n, d: b"big" if n.endswith("byteorder") else d),
        ("cut short or damaged", lambda n, d: d[:-200] if n.endswith("data.pkl") else d),
    ):
        with pytest.raises(InputError, match=message):
            read_checkpoint(rewritten(file, change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (1 << 40,), (1,)), "reaches to 1099511627776 in a storage of 4"),
        ((0, (1 << 40,), (0,)), "stands on a storage of 4"),
        ((2, (3,), (1,)), "reaches to 5"),
        ((-1, (2,), (1,)), "something else than counts"),
        ((0, (2, 2), (1,)), "other strides than dimensions"),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_storage(arguments, message, tmp_path):
    class Bent:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, *arguments, False, {})

    numbers = torch.zeros(4).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=numbers, dtype=torch.float32, _internal=True)
    torch.save({"a": Bent()}, tmp_path / "bent.ckpt")
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "bent.ckpt")
