"""How a reader says no: what was found, what is wanted, how to mend it."""

from __future__ import annotations

from astroclip.errors import InputError, LimitError

__all__ = ["over_limit", "refusal"]


def refusal(
    code: str,
    *,
    found: str,
    wanted: str,
    mend: str,
    field: str | None = None,
    kind: type[InputError] = InputError,
) -> InputError:
    """An error of class `kind` with the house's three-part message; the caller raises it."""
    return kind(f"Found {found}; wanted {wanted}. {mend}", code=code, field=field)


def over_limit(code: str, *, what: str, found: float | int, limit: float | int, unit: str, mend: str) -> LimitError:
    """A `LimitError` that carries the limit as a number beside the sentence."""
    shown, bound = (f"{v:,}" if isinstance(v, int) else f"{v:,.1f}" for v in (found, limit))
    return LimitError(f"Found {what} of {shown} {unit}; wanted at most {bound} {unit}. {mend}", code=code, limit=limit)
