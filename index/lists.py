"""Survey-wide lists: the most isolated objects, the image-spectrum pairs that agree least, near-duplicates.

They are results about one version of an index, not part of it: they lie beside the versions (`<root>/lists/<version>/`,
or `lists/` inside a plain index directory, which its manifest does not list), and an index verifies the same with and
without them. `lists.json` says what index they were computed from, by the SHA-256 of its manifest, and holds size and
SHA-256 of each list's Parquet file; it carries its own checksum, as a manifest does. Lists of another manifest are
refused, damaged ones by name. File names carry the digest of the content, so replacing `lists.json` by rename
publishes a new list whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from astroclip.errors import IndexFileError, ProvenanceError
from astroclip.types import Modality
from index.manifest import sha256_file

__all__ = ["KINDS", "RECORD", "ListEntry", "ListKind", "Lists", "lists_folder", "write_list"]

ListKind = Literal["isolated", "disagreeing", "duplicates"]
KINDS: tuple[ListKind, ...] = get_args(ListKind)
RECORD = "lists.json"
FORMAT_VERSION = 1
_MAX_BYTES = 2**20  # of the record: it is some 2 KB


@dataclass(frozen=True)
class ListEntry:
    """One list: its file, what it was made with, and of how many candidates (`found`) its `rows` are the first."""

    file: str
    bytes: int
    sha256: str
    rows: int
    found: int
    created: str
    parameters: Mapping[str, Any]


class Lists:
    """The lists of an opened index: `entries` and `tables` (Arrow, in rank order) by kind."""

    def __init__(self, entries: Mapping[ListKind, ListEntry], tables: Mapping[ListKind, pa.Table]) -> None:
        self.entries, self.tables = dict(entries), dict(tables)

    @classmethod
    def read(cls, index_folder: Path, manifest_sha256: str) -> Lists:
        """The lists of the index version in `index_folder`; none where there is no record.

        Raises IndexFileError naming the file that is damaged, ProvenanceError for lists of another manifest.
        """
        folder = lists_folder(index_folder)
        entries = _read_record(folder, manifest_sha256)
        return cls(entries, {kind: _read_table(folder, entry) for kind, entry in entries.items()})

    def select(self, kind: ListKind, modality: Modality | None = None) -> pa.Table:
        """The rows of a list; of one modality: `isolated` in it, `duplicates` that were compared in it."""
        table = self.tables[kind]
        if modality is None:
            return table
        if kind == "isolated":
            return table.filter(pc.equal(table.column("modality"), modality))
        return table.filter(pc.is_valid(table.column(f"{modality}_score")))


def lists_folder(index_folder: Path) -> Path:
    """Where the lists of the index version in `index_folder` lie (see the module)."""
    if index_folder.parent.name == "versions":
        return index_folder.parent.parent / "lists" / index_folder.name
    return index_folder / "lists"


def write_list(
    index_folder: Path,
    index_id: str,
    manifest_sha256: str,
    kind: ListKind,
    table: pa.Table,
    found: int,
    parameters: Mapping[str, Any],
) -> ListEntry:
    """Publish one list beside the index, keeping the other lists of the same manifest; what is replaced is removed."""
    folder = lists_folder(index_folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        entries = _read_record(folder, manifest_sha256)
    except (IndexFileError, ProvenanceError):
        entries = {}  # of an earlier index, or unusable: every list of it is
    aside = folder / f".{kind}.part"
    pq.write_table(table, aside, compression="zstd")
    digest = sha256_file(aside)
    entry = ListEntry(
        file=f"{kind}-{digest[:12]}.parquet",
        bytes=aside.stat().st_size,
        sha256=digest,
        rows=table.num_rows,
        found=found,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=dict(parameters),
    )
    _sync(aside)
    os.replace(aside, folder / entry.file)
    entries[kind] = entry
    record = {
        "format_version": FORMAT_VERSION,
        "index_id": index_id,
        "manifest_sha256": manifest_sha256,
        "lists": {name: asdict(entry) for name, entry in entries.items()},
    }
    record["checksum"] = hashlib.sha256(_canonical(record)).hexdigest()
    fresh = folder / f".{RECORD}.part"
    fresh.write_bytes(_canonical(record))
    _sync(fresh)
    os.replace(fresh, folder / RECORD)
    _sync(folder)
    named = {entry.file for entry in entries.values()}
    for path in folder.glob("*.parquet"):
        if path.name not in named:
            path.unlink()
    return entry


def _read_record(folder: Path, manifest_sha256: str) -> dict[ListKind, ListEntry]:
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        content = path.read_bytes()
        record = json.loads(content)
        whole = _canonical(record) == content
        checksum = record.pop("checksum")
        if not whole or hashlib.sha256(_canonical(record)).hexdigest() != checksum:
            raise ValueError("it does not match its own checksum")
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {record['format_version']}, not {FORMAT_VERSION}")
        entries = {kind: ListEntry(**record["lists"][kind]) for kind in KINDS if kind in record["lists"]}
        of = str(record["manifest_sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(RECORD, f"is not a record of lists ({error})") from error
    if of != manifest_sha256:
        raise ProvenanceError(
            f"the lists in {folder.name} were computed from an index with manifest {of[:12]}; this one has "
            f"{manifest_sha256[:12]}; run `astroclip index lists` again",
            code="stale_lists",
        )
    return entries


def _read_table(folder: Path, entry: ListEntry) -> pa.Table:
    path = folder / Path(entry.file).name
    try:
        if path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256:
            raise _damaged(entry.file, f"does not have the {entry.bytes} bytes of SHA-256 {entry.sha256[:16]}...")
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(entry.file, f"cannot be read ({error})") from error
    return table


def _damaged(name: str, found: str) -> IndexFileError:
    return IndexFileError(
        f"list file {name} {found}; wanted it as written; run `astroclip index lists` again", field=name
    )


def _canonical(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
