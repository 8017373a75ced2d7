"""Plots of explanations as SVG: small, sharp at any size, and without a plotting library.

What makes the match glows amber, what speaks against it blue; the curve or the picture is the model's own input.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

__all__ = ["data_url", "image_svg", "spectrum_svg"]

_FOR, _AGAINST, _LINE, _TEXT, _GROUND = "#f2b872", "#7fb2ff", "#dde5f0", "#93a1b5", "#0b0f16"
_WIDTH, _HEIGHT, _SIDE, _HEAD = 640, 200, 288, 36
_POINTS, _CELLS = 512, 128

Floats = npt.NDArray[np.floating]


def spectrum_svg(wave: Floats, flux: Floats, ivar: Floats, importance: Floats, title: str, note: str) -> str:
    """A spectrum (L,) over stripes that say how much each stretch matters. wave in Angstrom; flux in any unit."""
    top, bottom = 20.0, _HEIGHT - 18.0
    low, high = float(wave[0]), float(wave[-1])
    stripes = _means(importance, _CELLS)
    scale = max(float(np.abs(stripes).max()), 1e-12)
    places = _WIDTH * (_means(wave, _CELLS, edges=True) - low) / (high - low)
    parts = [
        f'<rect x="{a:.1f}" y="{top}" width="{b - a + 0.2:.1f}" height="{bottom - top}" {_tint(value / scale)}/>'
        for a, b, value in zip(places[:-1], places[1:], stripes, strict=True)
        if abs(value) > 0.02 * scale
    ]
    x, y = _curve(wave, flux, ivar)
    known = np.isfinite(y)
    if known.any():
        floor, ceiling = np.quantile(y[known], [0.005, 0.995])
        y = bottom - 4 - (np.clip(y, floor, ceiling) - floor) / max(ceiling - floor, 1e-12) * (bottom - top - 8)
        x = _WIDTH * (x - low) / (high - low)
        path = "".join(_path(x, y, known))
        parts.append(f'<path d="{path}" fill="none" stroke="{_LINE}" stroke-width="1"/>')
    for tick in range(1000 * int(np.ceil(low / 1000)), int(high) + 1, 1000):
        at = _WIDTH * (tick - low) / (high - low)
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{tick} Å</text>')
    return _svg(_WIDTH, _HEIGHT, [f"{title}: {note}"], parts)


def image_svg(jpeg: bytes, importance: Floats, title: str, note: str) -> str:
    """A picture under squares that say how much each region (S, S) matters."""
    side = importance.shape[0]
    cell = max(1, side // 32)
    count = side // cell
    squares = importance[: count * cell, : count * cell].reshape(count, cell, count, cell).mean(axis=(1, 3))
    scale, step = max(float(np.abs(squares).max()), 1e-12), _SIDE * cell / side
    picture = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    parts = [f'<image y="{_HEAD}" width="{_SIDE}" height="{_SIDE}" href="{picture}"/>']
    parts += [
        f'<rect x="{j * step:.1f}" y="{_HEAD + i * step:.1f}" width="{step:.2f}" height="{step:.2f}" '
        f"{_tint(squares[i, j] / scale)}/>"
        for i, j in np.ndindex(count, count)
        if abs(squares[i, j]) > 0.05 * scale
    ]
    return _svg(_SIDE, _SIDE + _HEAD, [title, note], parts)


def data_url(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _svg(width: int, height: int, lines: list[str], parts: list[str]) -> str:
    said = [escape(line) for line in lines]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" fill="{_TEXT}">'
        f'<title>{": ".join(said)}</title><rect width="{width}" height="{height}" fill="{_GROUND}"/>'
    )
    texts = [f'<text x="4" y="{14 + 15 * i}">{line}</text>' for i, line in enumerate(said)]
    return head + "".join([*texts, *parts]) + "</svg>"


def _tint(value: float) -> str:
    """Colour by the sign, opacity by the size (-1..1)."""
    return f'fill="{_FOR if value > 0 else _AGAINST}" fill-opacity="{0.65 * min(abs(value), 1.0):.3f}"'


def _means(values: Floats, count: int, edges: bool = False) -> Floats:
    """(count,) means of equal runs of (L,); with `edges`, the (count + 1,) values where the runs begin and end."""
    bounds = np.linspace(0, len(values), min(count, len(values)) + 1).astype(int)
    if edges:
        return values[np.minimum(bounds, len(values) - 1)]
    return np.array([values[a:b].mean() for a, b in zip(bounds[:-1], bounds[1:], strict=True)])


def _curve(wave: Floats, flux: Floats, ivar: Floats) -> tuple[Floats, Floats]:
    """At most `_POINTS` ivar-weighted means; NaN where nothing is known."""
    step = max(1, len(wave) // _POINTS)
    length = len(wave) // step * step
    weight = ivar[:length].astype(np.float64).reshape(-1, step)
    total = weight.sum(axis=1)
    sums = (flux[:length].reshape(-1, step) * weight).sum(axis=1)
    mean = np.divide(sums, total, out=np.full(len(total), np.nan), where=total > 0)
    return wave[:length].reshape(-1, step).mean(axis=1), mean


def _path(x: Floats, y: Floats, known: npt.NDArray[np.bool_]) -> Iterator[str]:
    pen = False
    for a, b, there in zip(x, y, known, strict=True):
        if there:
            yield f"{'L' if pen else 'M'}{a:.1f} {b:.1f}"
        pen = bool(there)
