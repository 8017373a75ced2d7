"""The exception tree. Every error a caller can meet is one of these.

    AstroClipError
    |-- InputError          readable but unusable input                         HTTP 422 (a malformed request: 400)
    |   `-- MediaTypeError  bytes of a type we do not read                      HTTP 415
    |-- LimitError          larger than a stated limit                          HTTP 413
    |-- NotFoundError       no such object, column, property or index           HTTP 404
    |-- AccessError         no API key, or none that is known here            HTTP 401
    |   `-- ForbiddenError  a known key that may not do this                  HTTP 403
    |-- ProvenanceError     model and index do not belong together              HTTP 409
    |-- IndexFileError      an index file is missing, damaged or not ours       (start-up; never a request)
    |-- OverloadError       no capacity within the deadline                     HTTP 429
    `-- NotReadyError       the service has not answered its own canary yet     HTTP 503

Messages have three parts: what was found, what is wanted, how to mend it.
"""

from __future__ import annotations

from typing import Self

__all__ = [
    "AccessError",
    "AstroClipError",
    "ForbiddenError",
    "IndexFileError",
    "InputError",
    "LimitError",
    "MediaTypeError",
    "NotFoundError",
    "NotReadyError",
    "OverloadError",
    "ProvenanceError",
]


class AstroClipError(Exception):
    """Root of the tree.

    code:  short stable machine-readable word, e.g. ``"truncated_fits"``.
    field: the part of the input or request that is at fault, or None.
    limit: the limit that was passed (number with its unit in the message), or None.
    """

    default_code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        field: str | None = None,
        limit: float | int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.field = field
        self.limit = limit

    def without_frames(self) -> Self:
        """Itself, for those who keep it, without the frames it went through and those of what caused it: they hold the
        bytes that were read and often the error, too, so that only the garbage collector would free them."""
        rest: list[BaseException | None] = [self]
        seen = set()
        while rest:
            part = rest.pop()
            if part is not None and id(part) not in seen:  # one that is raised again may be a cause of its own cause
                seen.add(id(part))
                part.__traceback__ = None
                rest += (part.__cause__, part.__context__)
        return self


class InputError(AstroClipError):
    default_code = "unusable_input"


class MediaTypeError(InputError):
    default_code = "unknown_media_type"


class LimitError(AstroClipError):
    default_code = "limit_exceeded"


class NotFoundError(AstroClipError):
    default_code = "not_found"


class AccessError(AstroClipError):
    default_code = "key_missing"


class ForbiddenError(AccessError):
    default_code = "key_scope"


class ProvenanceError(AstroClipError):
    default_code = "model_index_mismatch"


class IndexFileError(AstroClipError):
    default_code = "damaged_index"


class OverloadError(AstroClipError):
    """`retry_after_s`: seconds after which the caller should try again."""

    default_code = "overloaded"

    def __init__(
        self, message: str, *, retry_after_s: float, code: str | None = None, limit: float | int | None = None
    ) -> None:
        super().__init__(message, code=code, limit=limit)
        self.retry_after_s = retry_after_s


class NotReadyError(AstroClipError):
    default_code = "not_ready"
