"""The API key a client sends: given, or from the environment variable ASTROCLIP_API_KEY."""

from __future__ import annotations

import os

from astroclip.errors import InputError

__all__ = ["VARIABLE", "key_headers"]

VARIABLE = "ASTROCLIP_API_KEY"


def key_headers(api_key: str | None) -> dict[str, str]:
    """The header that carries the key; none where there is no key.

    As Authorization, since this is the header that HTTP clients keep out of their logs and take off when a redirect
    leads to another host. "" sends none, whatever the environment says. Raises InputError for what can be no key; the
    message does not show it, as an error from deeper down would.
    """
    key = (os.environ.get(VARIABLE, "") if api_key is None else api_key).strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"The API key holds spaces or characters that no key has ({len(key)} characters found); wanted one line "
            "as `astroclip keys create` prints it.",
            code="bad_api_key",
            field="api_key",
        )
    return {"authorization": f"Bearer {key}"}
