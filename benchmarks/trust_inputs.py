"""What trust must find out: pictures and spectra that are no galaxy, made from seeded noise and held-out galaxies.

Every maker takes a random generator and a held-out galaxy (an `Image` or a `Spectrum`) and returns one input of the
same type, which then passes through the library's own preprocessing; what that refuses counts as found out. "junk"
kinds are not astronomical at all, "damaged" ones are galaxies spoilt by the instrument or on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from astroclip.io import ImageOptions, read_images
from astroclip.types import Image, Spectrum

__all__ = ["DAMAGED_IMAGES", "DAMAGED_SPECTRA", "JUNK_IMAGES", "JUNK_SPECTRA"]

Array = npt.NDArray[Any]
Generator = np.random.Generator
ImageMaker = Callable[[Generator, Image], Image]
SpectrumMaker = Callable[[Generator, Spectrum], Spectrum]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _sky(image: Image) -> Array:
    """(B, 1, 1) noise of the sky: 1.4826 MAD of each band."""
    flat = image.pixels.reshape(len(image.pixels), -1)
    level = np.median(flat, axis=1, keepdims=True)
    return np.asarray(1.4826 * np.median(np.abs(flat - level), axis=1))[:, None, None]


def _with(image: Image, pixels: Array) -> Image:
    return replace(image, pixels=np.ascontiguousarray(pixels, np.float32), mask=np.zeros(image.pixels.shape, bool))


def _noise(scale: float) -> ImageMaker:
    """White noise, `scale` times the sky's."""
    return lambda rng, image: _with(image, rng.standard_normal(image.pixels.shape) * _sky(image) * scale)


def _uniform(rng: Generator, image: Image) -> Image:
    """Independent pixels between 0 and the galaxy's brightest."""
    return _with(image, rng.random(image.pixels.shape) * image.pixels.max())


def _permuted(rng: Generator, image: Image) -> Image:
    """The galaxy's pixels in random places, the same in every band: its colours and fluxes without its shape."""
    flat = image.pixels.reshape(len(image.pixels), -1)
    return _with(image, flat[:, rng.permutation(flat.shape[1])].reshape(image.pixels.shape))


def _tiles(rng: Generator, image: Image) -> Image:
    """Tiles of 8 pixels in random places."""
    side = image.pixels.shape[-1] // 8 * 8
    tiles = image.pixels[:, :side, :side].reshape(len(image.pixels), side // 8, 8, side // 8, 8).swapaxes(2, 3)
    mixed = tiles.reshape(len(image.pixels), -1, 8, 8)[:, rng.permutation((side // 8) ** 2)]
    out = mixed.reshape(tiles.shape).swapaxes(2, 3).reshape(-1, side, side)
    return replace(image, pixels=np.ascontiguousarray(out), mask=np.zeros(out.shape, bool))


def _gradient(rng: Generator, image: Image) -> Image:
    """A ramp across the field in a random direction, a hundred times the sky's noise, and that noise."""
    y, x = np.mgrid[: image.pixels.shape[1], : image.pixels.shape[2]] / image.pixels.shape[1] - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 100 * (x * np.cos(angle) + y * np.sin(angle))
    return _with(image, (ramp + rng.standard_normal(image.pixels.shape)) * _sky(image))


def _constant(rng: Generator, image: Image) -> Image:
    """One value throughout."""
    return _with(image, np.full(image.pixels.shape, 0.1))


def _flat_field(rng: Generator, image: Image) -> Image:
    """A high level with the noise of its counts."""
    return _with(image, (50 + rng.standard_normal(image.pixels.shape)) * _sky(image))


def _checkerboard(rng: Generator, image: Image) -> Image:
    y, x = np.indices(image.pixels.shape[1:]) // int(rng.integers(2, 12))
    return _with(image, ((x + y) % 2) * np.full((len(image.pixels), 1, 1), rng.uniform(0.02, 1)))


def _read_picture(colours: Array) -> Image:
    from PIL import Image as Pillow

    stream = BytesIO()
    Pillow.fromarray(np.asarray(colours, np.uint8)).save(stream, "JPEG", quality=90)
    (image,) = read_images(stream.getvalue(), name="picture.jpg", options=ImageOptions())
    return image


def _text(rng: Generator, image: Image) -> Image:
    """A page of words, black on white or white on black, as a JPEG."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    dark = bool(rng.integers(2))
    page = Pillow.new("RGB", (160, 160), "black" if dark else "white")
    draw = ImageDraw.Draw(page)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))
    for line in range(0, 160, 12):
        draw.text((2, line), "".join(rng.choice(letters, 30)), fill="white" if dark else "black")
    return _read_picture(np.asarray(page))


def _photograph(rng: Generator, image: Image) -> Image:
    """What a camera sees of the ground: amplitudes as 1/frequency (Field 1987), some edges, correlated colours."""
    size = 160
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    amplitude = 1 / np.maximum(frequency, 1 / size)
    waves = rng.standard_normal((4, *amplitude.shape)) + 1j * rng.standard_normal((4, *amplitude.shape))
    planes = np.fft.irfft2(amplitude * waves, s=(size, size))
    planes = (planes - planes.mean(axis=(1, 2), keepdims=True)) / planes.std(axis=(1, 2), keepdims=True)
    colours = 0.9 * planes[0] + 0.4 * planes[1:]
    for _ in range(int(rng.integers(1, 6))):  # things with edges
        y, x = rng.integers(0, size, 2)
        h, w = rng.integers(10, 80, 2)
        colours[:, y : y + h, x : x + w] += rng.normal(0, 1, (3, 1, 1))
    return _read_picture(np.moveaxis(np.clip(110 + 50 * colours, 0, 255), 0, -1))


JUNK_IMAGES: dict[str, ImageMaker] = {
    "empty sky": _noise(1.0),
    "noise, 10 x sky": _noise(10.0),
    "noise, 100 x sky": _noise(100.0),
    "uniform noise": _uniform,
    "permuted pixels": _permuted,
    "permuted tiles": _tiles,
    "gradient": _gradient,
    "constant": _constant,
    "flat field": _flat_field,
    "checkerboard": _checkerboard,
    "text": _text,
    "photograph": _photograph,
}


def _trails(rng: Generator, image: Image) -> Image:
    """Two to four satellite trails through the field, one of them across the galaxy, 30 to 300 times the sky."""
    size = image.pixels.shape[-1]
    y, x = np.indices(image.pixels.shape[1:]) - (size - 1) / 2
    pixels = image.pixels.copy()
    for i in range(int(rng.integers(2, 5))):
        angle, away = rng.uniform(0, np.pi), 0.0 if i == 0 else rng.uniform(-0.3, 0.3) * size
        distance = x * np.sin(angle) - y * np.cos(angle) - away
        profile = np.exp(-0.5 * (distance / rng.uniform(1.0, 2.0)) ** 2)
        pixels += profile * rng.uniform(30, 300) * _sky(image)
    return _with(image, pixels)


def _cosmic_rays(rng: Generator, image: Image) -> Image:
    """Forty to a hundred short bright tracks a band, each band its own, as in a single exposure left uncleaned."""
    pixels = image.pixels.copy()
    size = pixels.shape[-1]
    for plane, sky in zip(pixels, _sky(image)[:, 0, 0], strict=True):
        for _ in range(int(rng.integers(40, 100))):
            length, angle = rng.integers(1, 12), rng.uniform(0, np.pi)
            steps = np.arange(length)
            y = np.clip(rng.integers(size) + steps * np.sin(angle), 0, size - 1).astype(int)
            x = np.clip(rng.integers(size) + steps * np.cos(angle), 0, size - 1).astype(int)
            plane[y, x] += rng.uniform(50, 500) * sky
    return _with(image, pixels)


def _bleeding(rng: Generator, image: Image) -> Image:
    """A saturated star's columns bleeding through the field."""
    pixels, centre = image.pixels.copy(), image.pixels.shape[-1] // 2
    column = centre + int(rng.integers(-12, 13))
    pixels[:, :, column : column + int(rng.integers(3, 7))] = 2000 * _sky(image)
    return _with(image, pixels)


def _dead_half(rng: Generator, image: Image) -> Image:
    """Half the field read by an amplifier that was dead: zeros without a mask."""
    pixels, centre = image.pixels.copy(), image.pixels.shape[-1] // 2
    pixels[:, :, :centre] = 0.0
    return _with(image, pixels)


def _negative(rng: Generator, image: Image) -> Image:
    return _with(image, -image.pixels)


def _off_centre(rng: Generator, image: Image) -> Image:
    """The galaxy away from the centre by a quarter of the field, the other sky wrapped round."""
    shift = image.pixels.shape[-1] // 4
    return _with(image, np.roll(image.pixels, (shift * rng.choice([-1, 1]), shift * rng.choice([-1, 1])), (1, 2)))


def _bands_reversed(rng: Generator, image: Image) -> Image:
    """g and z exchanged."""
    return _with(image, image.pixels[::-1])


def _wrong_unit(rng: Generator, image: Image) -> Image:
    """Counts for nanomaggies: a thousand times too bright."""
    return _with(image, image.pixels * 1000.0)


DAMAGED_IMAGES: dict[str, ImageMaker] = {
    "satellite trails": _trails,
    "cosmic rays": _cosmic_rays,
    "bleeding columns": _bleeding,
    "dead half": _dead_half,
    "negative": _negative,
    "off centre": _off_centre,
    "bands reversed": _bands_reversed,
    "flux x 1000": _wrong_unit,
}


# --- spectra ----------------------------------------------------------------------------------------------------------


def _noise_of(spectrum: Spectrum) -> Array:
    """Standard deviation a pixel, 0 where nothing is known."""
    good = (spectrum.ivar > 0) & ~spectrum.mask
    return np.where(good, 1 / np.sqrt(np.where(good, spectrum.ivar, 1)), 0.0)


def _flux(spectrum: Spectrum, flux: Array) -> Spectrum:
    return replace(spectrum, flux=np.ascontiguousarray(flux, np.float32))


def _drawn(shape: Callable[[Generator, Array], Array], snr: float) -> SpectrumMaker:
    """`shape`(rng, wave) of order one at a median signal-to-noise of `snr` a pixel, with the spectrum's own noise."""

    def make(rng: Generator, spectrum: Spectrum) -> Spectrum:
        sigma = _noise_of(spectrum)
        level = snr * float(np.median(sigma[sigma > 0]))
        return _flux(spectrum, level * shape(rng, spectrum.wave) + sigma * rng.standard_normal(sigma.shape))

    return make


def _level(rng: Generator, wave: Array) -> Array:
    return np.ones_like(wave)


def _sine(rng: Generator, wave: Array) -> Array:
    return np.asarray(1 + np.sin(2 * np.pi * (wave - wave[0]) / rng.uniform(50, 1500) + rng.uniform(0, 2 * np.pi)))


def _ramp(rng: Generator, wave: Array) -> Array:
    place = (wave - wave[0]) / (wave[-1] - wave[0])
    return np.asarray(2 * (place if rng.integers(2) else 1 - place))


def _steps(rng: Generator, wave: Array) -> Array:
    return np.asarray(2.0 * (((wave - wave[0]) // rng.uniform(100, 800)) % 2))


def _walk(rng: Generator, wave: Array) -> Array:
    walk = np.cumsum(rng.standard_normal(wave.shape))
    return np.asarray((walk - walk.min()) / np.ptp(walk) * 2)


def _lamp(rng: Generator, wave: Array) -> Array:
    """An arc lamp: sixty lines at random wavelengths, strengths over two decades."""
    flux = np.zeros_like(wave)
    for centre, strength in zip(rng.uniform(wave[0], wave[-1], 60), 10 ** rng.uniform(0, 2, 60), strict=True):
        flux += strength * np.exp(-0.5 * ((wave - centre) / 2.0) ** 2)
    return flux


def _shuffled(block: int) -> SpectrumMaker:
    """Runs of `block` pixels in random places, flux and ivar together."""

    def make(rng: Generator, spectrum: Spectrum) -> Spectrum:
        order = rng.permutation(len(spectrum.wave) // block)
        places = (order[:, None] * block + np.arange(block)).ravel()
        places = np.concatenate([places, np.arange(len(places), len(spectrum.wave))])
        return replace(spectrum, flux=spectrum.flux[places], ivar=spectrum.ivar[places], mask=spectrum.mask[places])

    return make


def _flux_shuffled(rng: Generator, spectrum: Spectrum) -> Spectrum:
    """Flux alone in random places; the ivar stays."""
    return _flux(spectrum, rng.permutation(spectrum.flux))


def _reversed(rng: Generator, spectrum: Spectrum) -> Spectrum:
    return replace(
        spectrum,
        flux=spectrum.flux[::-1].copy(),
        ivar=spectrum.ivar[::-1].copy(),
        mask=spectrum.mask[::-1].copy(),
    )


JUNK_SPECTRA: dict[str, SpectrumMaker] = {
    "noise": _drawn(_level, 0.0),
    "level, S/N 1": _drawn(_level, 1.0),
    "level, S/N 5": _drawn(_level, 5.0),
    "level, S/N 30": _drawn(_level, 30.0),
    "ramp, S/N 5": _drawn(_ramp, 5.0),
    "sine, S/N 1": _drawn(_sine, 1.0),
    "sine, S/N 5": _drawn(_sine, 5.0),
    "sine, S/N 30": _drawn(_sine, 30.0),
    "steps, S/N 5": _drawn(_steps, 5.0),
    "random walk, S/N 5": _drawn(_walk, 5.0),
    "arc lamp, S/N 5": _drawn(_lamp, 5.0),
    "shuffled pixels": _shuffled(1),
    "shuffled flux": _flux_shuffled,
    "shuffled runs of 64": _shuffled(64),
    "shuffled runs of 512": _shuffled(512),
    "reversed": _reversed,
}


def _negative_spectrum(rng: Generator, spectrum: Spectrum) -> Spectrum:
    return _flux(spectrum, -spectrum.flux)


def _fringes(rng: Generator, spectrum: Spectrum) -> Spectrum:
    """Half the flux in fringes of 30 to 100 A."""
    waves = np.sin(2 * np.pi * spectrum.wave / rng.uniform(30, 100))
    return _flux(spectrum, spectrum.flux * (1 + 0.5 * waves))


def _spikes(rng: Generator, spectrum: Spectrum) -> Spectrum:
    """A hundred cosmic rays of 20 to 200 sigma left in."""
    flux, sigma = spectrum.flux.copy(), _noise_of(spectrum)
    places = rng.integers(0, len(flux), 100)
    flux[places] += (sigma[places] * rng.uniform(20, 200, 100)).astype(np.float32)
    return _flux(spectrum, flux)


def _arm_step(rng: Generator, spectrum: Spectrum) -> Spectrum:
    """The blue arm's flux calibration wrong by a factor of three."""
    return _flux(spectrum, np.where(spectrum.wave < 5800, 3 * spectrum.flux, spectrum.flux))


DAMAGED_SPECTRA: dict[str, SpectrumMaker] = {
    "negative": _negative_spectrum,
    "fringes": _fringes,
    "cosmic rays": _spikes,
    "arm step": _arm_step,
}
