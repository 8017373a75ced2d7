"""Request bodies: JSON, multipart or raw bytes, read by hand because one route takes all three.

    application/json                     the request itself
    multipart/form-data                  file parts, and a JSON part `request`
    anything else                        the bytes of one file; the request's fields are query parameters

``curl --data-binary @file`` says application/x-www-form-urlencoded unless told otherwise; that, and
application/octet-stream, count as "no type declared", and the bytes decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from astroclip.errors import InputError, LimitError, MediaTypeError
from astroclip.io import ImageOptions, SpectrumOptions, detect_modality
from astroclip.types import MODALITIES, Modality
from service.errors import MalformedRequest, validation_error
from service.schemas import SearchRequest
from service.settings import Settings

__all__ = [
    "OPTION_NAMES",
    "ReadOptions",
    "Upload",
    "parse_json",
    "read_files",
    "read_options",
    "read_parameters",
    "read_request",
]

R = TypeVar("R", bound=SearchRequest)
M = TypeVar("M", bound=BaseModel)

_UNDECLARED = ("", "application/octet-stream", "application/x-www-form-urlencoded", "binary/octet-stream")
OPTION_NAMES = ("pixel_scale_arcsec", "bands", "wave_unit", "flux_unit", "medium", "object")
_ARRIVES_AS_JSON = (
    "query",
    "k",
    "filter",
    "exclude_arcsec",
    "score_threshold",
    "fuse",
    "coverage",
    "density",
    "preview",
    "explain",
)
_LISTS = ("columns", "properties")
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii")  # of a form's names and texts; no charset named is UTF-8


@dataclass(frozen=True)
class Upload:
    """One file as sent: bytes, the type declared for it (None: undeclared), its name where the sender gave one."""

    data: bytes
    media_type: str | None = None
    name: str | None = None

    def sha256(self) -> str:
        """Of the bytes; of the largest files a tenth of a second and more."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class ReadOptions:
    """What query parameters say about uploads that the files do not; see `astroclip.io`."""

    image: ImageOptions = field(default_factory=ImageOptions)
    spectrum: SpectrumOptions = field(default_factory=SpectrumOptions)


def read_options(request: Request) -> ReadOptions:
    """The reading options among the query parameters. Raises InputError."""
    given = request.query_params
    medium = given.get("medium")
    if medium not in (None, "air", "vacuum"):
        raise InputError(f"medium is {medium!r}; wanted air or vacuum.", code="invalid_value", field="medium")
    bands = tuple(band.strip().lower() for band in given["bands"].split(",")) if "bands" in given else None
    image = ImageOptions(bands=bands, pixel_scale_arcsec=_number(given, "pixel_scale_arcsec"))
    spectrum = SpectrumOptions(
        wave_unit=given.get("wave_unit"),
        flux_unit=given.get("flux_unit"),
        medium=medium,  # type: ignore[arg-type]
        target=given.get("object"),
    )
    return ReadOptions(image, spectrum)


async def read_files(request: Request, settings: Settings) -> list[Upload]:
    """The files of an embed call: every multipart part `file`, or the raw body. Raises MalformedRequest."""
    _refuse_unknown(request, ("format",))
    if _media_type(request.headers) == "multipart/form-data":
        form = await _form(request, settings)
        strangers = sorted({name for name, _ in form.multi_items()} - {"file"})
        if strangers:
            raise MalformedRequest(
                f"The form has a part {strangers[0]!r}; this call takes parts named 'file'.", field=strangers[0]
            )
        files = [await _upload(part, "file") for part in form.getlist("file")]
        if not files:
            raise MalformedRequest("The form has no part named 'file'; add at least one file.", field="file")
        return files
    return [Upload(await request.body(), _declared(request.headers))]


async def read_request(
    request: Request, kind: type[R], settings: Settings, decode: Callable[..., Awaitable[Any]]
) -> tuple[R, dict[Modality, Upload]]:
    """The request and the uploads it speaks of. decode: as `Workers.decode`, of this request: to look into a file that
    does not say what it is. Raises MalformedRequest (400), InputError (422), LimitError."""
    media_type = _media_type(request.headers)
    if media_type == "application/json":
        _refuse_unknown(request, ("format",), options=False)
        return parse_json(await request.body(), kind, settings.max_json_bytes), {}
    if media_type == "multipart/form-data":
        _refuse_unknown(request, ("format",))
        return await _read_multipart(request, kind, settings)
    _refuse_unknown(request, ("format", "modality", *kind.model_fields))
    asked = _from_parameters(request, kind)
    data = await request.body()
    if not data:
        if asked.query is not None:  # everything stands in the URL
            return asked, {}
        raise MalformedRequest(
            "The request has no body; send JSON, a multipart form, or the bytes of one file.", code="empty_body"
        )
    upload = Upload(data, _declared(request.headers))
    modality = _said_modality(request)
    if modality is None:
        look = partial(detect_modality, upload.data, media_type=upload.media_type, limits=settings.reader)
        modality = await decode(look, size=len(data))
    return asked, {modality: upload}


async def read_parameters(request: Request, kind: type[M]) -> tuple[M, Upload]:
    """A request whose fields all stand in the URL, and the body as it came. Raises MalformedRequest, InputError."""
    _refuse_unknown(request, ("format", *kind.model_fields), options=False)
    asked = _from_parameters(request, kind)
    return asked, Upload(await request.body(), _declared(request.headers))


def parse_json(body: bytes, kind: type[M], most: int) -> M:
    """A body as `kind`. jiter refuses lone surrogates and bottomless nesting, which `json` would let through.

    Raises LimitError for more than `most` bytes, MalformedRequest, InputError.
    """
    if len(body) > most:
        raise LimitError(
            f"The JSON request holds {len(body):,} bytes; at most {most:,} are read. Shorten its lists; many vectors "
            "go to /v1/search/vectors as .npy.",
            code="json_too_large",
            limit=most,
        )
    try:
        raw = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise MalformedRequest(
                "The JSON is nested more than 200 deep. Write combine and filter flatter; /v1/info says how deep each "
                "may be.",
                code="nested_too_deeply",
                limit=200,
            ) from None
        message = f"The body is not JSON ({error}). /docs shows the form wanted."
        raise MalformedRequest(message, code="bad_json") from None
    return _validated(raw, kind)


def _validated(raw: Any, kind: type[M]) -> M:
    if not isinstance(raw, dict):
        raise MalformedRequest(
            f"The request is a JSON {type(raw).__name__}; wanted an object, such as "
            '{"query": {"object_id": "..."}, "k": 10}.'
        )
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise validation_error(error) from None
    except RecursionError:
        raise MalformedRequest("The query is nested too deeply; combine flat lists.", field="query") from None


async def _read_multipart(request: Request, kind: type[R], settings: Settings) -> tuple[R, dict[Modality, Upload]]:
    form = await _form(request, settings)
    raw: bytes = b"{}"
    uploads: dict[Modality, Upload] = {}
    for name, part in form.multi_items():
        if name == "request":
            raw = await part.read() if isinstance(part, UploadFile) else part.encode()
            continue
        modality = next((m for m in MODALITIES if m == name), None)
        if modality is None:
            raise MalformedRequest(
                f"The form has a part {name[:60]!r}; wanted the parts image, spectrum and request.", field=name[:60]
            )
        if modality in uploads:
            raise MalformedRequest(f"The form has two parts named {name!r}; send one object at a time.", field=name)
        uploads[modality] = await _upload(part, name)
    return parse_json(raw, kind, settings.max_json_bytes), uploads


async def _form(request: Request, settings: Settings) -> FormData:
    """Parse the form; files stay in memory, since the body limit already bounds them.

    Its texts are decoded in the event loop, with the charset that the client names: some of Python's take quadratic
    time (punycode: 0.2 s for 80 kB, hours for 32 MB), others give what no answer can hold, so only UTF-8 is taken.
    """
    _, said = parse_options_header(request.headers.get("content-type"))
    charset = said.get(b"charset", _CHARSETS[0]).lower()
    if charset not in _CHARSETS:
        raise MalformedRequest(
            f"The multipart form names the charset {charset.decode('latin-1')[:40]!r}; wanted utf-8, which needs no "
            "naming.",
            code="bad_multipart",
        )
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=settings.max_files,
        max_fields=8,
        max_part_size=settings.max_json_bytes,  # of parts that are no files: the request itself
    )
    parser.spool_max_size = settings.max_body_bytes + 1
    try:
        return await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise LimitError(
                f"The form holds more than {settings.max_files} files. Send them in several requests.",
                code="too_many_files",
                field="file",
                limit=settings.max_files,
            ) from None
        if error.message.startswith("Part exceeded"):
            raise LimitError(
                f"A text part of the form holds more than {settings.max_json_bytes:,} bytes. A file needs a file name "
                "(curl: -F image=@path); a request is shortened by sending many vectors to /v1/search/vectors.",
                code="json_too_large",
                limit=settings.max_json_bytes,
            ) from None
        raise MalformedRequest(f"The multipart form does not parse: {error.message}", code="bad_multipart") from None
    except (KeyError, UnicodeError):
        raise MalformedRequest(
            "The multipart form does not parse: its boundary is missing, or its names are not UTF-8.",
            code="bad_multipart",
        ) from None


async def _upload(part: UploadFile | str, name: str) -> Upload:
    if isinstance(part, str):
        raise MalformedRequest(
            f"The part {name!r} is text, not a file; give it a file name (curl: -F {name}=@path).", field=name
        )
    return Upload(await part.read(), _declared(part.headers), part.filename or None)


def _from_parameters(request: Request, kind: type[M]) -> M:
    """The request's fields out of the URL: JSON for structures and numbers, commas between names."""
    raw: dict[str, Any] = {}
    for name in kind.model_fields:
        if name not in request.query_params:
            continue
        text = request.query_params[name]
        if name in _LISTS:
            raw[name] = [word.strip() for word in text.split(",") if word.strip()]
        elif name in _ARRIVES_AS_JSON:
            try:
                raw[name] = from_json(text.encode("utf-8", "replace"), allow_inf_nan=True)
            except ValueError:
                raise MalformedRequest(
                    f'{name}={text[:60]!r} is not a JSON value; wanted e.g. k=16 or filter={{"column": ...}}.',
                    field=name,
                ) from None
        else:
            raw[name] = text
    return _validated(raw, kind)


def _said_modality(request: Request) -> Modality | None:
    said = request.query_params.get("modality")
    if said is None:
        return None
    modality = next((m for m in MODALITIES if m == said), None)
    if modality is None:
        message = f"modality is {said[:60]!r}; wanted image or spectrum."
        raise InputError(message, code="invalid_value", field="modality")
    return modality


def _refuse_unknown(request: Request, known: tuple[str, ...], options: bool = True) -> None:
    """A misspelt parameter would be ignored without a word; refuse it like an unknown field."""
    allowed = {*known, *(OPTION_NAMES if options else ())}
    for name in request.query_params:
        if name not in allowed:
            raise MalformedRequest(
                f"There is no parameter {name[:60]!r} here; known: {', '.join(sorted(allowed))}.",
                code="unknown_field",
                field=name[:60],
            )


def _number(given: Mapping[str, str], name: str) -> float | None:
    if name not in given:
        return None
    try:
        return float(given[name])
    except ValueError:
        raise InputError(f"{name}={given[name][:60]!r} is not a number.", code="invalid_value", field=name) from None


def _media_type(headers: Mapping[str, str] | Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _declared(headers: Mapping[str, str] | Headers) -> str | None:
    media_type = _media_type(headers)
    if media_type.startswith("multipart/"):
        raise MediaTypeError(f"Found the type {media_type}; wanted multipart/form-data or the file's own type.")
    return None if media_type in _UNDECLARED else media_type
