"""Filters: a small expression over catalogue columns and regions of the sky, compiled to a mask over the rows.

    {"and": [F, ..]}  {"or": [F, ..]}  {"not": F}
    {"column": "redshift", "range": [0.1, 0.3]}      inclusive; null = open end
    {"column": "target_class", "in": ["BGS", "LRG"]}  strings, numbers or booleans
    {"cone": {"ra": 180.0, "dec": 0.2, "radius_deg": 1.0}}    also radius_arcmin, radius_arcsec
    {"box": {"ra": [350, 10], "dec": [-5, 5]}}        ra may pass through 0: from the first eastward to the second
    {"polygon": [[ra, dec], ..]}                      great-circle sides, smaller than a hemisphere, either winding
    {"moc": "5/8-10 6/44"} or {"moc": {"5": [8, 9]}}  HEALPix nested cells by order (IVOA MOC 2.0, ASCII or JSON)

A row whose value is null or whose position is unknown matches no condition (and so does match its "not"). Angles are
degrees, ICRS. Parsing never evaluates text; size and depth are limited. An "and" that contradicts itself, whatever the
catalogue holds (two ranges of a column that do not meet, a condition and its "not"), is refused; one that merely
nothing passes is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from astroclip.errors import InputError, LimitError
from index.catalog import Catalog
from index.sky import check_position, healpix, unit_vectors

__all__ = ["DEFAULT_FILTER_LIMITS", "FilterLimits", "Predicate", "parse_filter"]

_MAX_ORDER = 29
_WORD = re.compile(r"[^\s,]+")  # of a MOC


@dataclass(frozen=True)
class FilterLimits:
    """Upper bounds of one filter, whatever its parts.

    max_depth:      and, or, not inside one another: more is generated, not written.
    max_terms:      conditions and the and, or, not that join them: each costs a pass over the catalogue.
    max_values:     values in all lists of "in": names of a survey's classes or of a sample's objects.
    max_vertices:   vertices of all polygons: each costs a pass over the rows, 5 ms for a million; an outline with more
                    is a MOC.
    max_cells:      cells (or ranges of cells) of all MOCs: the footprint of a survey at 3 arcmin has some 100,000, and
                    as many are parsed in 0.3 s.
    """

    max_depth: int = 8
    max_terms: int = 64
    max_values: int = 10_000
    max_vertices: int = 1_000
    max_cells: int = 250_000

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) < 2**53:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; wanted a number above zero")


DEFAULT_FILTER_LIMITS = FilterLimits()

Mask = npt.NDArray[np.bool_]


class Predicate(Protocol):
    """A parsed filter."""

    def mask(self, catalog: Catalog) -> Mask:
        """(N,) bool, True = passes. Raises NotFoundError for a column the catalogue has not."""
        ...


@dataclass(frozen=True)
class And:
    parts: tuple[Predicate, ...]

    def mask(self, catalog: Catalog) -> Mask:
        return np.asarray(np.logical_and.reduce([part.mask(catalog) for part in self.parts]), bool)


@dataclass(frozen=True)
class Or:
    parts: tuple[Predicate, ...]

    def mask(self, catalog: Catalog) -> Mask:
        return np.asarray(np.logical_or.reduce([part.mask(catalog) for part in self.parts]), bool)


@dataclass(frozen=True)
class Not:
    part: Predicate

    def mask(self, catalog: Catalog) -> Mask:
        return ~self.part.mask(catalog)


@dataclass(frozen=True)
class Range:
    """lo <= column <= hi."""

    column: str
    lo: float
    hi: float

    def mask(self, catalog: Catalog) -> Mask:
        values = catalog.values(self.column)
        return (values >= self.lo) & (values <= self.hi)


@dataclass(frozen=True)
class In:
    column: str
    values: tuple[Any, ...]

    def mask(self, catalog: Catalog) -> Mask:
        column = catalog.table.column(catalog.resolve(self.column))
        if isinstance(self.values[0], str):
            if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                raise _bad(
                    f"column {self.column!r} holds {column.type}", "numbers or booleans in the list", self.column
                )
            return np.asarray(pc.is_in(column, value_set=pa.array(self.values, column.type)).to_numpy(), bool)
        return np.isin(catalog.values(self.column), np.asarray(self.values, np.float64))


@dataclass(frozen=True)
class Cone:
    ra: float
    dec: float
    radius_deg: float

    def mask(self, catalog: Catalog) -> Mask:
        out = np.zeros(len(catalog), bool)
        out[catalog.cone(self.ra, self.dec, self.radius_deg)] = True
        return out


@dataclass(frozen=True)
class Box:
    """From ra[0] eastward to ra[1], dec[0] to dec[1], inclusive."""

    ra: tuple[float, float]
    dec: tuple[float, float]

    def mask(self, catalog: Catalog) -> Mask:
        ra, dec = catalog.values("ra"), catalog.values("dec")
        width = 360.0 if self.ra[1] - self.ra[0] >= 360.0 else (self.ra[1] - self.ra[0]) % 360.0
        return ((ra - self.ra[0]) % 360.0 <= width) & (dec >= self.dec[0]) & (dec <= self.dec[1])


@dataclass(frozen=True)
class Polygon:
    """Inside by the even-odd rule, in the gnomonic projection about the vertices: great circles are lines there."""

    ra: tuple[float, ...]
    dec: tuple[float, ...]

    def mask(self, catalog: Catalog) -> Mask:
        vertices = unit_vectors(self.ra, self.dec)
        centre = vertices.mean(axis=0)
        norm = float(np.linalg.norm(centre))
        if norm < 1e-9 or np.any(vertices @ centre / norm < 0.02):  # a vertex more than 88.8 deg away
            raise _bad("a polygon as large as a hemisphere", "one smaller; join several by or", "polygon")
        frame = np.linalg.svd(centre[None, :])[2]  # rows: +-centre, then two axes across it
        frame[0] = centre / norm
        x, y, front = _gnomonic(unit_vectors(catalog.values("ra"), catalog.values("dec")), frame)
        px, py, _ = _gnomonic(vertices, frame)
        known = np.flatnonzero(front)
        order = known[np.argsort(y[known])]
        x, y, odd = x[order], y[order], np.zeros(len(order), bool)
        for x1, y1, x2, y2 in zip(px, py, np.roll(px, -1), np.roll(py, -1), strict=True):
            if y1 != y2:  # only the rows at the heights of this side
                side = slice(*np.searchsorted(y, sorted((y1, y2)), side="left"))
                odd[side] ^= x[side] < x1 + (y[side] - y1) * (x2 - x1) / (y2 - y1)
        inside = np.zeros(len(catalog), bool)
        inside[order[odd]] = True
        return inside


@dataclass(frozen=True)
class Moc:
    """cells: (order, first, last) ranges of nested pixels, inclusive."""

    cells: tuple[tuple[int, int, int], ...]

    def mask(self, catalog: Catalog) -> Mask:
        ra, dec = catalog.values("ra"), catalog.values("dec")
        known = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
        finest = max(order for order, _, _ in self.cells)
        pixels = healpix(ra[known], dec[known], 2**finest)
        edges = [(a << 2 * (finest - o), (b + 1) << 2 * (finest - o)) for o, a, b in self.cells]
        starts, stops = (np.sort(np.array(side, np.int64)) for side in zip(*edges, strict=True))
        # A pixel is covered where more ranges have begun than ended: right for overlapping ranges as well.
        covered = np.searchsorted(starts, pixels, side="right") > np.searchsorted(stops, pixels, side="right")
        out = np.zeros(len(catalog), bool)
        out[known[covered]] = True
        return out


def parse_filter(expression: object, limits: FilterLimits = DEFAULT_FILTER_LIMITS) -> Predicate:
    """A predicate from decoded JSON. Raises InputError (code "bad_filter") or LimitError."""
    return _Parser(limits).parse(expression, 1)


class _Parser:
    """counts: what the filter holds so far, by limit."""

    def __init__(self, limits: FilterLimits) -> None:
        self._limits = limits
        self._counts = dict.fromkeys(("max_terms", "max_values", "max_vertices", "max_cells"), 0)

    def _count(self, limit: str, more: int, what: str) -> None:
        self._counts[limit] += more
        most = getattr(self._limits, limit)
        if self._counts[limit] > most:
            raise _limit(f"a filter of {self._counts[limit]} {what}" if more > 1 else f"more {what}", most)

    def parse(self, node: object, depth: int) -> Predicate:
        if depth > self._limits.max_depth:
            raise _limit(f"a filter nested deeper than {self._limits.max_depth}", self._limits.max_depth)
        self._count("max_terms", 1, "terms")
        if not isinstance(node, Mapping) or not node:
            raise _bad(f"{_short(node)} in a filter", 'an object such as {"column": "redshift", "range": [0.1, 0.3]}')
        if "column" in node:
            if _is_list(node.get("in")):
                self._count("max_values", len(node["in"]), "values in lists")
            return _column(node)
        if len(node) != 1:
            raise _bad(f"a filter with the keys {sorted(map(str, node))[:6]}", 'one of them; join several by "and"')
        ((key, body),) = node.items()
        if key in ("and", "or"):
            if not _is_list(body) or not body:
                raise _bad(f'"{key}" of {_short(body)}', "a list of filters, at least one", key)
            parts = tuple(self.parse(part, depth + 1) for part in body)
            if key == "or":
                return Or(parts)
            _check_consistent(_flattened(parts))
            return And(parts)
        if key == "not":
            return Not(self.parse(body, depth + 1))
        if key not in _REGIONS:
            raise _bad(f"the filter {_short(key)}", f"one of and, or, not, column, {', '.join(_REGIONS)}")
        if key == "polygon" and _is_list(body):
            self._count("max_vertices", len(body), "vertices of polygons")
        if key == "moc":
            words = islice(_WORD.finditer(body), self._limits.max_cells + 1) if isinstance(body, str) else ()
            lists = body.values() if isinstance(body, Mapping) else ()
            self._count("max_cells", sum(1 for _ in words) + sum(map(_size, lists)), "cells of MOCs")
        return _REGIONS[key](body)


def _flattened(parts: Sequence[Predicate]) -> list[Predicate]:
    """The conditions of an "and" and of those directly inside of it."""
    return [leaf for part in parts for leaf in (_flattened(part.parts) if isinstance(part, And) else [part])]


def _check_consistent(parts: Sequence[Predicate]) -> None:
    """Refuse conditions that exclude one another by what they say."""
    denied = [part.part for part in parts if isinstance(part, Not)]
    for part in parts:
        if part in denied:
            raise _bad('a condition and its own "not" in one "and"', "one of them", "and")
    ranges: dict[str, tuple[float, float]] = {}
    for part in parts:
        if isinstance(part, Range):
            lo, hi = ranges.get(part.column, (-math.inf, math.inf))
            ranges[part.column] = lo, hi = max(lo, part.lo), min(hi, part.hi)
            if lo > hi:
                raise _bad(
                    f"ranges of {_short(part.column)} that do not meet", "ranges that do; join others by or", "and"
                )
    lists: dict[str, set[Any]] = {}
    for part in parts:
        if isinstance(part, In):
            lo, hi = ranges.get(part.column, (-math.inf, math.inf))
            inside = {v for v in part.values if isinstance(v, str) or lo <= v <= hi}
            lists[part.column] = lists.get(part.column, inside) & inside
            if not lists[part.column]:
                raise _bad(f"conditions on {_short(part.column)} that no value meets", "a value that meets all", "and")


def _column(node: Mapping[str, Any]) -> Predicate:
    name = node["column"]
    extra = set(node) - {"column"}
    if not isinstance(name, str) or len(extra) != 1 or not extra <= {"range", "in"}:
        raise _bad(
            f"a column filter with {sorted(map(str, node))[:6]}", '"column" (a name) and one of "range", "in"', "column"
        )
    if "range" in node:
        ends = node["range"]
        if not _is_list(ends) or len(ends) != 2 or not all(end is None or _is_number(end) for end in ends):
            raise _bad(f"the range {_short(ends)}", "[low, high], numbers or null", "range")
        lo, hi = (-math.inf if ends[0] is None else float(ends[0])), (math.inf if ends[1] is None else float(ends[1]))
        if lo > hi:
            raise _bad(f"the range {_short(ends)}", "low not above high", "range")
        return Range(name, lo, hi)
    values = node["in"]
    if not _is_list(values) or not values:
        raise _bad(f'"in" of {_short(values)}', "a list of at least one value", "in")
    if not (all(isinstance(v, str) for v in values) or all(isinstance(v, bool) or _is_number(v) for v in values)):
        raise _bad(f'"in" of {_short(values)}', "all strings, or all numbers", "in")
    return In(name, tuple(values))


def _cone(body: object) -> Predicate:
    units = {"radius_deg": 1.0, "radius_arcmin": 60.0, "radius_arcsec": 3600.0}
    given = [key for key in units if isinstance(body, Mapping) and key in body]
    if len(given) != 1:
        raise _bad(f"the cone {_short(body)}", '{"ra", "dec", "radius_deg"} in degrees', "cone")
    numbers = _numbers(body, ("ra", "dec", given[0]), "cone")
    ra, dec = check_position(numbers[0], numbers[1])
    radius = numbers[2] / units[given[0]]
    if not 0.0 <= radius <= 180.0:
        raise _bad(f"the radius {radius} deg", "0..180 degrees", given[0])
    return Cone(ra, dec, radius)


def _box(body: object) -> Predicate:
    if not isinstance(body, Mapping) or set(body) != {"ra", "dec"} or not all(_is_pair(body[key]) for key in body):
        raise _bad(f"the box {_short(body)}", '{"ra": [west, east], "dec": [south, north]} in degrees', "box")
    (ra0, ra1), (dec0, dec1) = body["ra"], body["dec"]
    check_position(ra0, dec0), check_position(ra1, dec1)
    if dec0 > dec1:
        raise _bad(f"the declinations {_short(body['dec'])}", "south first, then north", "box")
    return Box((float(ra0), float(ra1)), (float(dec0), float(dec1)))


def _polygon(body: Any) -> Predicate:
    if not _is_list(body) or len(body) < 3 or not all(_is_pair(vertex) for vertex in body):
        raise _bad(f"the polygon {_short(body)}", "a list of at least three [ra, dec] in degrees", "polygon")
    vertices = [check_position(float(ra), float(dec)) for ra, dec in body]
    return Polygon(tuple(ra for ra, _ in vertices), tuple(dec for _, dec in vertices))


def _moc(body: object) -> Predicate:
    cells: list[tuple[int, int, int]] = []
    if isinstance(body, str):
        order: int | None = None
        for word in re.split(r"[\s,]+", body.strip()):
            found = re.fullmatch(r"(?:(\d{1,2})/)?(?:(\d{1,19})(?:-(\d{1,19}))?)?", word)
            if found is None or (found[1] is None and order is None):
                raise _bad(f"{_short(word)} in a MOC", 'words such as "5/8-10" or "11"', "moc")
            order = int(found[1]) if found[1] else order
            if found[2] and order is not None:
                cells.append((order, int(found[2]), int(found[3] or found[2])))
    elif isinstance(body, Mapping):
        for key, pixels in body.items():
            whole = _is_list(pixels) and all(isinstance(p, int) and not isinstance(p, bool) for p in pixels)
            if not (isinstance(key, str) and key.isdecimal() and len(key) <= 2 and whole):
                raise _bad(f"the MOC entry {_short(key)}", '{"order": [pixel, ..]}', "moc")
            cells += [(int(key), pixel, pixel) for pixel in pixels]
    if not cells:
        raise _bad(f"the MOC {_short(body)}", 'cells, as "5/8-10 6/44" or {"5": [8, 9, 10]}', "moc")
    for order, first, last in cells:
        if not (0 <= order <= _MAX_ORDER and 0 <= first <= last < 12 * 4**order):
            raise _bad(
                f"the MOC cells {order}/{first}-{last}", f"order 0..{_MAX_ORDER} and pixels below 12 * 4^order", "moc"
            )
    return Moc(tuple(cells))


_REGIONS: dict[str, Callable[[object], Predicate]] = {"cone": _cone, "box": _box, "polygon": _polygon, "moc": _moc}


def _gnomonic(vectors: npt.NDArray[np.float64], frame: npt.NDArray[np.float64]) -> tuple[Any, Any, Mask]:
    """Tangent-plane coordinates about frame[0], and which points lie on its side of the sphere."""
    depth = vectors @ frame[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        return vectors @ frame[1] / depth, vectors @ frame[2] / depth, depth > 0


def _numbers(body: object, keys: Sequence[str], what: str) -> list[float]:
    if not isinstance(body, Mapping) or set(body) != set(keys) or not all(_is_number(body[key]) for key in keys):
        raise _bad(f"the {what} {_short(body)}", f"the numbers {', '.join(keys)}", what)
    return [float(body[key]) for key in keys]


def _size(value: object) -> int:
    return len(value) if isinstance(value, Sequence) else 0


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_pair(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(_is_number(v) for v in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _bad(found: str, wanted: str, field: str | None = None) -> InputError:
    where = "filter" if field is None else f"filter.{field[:60]}"
    return InputError(f"found {found}; wanted {wanted}; mend the filter", code="bad_filter", field=where)


def _limit(found: str, limit: int) -> LimitError:
    return LimitError(f"found {found}; wanted at most {limit}; simplify the filter", field="filter", limit=limit)
