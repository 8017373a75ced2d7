"""`astroclip keys create | list | revoke`: the API keys of a service."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from astroclip.errors import InputError

__all__ = ["register"]


class ScopeName(StrEnum):
    read = "read"
    admin = "admin"


FileOption = Annotated[
    Path, typer.Option("--file", envvar="ASTROCLIP_KEYS_FILE", help="The key file; one that is not there yet is made.")
]


def register(app: typer.Typer) -> None:
    """Add the `keys` group to the command line."""
    group = typer.Typer(help="Make, list and revoke the API keys of a service.", no_args_is_help=True)
    group.command("create")(create)
    group.command("list")(show)
    group.command("revoke")(revoke)
    app.add_typer(group, name="keys")


def create(
    file: FileOption,
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(help="read (the default): ask; admin: call /v1/admin; repeatable."),
    ] = None,
    note: Annotated[str, typer.Option(help="Who or what the key is for; shown by `keys list`.")] = "",
    days: Annotated[float | None, typer.Option(help="Days until it expires; default: never.")] = None,
    rate_per_s: Annotated[
        float | None, typer.Option(min=0, help="Its own requests a second; 0: no bound; default: the service's.")
    ] = None,
    in_flight: Annotated[
        int | None, typer.Option(min=0, help="Its own requests at work at once; 0: no bound; default: the service's.")
    ] = None,
) -> None:
    """Make a key and print it, this once; the file keeps only its hash. A running service takes it within a second."""
    from service.keys import changing, new_key

    expires = None
    if days is not None:
        if not 0 < days <= 36500:
            raise InputError(f"--days is {days:g}; wanted more than 0, at most 36500.", field="days")
        expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    scopes = [one.value for one in scope or [ScopeName.read]]
    with changing(file) as keys:
        text, key = new_key(scopes, note=note, expires=expires, max_rate_per_s=rate_per_s, max_in_flight=in_flight)  # type: ignore[arg-type]
        keys.append(key)
    _say(f"Key {key.id}, {' and '.join(sorted(scopes))}, in {file}. It is shown once:")
    print(text)


def show(file: FileOption) -> None:
    """List the keys: id, scopes, when made, until when good, rates, note."""
    from service.keys import read_keys

    print(f"{'id':10}{'scopes':14}{'created':22}{'expires':22}{'per s':>8}{'at once':>9}  note")
    for key in read_keys(file):
        until = f"{key.expires:%Y-%m-%dT%H:%M:%SZ}" + (" (past)" if key.expired() else "") if key.expires else "never"
        rate = "" if key.max_rate_per_s is None else f"{key.max_rate_per_s:g}"
        at_once = "" if key.max_in_flight is None else key.max_in_flight
        made, scopes = f"{key.created:%Y-%m-%dT%H:%M:%SZ}", ",".join(sorted(key.scopes))
        print(f"{key.id:10}{scopes:14}{made:22}{until:22}{rate:>8}{at_once:>9}  {key.note}")


def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, the 8 characters after ac_.")],
    file: FileOption,
) -> None:
    """Take a key out of the file; a running service refuses it within a second."""
    from service.keys import changing

    with changing(file) as keys:
        left = [key for key in keys if key.id != key_id]
        if len(left) == len(keys):
            raise InputError(f"{file} holds no key {key_id!r}; `astroclip keys list` shows which it holds.", field="id")
        keys[:] = left
    _say(f"Key {key_id} is revoked.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
