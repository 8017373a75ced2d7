"""API keys: how one is made, how it is kept, and who holds the one presented.

A key is ``ac_<id>_<secret>``: 8 letters and digits that name it (in logs, in `keys list`) and 256 random bits in hex.
The fixed prefix and form, `FORM`, are for secret scanners. The file holds the SHA-256 of the whole key, never the key.
SHA-256 and not bcrypt or its kin: those are slow to make guessing at passwords dear, 256 random bits cannot be guessed
at any speed, and a tenth of a second a request would be a way to take the service down.

The file is JSON, written by `astroclip keys` and read by a running service as soon as it changes:

    {"version": 1, "keys": [{"id": "k3v9x2pq", "sha256": "...", "scopes": ["read"], "note": "nightly batch",
                             "created": "2026-11-21T19:00:00Z", "expires": null,
                             "max_rate_per_s": null, "max_in_flight": null}]}
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from astroclip.errors import InputError

__all__ = ["FORM", "Key", "KeyRing", "Scope", "changing", "new_key", "read_keys"]

log = logging.getLogger("astroclip.access")

Scope = Literal["read", "admin"]
FORM = re.compile(r"ac_([0-9a-z]{8})_[0-9a-f]{64}")
MAX_BYTES = 2**20  # some 3,000 keys; read by the event loop, 15 ms, when it changed
CHECK_S = 1.0  # how long a revoked key may still work; a stat() a request would be cheap, but not on every file system

_ID_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
_NOBODY = secrets.token_bytes(32)  # what a key that names no entry is compared with


class Key(BaseModel):
    """What the file says of one key. `max_rate_per_s` and `max_in_flight`: None takes the service's, 0 is no bound."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-z]{8}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(min_length=1)
    note: str = ""
    created: AwareDatetime
    expires: AwareDatetime | None = None
    max_rate_per_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_in_flight: int | None = Field(default=None, ge=0)

    def expired(self, now_s: float | None = None) -> bool:
        return self.expires is not None and (time.time() if now_s is None else now_s) >= self.expires.timestamp()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    keys: list[Key] = []


def new_key(
    scopes: Iterable[Scope],
    *,
    note: str = "",
    expires: datetime | None = None,
    max_rate_per_s: float | None = None,
    max_in_flight: int | None = None,
) -> tuple[str, Key]:
    """The key itself, to be shown once, and what is kept of it."""
    key_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(8))
    text = f"ac_{key_id}_{secrets.token_hex(32)}"
    return text, Key(
        id=key_id,
        sha256=_digest(text).hex(),
        scopes=frozenset(scopes),
        note=note,
        created=datetime.now(UTC).replace(microsecond=0),
        expires=expires,
        max_rate_per_s=max_rate_per_s,
        max_in_flight=max_in_flight,
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


# --- the file --------------------------------------------------------------------------------------------------------


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises InputError where it is missing, damaged or not ours; never echoes what it holds."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        mend = "make one with `astroclip keys create --file FILE`, or let the service's user read it"
        raise InputError(
            f"The key file {path} cannot be read ({error.strerror}); {mend}.", code="no_keys_file"
        ) from None
    if len(content) > MAX_BYTES:
        raise InputError(f"The key file {path} holds more than {MAX_BYTES:,} bytes; is it the right one?", code=_BAD)
    try:
        keys = _File.model_validate_json(content).keys
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(
            f"The key file {path} is damaged at {where}: {first['msg']}. Restore it, or make a new one.", code=_BAD
        ) from None
    if len({key.id for key in keys}) < len(keys):
        raise InputError(f"The key file {path} holds one id twice; remove one of the two.", code=_BAD)
    return keys


_BAD = "bad_keys_file"


@contextmanager
def changing(path: Path) -> Iterator[list[Key]]:
    """The keys of the file, written back when the block ends without an exception; one process at a time.

    A file that does not exist begins empty. Raises InputError, and leaves the file as it was, where it is damaged.
    """
    path = path.resolve()  # a link stays a link
    if not path.parent.is_dir():
        raise InputError(f"There is no directory {path.parent} to keep keys in; make it first.", code="no_keys_file")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # of the directory: nothing is left behind, and a rename does not lose it
        keys = read_keys(path) if path.exists() else []
        yield keys
        _write(path, keys)
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(path: Path, keys: list[Key]) -> None:
    """All or nothing, mode 0600; a file that root rewrites stays its owner's, so that the service can still read it."""
    content = [key.model_dump(mode="json") | {"scopes": sorted(key.scopes)} for key in keys]
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # made with mode 0600
    try:
        with open(handle, "w") as file:
            json.dump({"version": 1, "keys": content}, file, indent=1)
            file.write("\n")
            file.flush()
            with suppress(FileNotFoundError, PermissionError):
                old = path.stat()
                os.chown(name, old.st_uid, old.st_gid)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


# --- in a running service --------------------------------------------------------------------------------------------


class KeyRing:
    """The keys of a file, read anew when it changed. Not for several threads: the event loop asks.

    Raises InputError when made over a file that cannot be used. One that goes bad later, or away, is reported once in
    the log, and the keys known before stay good: a slip of the pen must neither lock everybody out nor let anybody in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._problem: str | None = None  # why the file could not be read when it was last looked at
        self._seen = self._signature()
        self._keys = self._read()
        self._next_check = time.monotonic() + CHECK_S
        if not self._keys:
            log.warning("the key file %s holds no key: every call that wants one is refused", path)

    def __len__(self) -> int:
        return len(self._keys)

    def holder(self, presented: str) -> Key | None:
        """The entry of a presented key, None for a key that is not known. Expiry is the caller's to judge.

        Whatever is presented, one digest is made and one comparison of 32 bytes, so the time tells nothing of which
        ids exist; that of finding an id in a dict depends on what the caller sent alone.
        """
        self._refresh()
        form = FORM.fullmatch(presented)
        key = self._keys.get(form[1]) if form else None
        expected = bytes.fromhex(key.sha256) if key else _NOBODY
        return key if hmac.compare_digest(_digest(presented), expected) else None

    def _refresh(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_S
        seen = self._signature()
        if seen == self._seen and self._problem is None:
            return
        self._seen = seen
        try:
            self._keys, self._problem = self._read(), None
            log.info("read %d keys anew from %s", len(self._keys), self.path)
        except InputError as error:
            if error.message != self._problem:
                log.error("%s The %d keys known before stay in force.", error.message, len(self._keys))
            self._problem = error.message

    def _read(self) -> dict[str, Key]:
        keys = {key.id: key for key in read_keys(self.path)}
        try:
            mode = self.path.stat().st_mode & 0o777
        except OSError:  # replaced this moment: it is looked at again
            return keys
        if mode & 0o077:
            log.warning("the key file %s has mode %03o: others than its owner may use it; chmod 600", self.path, mode)
        return keys

    def _signature(self) -> tuple[int, int, int, int] | None:
        """Changes with every rewrite (a rename gives another inode, an edit another time or size) and with owner and
        mode (of which ctime tells)."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
