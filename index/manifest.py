"""The manifest: what an index holds, where it came from, and the checksum of every file.

`manifest.json` is canonical JSON (sorted keys, two-space indent) and carries the SHA-256 of itself without that
field, so a change of any byte of it is refused as surely as one in the files it lists. Reading refuses by name:
`IndexFileError` says which file, what was found and what is wanted. No file is opened by another module before
`check_files` has passed it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from astroclip.errors import IndexFileError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "check_files",
    "file_entry",
    "file_stamps",
    "sha256_file",
]

FORMAT_VERSION = 3  # 2: `heads`. 3: recall by kind and share of a filter. Earlier ones are still read
_READ = range(1, FORMAT_VERSION + 1)
MANIFEST = "manifest.json"
_MAX_BYTES = 16 * 2**20  # a manifest is some 10 KB; anything this large is not one
_CHUNK = 4 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """Size (bytes) and SHA-256 (hex) of one file of the index."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about an index that is not the vectors.

    index_id:     stable short name, used in URLs and answers; `version` counts up with every build or append.
    model:        {"id", "sha256"} of the model that made the embeddings; queries must come from the same.
    counts:       {"objects", "image", "spectrum", "skipped"}; skipped = inputs that could not be embedded.
    backends:     {modality: {name: {settings, "recall": [...], "cost": [...], "exact_below"}}} for each approximate
                  backend on disk, see `index.recall`; a modality that is absent is searched exactly.
    properties:   {name: unit} of the columns `regress.estimate` may estimate, the default ones first.
    calibration:  names of the table files and how they were drawn, see `index.calibrate`; "knn": of estimates from
                  neighbours, what was chosen and measured for every pair and property, see `index.knn_build`.
    previews:     shape of the previews, or None; see `index.previews`.
    heads:        {image, spectrum or both: {"file", "objects", "seed", "settings", "properties": {name: measured}}} of
                  the heads on disk, see `index.head_build`; empty where there are none.
    files:        {relative posix name: FileEntry} for every file but the manifest.
    """

    index_id: str
    survey: str
    model: Mapping[str, str]
    preprocess_version: str
    dim: int
    vector_dtype: str
    counts: Mapping[str, int]
    created: str
    version: int = 1
    format_version: int = FORMAT_VERSION
    backends: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    previews: Mapping[str, Any] | None = None
    heads: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    citations: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's content: canonical JSON with its own checksum."""
        record = asdict(self)
        if self.format_version == 1:
            del record["heads"]
        record["properties"] = [{"name": name, "unit": unit} for name, unit in self.properties.items()]
        record["checksum"] = hashlib.sha256(_canonical(record)).hexdigest()
        return _canonical(record)

    def with_files(self, folder: Path, names: Iterable[str]) -> Manifest:
        """The same manifest listing `names` as they lie in `folder`."""
        return replace(self, files={name: file_entry(folder / name) for name in sorted(names)})

    @classmethod
    def read(cls, folder: Path) -> tuple[Manifest, str]:
        """The manifest of an index folder and the SHA-256 of its bytes. Raises IndexFileError."""
        path = folder / MANIFEST
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise _damaged(MANIFEST, f"is larger than {_MAX_BYTES} bytes", "a manifest of an index")
            content = path.read_bytes()
        except OSError as error:
            raise _damaged(MANIFEST, f"cannot be read in {folder} ({error.strerror})", "an index directory") from error
        return cls._parse(content), hashlib.sha256(content).hexdigest()

    @classmethod
    def _parse(cls, content: bytes) -> Manifest:
        try:
            record = json.loads(content)
            version = record["format_version"]
            if version not in _READ:
                raise _damaged(MANIFEST, f"has format version {version!r}", f"a version up to {FORMAT_VERSION}")
            if version == 1:
                record["heads"] = {}
            record["files"] = {_safe_name(name): FileEntry(**entry) for name, entry in record["files"].items()}
            record["properties"] = {entry["name"]: entry["unit"] for entry in record["properties"]}
            record["citations"], record["sources"] = tuple(record["citations"]), tuple(record["sources"])
            manifest = cls(**{entry.name: record[entry.name] for entry in fields(cls)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(MANIFEST, f"is not a manifest ({error!r})", "canonical JSON as written") from error
        if manifest.to_bytes() != content:
            raise _damaged(MANIFEST, "does not match its own checksum", "the bytes as written")
        return manifest


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex; read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def file_entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, sha256_file(path))


def check_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, hash: bool = True) -> None:
    """Refuse (IndexFileError, by name) any listed file that is missing, of another size or of another SHA-256.

    names: only these; default all. hash: False looks at sizes alone.
    """
    for name in manifest.files if names is None else names:
        entry = manifest.files.get(name)
        if entry is None:
            raise _damaged(name, "is not listed in the manifest", "a file of this index")
        try:
            size = (folder / name).stat().st_size
            if size != entry.bytes:
                raise _damaged(name, f"has {size} bytes", f"{entry.bytes} bytes")
            found = sha256_file(folder / name) if hash else entry.sha256
        except OSError as error:
            raise _damaged(name, f"cannot be read ({error.strerror})", f"{entry.bytes} bytes") from error
        if found != entry.sha256:
            raise _damaged(name, f"has SHA-256 {found[:16]}...", f"{entry.sha256[:16]}... as in the manifest")


def file_stamps(folder: Path, manifest: Manifest) -> dict[str, tuple[int, ...] | None]:
    """Identity, size and times of every file, the manifest's too; a file that is not there has None.

    Files are hashed first and read after that. Where these are the same before the one and after the other, what was
    read is what was hashed: a directory copied over, or replaced, meanwhile shows. (Nobody who may write into the
    directory is kept from lying about times; checksums are against accidents, and against files from elsewhere.)
    """
    stamps: dict[str, tuple[int, ...] | None] = {}
    for name in (MANIFEST, *manifest.files):
        try:
            found = (folder / name).stat()
            stamps[name] = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        except OSError:
            stamps[name] = None
    return stamps


def _canonical(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _safe_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or name == MANIFEST:
        raise _damaged(MANIFEST, f"lists the file {name!r}", "names inside the index directory")
    return name


def _damaged(name: str, found: str, wanted: str) -> IndexFileError:
    return IndexFileError(f"index file {name} {found}; wanted {wanted}; copy the index again or rebuild it", field=name)
