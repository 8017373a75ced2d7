"""PyTorch checkpoint files read without executing anything that is in them.

A checkpoint is a zip archive: one pickle that describes nested containers, and one entry a storage with raw numbers.
A pickle is a program; run by Python's own loader it may call any function. Here it is run by an unpickler that knows
ordered dictionaries, sets and the description of a tensor, and nothing else: every other name in the file, whatever it
is, becomes a `Foreign` object that remembers what it was given and does nothing. So a file that pickles whole modules
(AstroCLIP's release does, in `hyper_parameters`) can be read, and one that pickles `os.system` is as harmless.

Numbers are read when asked for, so optimizer states cost nothing. Sizes are checked against the file before anything
is allocated.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from astroclip.errors import InputError

__all__ = ["Checkpoint", "Foreign", "StoredTensor", "read_checkpoint"]

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_MEND = "Download it again, and compare its size with the published one."
# The pickle of the largest release (370 million parameters, optimizer state, pickled modules) is below 2 MB.
MAX_PICKLE_BYTES = 64 * 1024**2


class Foreign:
    """What stands for an object of a class that this reader does not know: inert, whatever is done to it.

    name:  its class in the file, "module.Class".
    given: the arguments it was made from; state: what was to be set on it; items: what was put into it.
    """

    name = ""
    given: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *given: Any, **named: Any) -> Foreign:
        made = super().__new__(cls)  # and not in __init__, which a pickle may leave out
        made.given, made.state, made.items = (*given, *named.values()), None, {}
        return made

    def __init__(self, *given: Any, **named: Any) -> None:
        """`__new__` has kept them."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    add = append

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    def __call__(self, *given: Any, **named: Any) -> Foreign:
        return Foreign(*given, **named)

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


@dataclass(frozen=True)
class _Storage:
    """An entry of the archive: `length` numbers of `dtype`."""

    read: Callable[[], bytes]
    dtype: torch.dtype
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor still in the file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def read(self) -> torch.Tensor:
        """A tensor of its own memory; raises InputError where the entry is damaged."""
        try:
            data = self.storage.read()
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise InputError(
                f"The checkpoint's numbers are damaged ({error}). {_MEND}", code="damaged_checkpoint"
            ) from error
        flat = torch.frombuffer(bytearray(data), dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Checkpoint:
    """A file: `data`, with `StoredTensor` for tensors; `name` without path, `sha256`, `size`; `foreign` class names."""

    data: Any
    name: str
    sha256: str
    size: int
    foreign: tuple[str, ...]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the archive at `path`; raises InputError where it is none, is cut short, or is damaged."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Found no file {path}; wanted a downloaded checkpoint (.ckpt or .pth).", code="no_checkpoint")
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if head != b"PK\x03\x04":
        raise InputError(
            f"{path.name} is no PyTorch checkpoint: it starts with {head!r}, wanted a zip archive (as torch.save has "
            "written since PyTorch 1.6). Download the file itself, not the page about it; a file of an older PyTorch "
            "has to be saved again.",
            code="no_checkpoint",
        )
    try:
        archive = _Archive(path)
        reader = _Reader(archive)
        data = reader.load()
    except InputError:
        raise
    except Exception as error:  # a hostile or cut pickle may raise anything
        raise InputError(
            f"{path.name} is cut short or damaged ({type(error).__name__}: {str(error)[:200]}); wanted a whole "
            f"checkpoint. {_MEND}",
            code="damaged_checkpoint",
        ) from error
    return Checkpoint(data, path.name, digest, path.stat().st_size, tuple(sorted(reader.foreign)))


class _Archive:
    """The zip file: where its pickle and storages are. Entries are stored as they are, so none can swell."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        self.entries = {info.filename: info for info in self.zip.infolist()}
        packed = [name for name, info in self.entries.items() if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"entry {packed[0]} is compressed, which torch.save never does")
        pickles = [name for name in self.entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} entries are called data.pkl, wanted one")
        self.root = pickles[0].removesuffix("data.pkl")
        if self.entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"data.pkl is larger than {MAX_PICKLE_BYTES} bytes")
        self.pickle = self.zip.read(pickles[0])
        order = f"{self.root}byteorder"
        if order in self.entries and self.zip.read(order) != b"little":
            raise ValueError("numbers are stored big-endian, wanted little-endian")

    def storage(self, key: str, dtype: torch.dtype, length: int) -> _Storage:
        name = f"{self.root}data/{key}"
        if name not in self.entries:
            raise ValueError(f"storage {key} is missing")
        if self.entries[name].file_size < length * dtype.itemsize:
            raise ValueError(f"storage {key} has {self.entries[name].file_size} bytes, wanted {length} {dtype}")

        def read() -> bytes:
            return self.zip.read(name)[: length * dtype.itemsize]

        return _Storage(read, dtype, length)


class _Reader(pickle.Unpickler):
    """Runs the pickle with the names of `_KNOWN` and inert objects for all others."""

    def __init__(self, archive: _Archive) -> None:
        super().__init__(io.BytesIO(archive.pickle))
        self.archive = archive
        self.foreign: set[str] = set()
        self._classes: dict[str, type[Foreign]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if full in _KNOWN:
            return _KNOWN[full]
        self.foreign.add(full)
        if full not in self._classes:
            self._classes[full] = type("Foreign", (Foreign,), {"name": full})
        return self._classes[full]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(length, int) or length < 0:
            raise ValueError("an entry is no tensor storage")
        return self.archive.storage(str(key), dtype, length)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """In place of torch's rebuilding functions: the same description, held to the storage's bounds."""
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        raise ValueError("a tensor has no storage, or other strides than dimensions")
    numbers = (offset, *shape, *stride)
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor's shape holds something else than counts")
    reach = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    if 0 not in shape and reach > storage.length:
        raise ValueError(f"a tensor reaches to {reach} in a storage of {storage.length}")
    if math.prod(shape) > storage.length:  # strides of 0 would let a few bytes stand for terabytes
        raise ValueError(f"a tensor of {math.prod(shape)} numbers stands on a storage of {storage.length}")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _same(data: Any, *_: Any) -> Any:
    return data


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
}
