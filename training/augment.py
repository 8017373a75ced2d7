"""Augmentations that an astronomer would call a second observation of the same galaxy.

Images: orientation, pointing, seeing, depth, and extinction error. Spectra: exposure (a new noise draw where the
noiseless flux is known), throughput, flux calibration, smoothing, and wavelength range. All work on batches of tensors
in physical units, before the model's own normalisation, on whatever device the batch is.

And one that makes another galaxy: `move_in_redshift`. On a log-wavelength grid the same galaxy at another redshift is
the same row of pixels further along, so a negative that differs in nothing but its redshift costs a shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["ImageAugmentation", "SpectrumAugmentation", "crop_dihedral", "draw_shifts", "move_in_redshift"]

# A_band / E(B-V) for DECam g, r, z (Schlafly & Finkbeiner 2011, as used by the Legacy Surveys DR9).
EXTINCTION_GRZ = (3.214, 2.165, 1.211)
SKY_SIGMA_GRZ = (0.004, 0.011, 0.023)  # nanomaggies per pixel, three DECaLS passes (Dey+2019)


def crop_dihedral(images: torch.Tensor, size: int, jitter: int, generator: torch.Generator | None) -> torch.Tensor:
    """(N, B, H, W) -> (N, B, size, size): whole-pixel pointing offsets up to `jitter` and one of the 8 orientations.

    No interpolation, so the noise stays that of the detector. One offset and orientation for a sixteenth of the batch
    each: slicing whole groups is many times faster than gathering single rows, and batches are shuffled.
    """
    groups = images.tensor_split(min(16, len(images)))
    margin = (images.shape[-1] - size) // 2
    out = []
    for group in groups:
        dx, dy = torch.randint(-jitter, jitter + 1, (2,), generator=generator).clamp(-margin, margin).tolist()
        turns, flip = int(torch.randint(0, 4, (1,), generator=generator)), torch.rand(1, generator=generator)
        crop = group[:, :, margin + dy : margin + dy + size, margin + dx : margin + dx + size]
        crop = torch.rot90(crop, turns, (2, 3))
        out.append((crop.flip(3) if flip < 0.5 else crop).float())
    return torch.cat(out)


@dataclass(frozen=True)
class ImageAugmentation:
    """Settings of an image view; probabilities and ranges follow Stein+2021 (ssl-legacysurvey), in physical units.

    jitter_pixels: pointing; rotate: probability of a turn by any angle (bilinear) instead of the 8 exact ones;
    zoom: size scale of a rotated view; max_blur_pixels: extra Gaussian PSF sigma; max_noise: extra sky noise in units
    of the three-pass depth; extinction_sigma: error of E(B-V), mag; brightness_sigma: grey zero point, fraction.
    """

    size: int = 96
    jitter_pixels: int = 7
    rotate: float = 0.5
    zoom: float = 0.1
    max_blur_pixels: float = 1.0
    max_noise: float = 1.5
    extinction_sigma: float = 0.02
    brightness_sigma: float = 0.0

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """(N, 3, H, W) nanomaggies, any float type -> (N, 3, size, size) float32."""
        if self.rotate and torch.rand(1, generator=generator).item() < self.rotate:
            views = self._rotated(images.float(), generator)
        else:
            views = crop_dihedral(images, self.size, self.jitter_pixels, generator)
        n, device = len(views), views.device
        if self.max_blur_pixels:
            views = self._blurred(views, generator)
        extinction = self.extinction_sigma * torch.randn(n, 1, 1, 1, generator=generator).to(device)
        colour = torch.tensor(EXTINCTION_GRZ, device=device).view(1, 3, 1, 1)
        grey = self.brightness_sigma * torch.randn(n, 1, 1, 1, generator=generator).to(device)
        views = views * torch.pow(10.0, -0.4 * extinction * colour) * (1 + grey)
        if self.max_noise:
            level = self.max_noise * torch.rand(n, 1, 1, 1, generator=generator).square().to(device)
            sky = torch.tensor(SKY_SIGMA_GRZ, device=device).view(1, 3, 1, 1)
            views = views + level * sky * torch.randn(views.shape, generator=generator).to(device)
        return views

    def _rotated(self, images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        n, side = len(images), images.shape[-1]
        angle = 2 * math.pi * torch.rand(n, generator=generator)
        scale = 1 + self.zoom * (2 * torch.rand(n, generator=generator) - 1)
        mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
        ratio = scale * self.size / side
        shift = 2 * self.jitter_pixels / side * (2 * torch.rand(n, 2, generator=generator) - 1)
        cos, sin = ratio * torch.cos(angle), ratio * torch.sin(angle)
        theta = torch.stack(
            [torch.stack([cos * mirror, -sin, shift[:, 0]], 1), torch.stack([sin * mirror, cos, shift[:, 1]], 1)], 1
        )
        grid = F.affine_grid(theta.to(images.device), [n, 3, self.size, self.size], align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _blurred(self, views: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """One Gaussian for each eighth of the batch, on half of them."""
        out = []
        for group in views.tensor_split(min(8, len(views))):
            sigma = self.max_blur_pixels * torch.rand(1, generator=generator).item()
            if torch.rand(1, generator=generator).item() < 0.5 or sigma < 0.2:
                out.append(group)
                continue
            offsets = torch.arange(-3, 4, device=views.device, dtype=views.dtype)
            kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
            kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
            rows = F.conv2d(group, kernel, padding=(0, 3), groups=3)
            out.append(F.conv2d(rows, kernel.transpose(2, 3), padding=(3, 0), groups=3))
        return torch.cat(out)


@dataclass(frozen=True)
class SpectrumAugmentation:
    """Settings of a spectrum view.

    max_noise: the exposure's noise is multiplied by up to this (log-uniform from 1); throughput_sigma: grey scatter of
    the fibre's throughput (natural log); tilt: scatter of a quadratic calibration error, fraction at the ends;
    smooth: probability of a spectrum smoothed for display, as archives hand them out, by a Gaussian of up to
    max_smooth pixels (its ivar, which says how much is known, stays); ragged: up to so many pixels missing at each
    end, always; cut: probability of another spectrograph's range (SDSS 3800-9206 A, or a random end);
    gap: probability of a hole.
    """

    max_noise: float = 2.5
    throughput_sigma: float = 0.1
    tilt: float = 0.04
    smooth: float = 0.2
    max_smooth: float = 3.0
    ragged: int = 64
    cut: float = 0.3
    gap: float = 0.3

    def __call__(
        self,
        flux: torch.Tensor,
        sigma: torch.Tensor,
        flux_true: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, L) each, sigma 0 where there is no data -> flux and ivar of the view, float32.

        With `flux_true` the noise is drawn anew; without it, noise is added to the observed flux in quadrature.
        """
        n, length = flux.shape
        device = flux.device
        flux, sigma = flux.float(), sigma.float()

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator).to(device)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        boost = torch.exp(math.log(self.max_noise) * uniform(n, 1))
        noise = normal(n, length)
        if flux_true is not None:
            view = flux_true.float() + boost * sigma * noise
        else:
            view = flux + (boost**2 - 1).clamp_min(0).sqrt() * sigma * noise
        error = boost * sigma
        if self.smooth:
            view = self._smoothed(view, sigma > 0, generator)
        x = torch.linspace(-1, 1, length, device=device)
        calibration = 1 + self.tilt * (normal(n, 1) * x + normal(n, 1) * (1.5 * x**2 - 0.5))
        gain = calibration.clamp(0.5, 1.5) * torch.exp(self.throughput_sigma * normal(n, 1))
        keep = (sigma > 0) & self._range(n, length, uniform)
        ivar = torch.where(keep, (gain * error).clamp_min(1e-6).reciprocal().square(), torch.zeros_like(view))
        return (view * gain).masked_fill(~keep, 0.0), ivar

    def _smoothed(self, view: torch.Tensor, good: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """One Gaussian for each eighth of the batch, with probability `smooth`; masked pixels count for nothing."""
        out = []
        for group, mask in zip(view.tensor_split(8), good.tensor_split(8), strict=True):
            chosen, width = torch.rand(2, generator=generator).tolist()
            if not len(group) or chosen >= self.smooth:
                out.append(group)
                continue
            sigma = 0.5 + (self.max_smooth - 0.5) * width
            reach = math.ceil(3 * sigma)
            offsets = torch.arange(-reach, reach + 1, device=view.device, dtype=view.dtype)
            kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)[None, None]
            weight = mask.to(view.dtype)
            total = F.conv1d(torch.stack([group * weight, weight]).flatten(0, 1)[:, None], kernel, padding=reach)
            flux, norm = total[:, 0].view(2, *group.shape)
            out.append(torch.where(mask, flux / norm.clamp_min(1e-6), group))
        return torch.cat(out)

    def _range(self, n: int, length: int, uniform) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """(n, length) bool: the part of the grid this view has."""
        index = torch.arange(length, device=uniform(1).device)[None] / length
        ends = self.ragged / length * uniform(n, 2)
        chosen = uniform(n, 1) < self.cut
        sdss = uniform(n, 1) < 0.5
        # ln(3800/3600)/ln(9824/3600) = 0.054 and ln(9206/3600)/ln(9824/3600) = 0.935
        low = torch.where(sdss, torch.full_like(sdss, 0.054, dtype=torch.float), 0.2 * uniform(n, 1))
        high = torch.where(sdss, torch.full_like(sdss, 0.935, dtype=torch.float), 1 - 0.2 * uniform(n, 1))
        inside = ~chosen | ((index >= low) & (index < high))
        start, width = uniform(n, 1), 0.05 * uniform(n, 1)
        hole = (uniform(n, 1) < self.gap) & (index >= start) & (index < start + width)
        return inside & ~hole & (index >= ends[:, :1]) & (index < 1 - ends[:, 1:])


def draw_shifts(n: int, least: int, most: int, generator: torch.Generator | None) -> torch.Tensor:
    """(n,) int64 pixels, either sign, log-uniform in size from `least` to `most`."""
    size = least * torch.exp(math.log(most / least) * torch.rand(n, generator=generator))
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1, 1)
    return size.round().long() * sign


def move_in_redshift(
    flux: torch.Tensor, sigma: torch.Tensor, flux_true: torch.Tensor | None, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same galaxies `shift` pixels (n,) further to the red, observed with the same instrument.

    (n, L) each, as `SpectrumAugmentation` takes them. Where the noiseless flux is known it moves and the noise stays
    where the sky and the detector put it; without it, flux and noise move together. What is moved in is missing.
    """
    length = flux.shape[1]
    source = torch.arange(length, device=flux.device)[None] - shift.to(flux.device)[:, None]
    outside = (source < 0) | (source >= length)
    source = source.clamp(0, length - 1)
    if flux_true is None:
        return flux.gather(1, source), sigma.gather(1, source).masked_fill(outside, 0), None
    return flux, sigma.masked_fill(outside, 0), flux_true.gather(1, source)
