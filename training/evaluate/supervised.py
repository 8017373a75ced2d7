"""Supervised baselines on the same training objects: what labels alone would give.

* `ImageRegression`   ResNet-18 (the image tower itself: same asinh mapping, same head) on the five properties.
* `TableRegression`   a small MLP on photometry (g, r, z and two colours).
* `RedshiftClasses`   a five-block 1-D CNN over the log-wavelength grid with redshift classes: the ceiling for redshift
                      from spectra. On that grid a redshift is a shift, so classes of equal width in ln(1 + z) are
                      equally many pixels apart, one learned template serves them all, and shifting a spectrum makes
                      a new training object.

Images and spectra come as functions of row numbers, since a survey is held in half precision and cropped on the way;
labels are arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from astroclip.models import ImageTower, ImageTowerConfig
from astroclip.models.spectrum_tower import normalise
from astroclip.preprocess import SpectrumGrid
from training.evaluate.fit import Rows, predict
from training.evaluate.metrics import r2

__all__ = [
    "ImageRegression",
    "RedshiftClasses",
    "RedshiftNet",
    "TableRegression",
    "image_net",
    "table_net",
]

Array = npt.NDArray[Any]
ImageRows = Callable[[Rows], torch.Tensor]
SpectrumRows = Callable[[Rows], tuple[torch.Tensor, torch.Tensor]]


class _Regression:
    """Mean squared error on targets standardised over the training rows; scored by the mean R2."""

    def __init__(self, targets: Array, train_rows: Rows) -> None:
        self.targets = np.asarray(targets, np.float64)
        train = self.targets[train_rows]
        self.mean, self.spread = train.mean(axis=0), np.where(train.std(axis=0) > 0, train.std(axis=0), 1.0)

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def augmented(self, rows: Rows, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        return self.inputs(rows)

    def loss(self, model: nn.Module, rows: Rows, rng: np.random.Generator, device: str) -> torch.Tensor:
        wanted = torch.from_numpy(((self.targets[rows] - self.mean) / self.spread).astype(np.float32))
        got = model(*(tensor.to(device) for tensor in self.augmented(rows, rng)))
        return F.mse_loss(got.float(), wanted.to(device))

    def predict(self, model: nn.Module, rows: Rows, device: str) -> Array:
        """(len(rows), P) in the targets' own units."""
        return predict(model, self.inputs, rows, device) * self.spread + self.mean

    def score(self, model: nn.Module, rows: Rows, device: str) -> float:
        got = self.predict(model, rows, device)
        return float(np.mean([r2(self.targets[rows, i], got[:, i]) for i in range(got.shape[1])]))


class ImageRegression(_Regression):
    """images: rows -> (n, B, S, S) float32 nanomaggies. Augmented by the eight flips and quarter turns."""

    def __init__(self, images: ImageRows, targets: Array, train_rows: Rows) -> None:
        super().__init__(targets, train_rows)
        self.images = images

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        return (self.images(rows),)

    def augmented(self, rows: Rows, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        images = self.images(rows).clone()
        turns, flips = rng.integers(0, 4, len(rows)), rng.integers(0, 2, len(rows))
        for turn in range(4):
            for flip in range(2):
                some = torch.from_numpy((turns == turn) & (flips == flip))
                turned = torch.rot90(images[some], turn, dims=(2, 3))
                images[some] = turned.flip(3) if flip else turned
        return (images,)


class TableRegression(_Regression):
    """features: (N, F), standardised here over the training rows."""

    def __init__(self, features: Array, targets: Array, train_rows: Rows) -> None:
        super().__init__(targets, train_rows)
        train = np.asarray(features)[train_rows]
        spread = np.where(train.std(axis=0) > 0, train.std(axis=0), 1.0)
        self.features = ((np.asarray(features) - train.mean(axis=0)) / spread).astype(np.float32)

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(self.features[rows]),)


def image_net(n_targets: int, config: ImageTowerConfig | None = None) -> nn.Module:
    """The model's own image tower with one output a property."""
    return ImageTower(config or ImageTowerConfig(), n_targets)


def table_net(n_features: int, n_targets: int, width: int = 128) -> nn.Module:
    """Three hidden layers of `width`."""
    layers: list[nn.Module] = []
    for size in (n_features, width, width):
        layers += [nn.Linear(size, width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, n_targets))


class RedshiftNet(nn.Module):
    """(N, L) flux and ivar -> (N, classes) logits over equal bins of ln(1 + z) from 0 to ln(1 + z_max).

    Five convolution blocks (the first with stride 4), then a correlation of their features with one learned
    rest-frame template at every redshift: since a redshift is a shift, what is learned at one serves all others.
    A class is `STRIDE` pixels of the grid wide; `grid` fixes both ends of the template.
    """

    STRIDE = 4

    def __init__(self, n_pixels: int = 4096, log_width: float = 1.00389, z_max: float = 1.7, width: int = 32) -> None:
        super().__init__()
        self.settings = {"n_pixels": n_pixels, "log_width": log_width, "z_max": z_max, "width": width}
        self.step = log_width / n_pixels * self.STRIDE  # of ln(1 + z), a class
        self.n_classes = int(np.ceil(np.log1p(z_max) / self.step))
        blocks: list[nn.Module] = []
        for block in range(5):
            channels, stride = (2, self.STRIDE) if block == 0 else (width, 1)
            kernel = 4 * self.STRIDE + 1 if block == 0 else 9
            blocks += [
                nn.Conv1d(channels, width, kernel, stride, padding=kernel // 2),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.length = n_pixels // self.STRIDE
        # place i of the template is ln(rest wavelength) = ln(wave_min) + (i - n_classes) STRIDE pixels
        self.template = nn.Parameter(torch.randn(width, self.length + self.n_classes) * (width * self.length) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(self.n_classes))

    def forward(self, flux: torch.Tensor, ivar: torch.Tensor) -> torch.Tensor:
        scaled = normalise(flux, ivar)
        features = self.blocks(torch.stack([scaled.x, scaled.known], dim=1)).float()
        with torch.autocast(features.device.type, enabled=False):  # no half-precision Fourier transform
            size = self.length + self.n_classes
            spectrum = torch.fft.rfft(features, n=size)
            template = torch.fft.rfft(self.template.float(), n=size)
            # lag m = sum_p features[p] template[p + m]; a class c is the lag n_classes - c (0 for the bluest place)
            lags = torch.fft.irfft((spectrum.conj() * template).sum(dim=1), n=size)
            return lags[:, 1 : self.n_classes + 1].flip(1) + self.bias

    def redshift(self, logits: Array, reach: int = 2) -> Array:
        """(N,) redshifts: the mean over the best class and `reach` classes at each side, by probability."""
        best = np.argmax(logits, axis=1)
        near = np.clip(best[:, None] + np.arange(-reach, reach + 1), 0, self.n_classes - 1)
        local = np.take_along_axis(np.asarray(logits, np.float64), near, axis=1)
        weight = np.exp(local - local.max(axis=1, keepdims=True))
        return np.expm1(np.sum(weight * near, axis=1) / weight.sum(axis=1) * self.step)


class RedshiftClasses:
    """Cross entropy over the net's redshift classes, the label shared between the two nearest.

    spectra: rows -> flux and ivar, (n, L) float32 on `grid`; redshift: (N,). Training spectra are shifted by up to
    `max_shift` grid pixels (what is shifted in has no information) and given more noise of their own kind, up to
    sqrt(2) times what they have.
    """

    def __init__(
        self, spectra: SpectrumRows, redshift: Array, net: RedshiftNet, grid: SpectrumGrid, max_shift: int = 128
    ) -> None:
        self.spectra, self.net, self.max_shift = spectra, net, max_shift
        self.log1z = np.log1p(np.asarray(redshift, np.float64))
        self.step = float(np.log(grid.wave_max / grid.wave_min) / grid.n_pixels)

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, ...]:
        return self.spectra(rows)

    def loss(self, model: nn.Module, rows: Rows, rng: np.random.Generator, device: str) -> torch.Tensor:
        flux, ivar, log1z = self.augmented(rows, rng)
        logits = model(torch.from_numpy(flux).to(device), torch.from_numpy(ivar).to(device))
        return F.cross_entropy(logits.float(), self._labels(log1z).to(device))

    def augmented(self, rows: Rows, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        """Shifted, noisier copies and their ln(1 + z); no shift leads out of the net's range of redshifts."""
        flux, ivar = (np.array(tensor.numpy()) for tensor in self.inputs(rows))
        top = (self.net.n_classes - 1) * self.net.step
        log1z = self.log1z[rows].copy()
        for row in range(len(rows)):
            extra = rng.uniform()  # variance added, in units of what is there
            good = ivar[row] > 0
            noise = rng.standard_normal(int(good.sum())).astype(np.float32)
            flux[row, good] += noise * np.sqrt(extra / ivar[row, good])
            ivar[row, good] /= 1 + extra
            shift = int(rng.integers(-self.max_shift, self.max_shift + 1))
            if 0 <= log1z[row] + shift * self.step < top:
                log1z[row] += shift * self.step
                flux[row], ivar[row] = _shifted(flux[row], shift), _shifted(ivar[row], shift)
        return flux, ivar, log1z

    def _labels(self, log1z: Array) -> torch.Tensor:
        """(N, classes) triangles over the two nearest class centres: the label's mean is the redshift."""
        place = np.clip(log1z / self.net.step, 0, self.net.n_classes - 1)
        low = np.minimum(np.floor(place).astype(int), self.net.n_classes - 2)
        labels = np.zeros((len(log1z), self.net.n_classes), np.float32)
        labels[np.arange(len(low)), low] = 1 - (place - low)
        labels[np.arange(len(low)), low + 1] = place - low
        return torch.from_numpy(labels)

    def score(self, model: nn.Module, rows: Rows, device: str) -> float:
        """Mean log likelihood of the validation redshifts."""
        logits = torch.from_numpy(predict(model, self.inputs, rows, device))
        return -float(F.cross_entropy(logits, self._labels(self.log1z[rows])))

    def predict(self, model: RedshiftNet, rows: Rows, device: str) -> Array:
        """(len(rows),) redshifts."""
        return model.redshift(predict(model, self.inputs, rows, device))


def _shifted(values: Array, shift: int) -> Array:
    """`values` moved `shift` pixels to the red; zeros come in (an ivar of 0: nothing is known)."""
    out = np.zeros_like(values)
    if shift > 0:
        out[shift:] = values[:-shift]
    elif shift < 0:
        out[:shift] = values[-shift:]
    else:
        out[:] = values
    return out
