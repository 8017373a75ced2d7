"""The spectrum tower: normalisation, a convolutional trunk, template matching, a transformer, a cross-attention head.

* Two channels a pixel: the scaled flux, and how well it is known. A pixel without information is 0 in both.
* Tokens whose pixels are all missing are masked in every attention, so an SDSS spectrum that ends at 9200 A is a
  DESI spectrum with fewer tokens, not one that falls to zero.
* Amplitude and level go into a token of their own (as SpecFormer's mean and std): the shape alone does not hold
  the luminosity.
* On a log-wavelength grid a redshift is a translation. So the trunk is convolutional, and its features are correlated
  with one learned rest-frame template at every redshift: what the template learns at one serves all others, and the
  position of a line is known to a pixel, which tokens of 64 pixels and learned position vectors never are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from astroclip.models.blocks import Block, Feedforward, asinh
from astroclip.models.configuration import SpectrumTowerConfig

__all__ = ["Normalised", "SpectrumTower", "TemplateMatch", "broadband", "normalise"]

N_STATISTICS = 4
# What the template starts from: vacuum wavelengths (Angstrom) of the strong optical lines of galaxies (NIST; as in the
# SDSS and DESI line lists) and whether they stand above (+) or below (-) the continuum, by rough strength. It says
# where zero redshift is; what counts for how much is learned.
LINES = (
    (3728.5, 1.0),  # [O II]
    (3869.9, 0.2),  # [Ne III]
    (3934.8, -0.7),  # Ca K
    (3969.6, -0.6),  # Ca H
    (4305.6, -0.4),  # G band
    (4341.7, 0.2),  # H gamma
    (4862.7, 0.5),  # H beta
    (4960.3, 0.4),  # [O III]
    (5008.2, 1.0),  # [O III]
    (5176.6, -0.5),  # Mg b
    (5895.6, -0.4),  # Na D
    (6564.6, 1.0),  # H alpha
    (6585.3, 0.4),  # [N II]
    (6718.3, 0.3),  # [S II]
    (6732.7, 0.3),  # [S II]
)
CONTINUUM_PIXELS = 100  # the running mean that lines stand out from: 7000 km/s
BAND_SOFTENING = 0.05  # 1e-17 erg/s/cm2/A: about the noise of a band's mean in the faintest targets' exposures
MIN_BAND = 0.2  # of a band's pixels: with fewer, its mean is another band's
MIN_SCALE = 1e-3  # 1e-17 erg/s/cm2/A; fainter than any sky-subtracted spectrum's noise


@dataclass(frozen=True)
class Normalised:
    """`x` (N, L) scaled flux, `known` (N, L) information a pixel, `statistics` (N, 4), `valid` (N, L) bool."""

    x: torch.Tensor
    known: torch.Tensor
    statistics: torch.Tensor
    valid: torch.Tensor

    def hiding(self, hidden: torch.Tensor) -> Normalised:
        """The same with nothing known of the pixels `hidden` (N, L); they stay valid, since they are there."""
        return replace(self, x=self.x * ~hidden, known=self.known * ~hidden)


def normalise(flux: torch.Tensor, ivar: torch.Tensor) -> Normalised:
    """Scale each spectrum by its own median and 1.4826 MAD over good pixels, then asinh.

    flux, ivar: (N, L) float32, 1e-17 erg/s/cm2/A and its inverse square, ivar 0 where missing.
    """
    valid = ivar > 0
    shown = flux.masked_fill(~valid, float("nan"))
    level = shown.nanmedian(dim=1, keepdim=True).values.nan_to_num(0.0)
    spread = (shown - level).abs().nanmedian(dim=1, keepdim=True).values.nan_to_num(0.0)
    scale = (1.4826 * spread).clamp_min(MIN_SCALE)
    root = ivar.clamp_min(0).sqrt()
    snr = (level.abs() * root).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
    return Normalised(
        x=asinh((flux - level) / scale).masked_fill(~valid, 0.0),
        known=(torch.log1p(scale * root) / 3).masked_fill(~valid, 0.0),
        statistics=torch.cat(
            [torch.asinh(level), torch.log10(scale), torch.asinh(level / scale) / 2, torch.log1p(snr) / 3], dim=1
        ),
        valid=valid,
    )


def broadband(flux: torch.Tensor, ivar: torch.Tensor, n_bands: int) -> torch.Tensor:
    """(N, L) flux and ivar -> (N, 1 + 2 n_bands) photometry of the spectrum, float32.

    The asinh magnitude (Lupton, Gunn & Szalay 1999) of the mean flux over all known pixels; each band's less that one,
    a colour, 0 where less than `MIN_BAND` of the band is known; and the known share of each band. Means, not
    ivar-weighted ones: a night's noise must not move the band. Differences in float32, since half precision
    would round the magnitudes to some per cent.
    """
    known = (ivar > 0).float()
    shares = known.view(len(flux), n_bands, -1).mean(dim=2)
    sums = (flux.float() * known).view(len(flux), n_bands, -1).mean(dim=2)
    level = torch.asinh(sums.sum(1, keepdim=True) / shares.sum(1, keepdim=True).clamp_min(1e-6) / BAND_SOFTENING)
    colours = torch.asinh(sums / shares.clamp_min(1e-6) / BAND_SOFTENING) - level
    return torch.cat([level / 3, colours.masked_fill(shares < MIN_BAND, 0.0), shares], dim=1)


class CrossAttentionHead(nn.Module):
    """One learned query attends to all tokens; LayerNorm; residual MLP (Parker+2024, section 4).

    The redshift's characteristic function is added as it is: its fine phases would not survive the attention. So is
    the spectrum's photometry, through a small network of its own: it is what a spectrum shares with a picture, and
    the tokens, each scaled by the spectrum's own spread and noise, hold it less well than the sum of their pixels does.
    """

    def __init__(self, config: SpectrumTowerConfig, projection_dim: int) -> None:
        super().__init__()
        width = config.head_width
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(
            width, config.head_heads, kdim=config.embed_dim, vdim=config.embed_dim, batch_first=True
        )
        self.layernorm = nn.LayerNorm(width)
        self.mlp = Feedforward(width, 2 * width)
        self.projection = nn.Identity() if width == projection_dim else nn.Linear(width, projection_dim)
        self.redshift = nn.Linear(2 * config.n_harmonics, projection_dim, bias=False)
        self.bands = _band_layers(config, projection_dim) if config.n_bands else None

    def forward(
        self,
        tokens: torch.Tensor,
        missing: torch.Tensor,
        characteristic: torch.Tensor,
        photometry: torch.Tensor | None,
    ) -> torch.Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        attended, _ = self.attention(query, tokens, tokens, key_padding_mask=missing, need_weights=False)
        h = self.layernorm(attended)[:, 0]
        out = self.projection(h + self.mlp(h)) + self.redshift(characteristic)
        if self.bands is not None and photometry is not None:
            out = out + self.bands(torch.cat([photometry, h], dim=1))
        return out


def _band_layers(config: SpectrumTowerConfig, projection_dim: int) -> nn.Sequential:
    """Photometry and the attended features to the embedding; silent at first."""
    last = nn.Linear(config.head_width, projection_dim, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Linear(1 + 2 * config.n_bands + config.head_width, config.head_width), nn.GELU(), last)


class TemplateMatch(nn.Module):
    """Where a learned rest-frame template fits a spectrum's features, as a distribution over ln(1 + z).

    A class c of the distribution is `c` feature places of the log-wavelength grid: ln(1 + z) = c step. The template has
    a weight for every channel and rest wavelength that any observed place can have; place i of the spectrum meets
    place i + n_shifts - c of the template.
    """

    def __init__(
        self,
        *,
        in_width: int,
        width: int,
        length: int,
        wave_min: float,
        step: float,
        redshift_max: float,
        n_harmonics: int,
    ) -> None:
        super().__init__()
        self.reduce = nn.Conv1d(in_width, width, 1)
        self.step = step
        self.n_shifts = math.ceil(math.log1p(redshift_max) / step)
        self.length = length
        self.size = 1 << (length + self.n_shifts - 1).bit_length()  # of the Fourier transforms, a power of two
        self.n_harmonics = n_harmonics
        template = torch.zeros(width + 1, length + self.n_shifts)  # at first the lines alone decide
        template[0] = line_template(length + self.n_shifts, wave_min * math.exp(-self.n_shifts * step), step)
        self.template = nn.Parameter(template)
        self.bias = nn.Parameter(torch.zeros(self.n_shifts))

    def forward(self, features: torch.Tensor, lines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probabilities (N, n_shifts), and what is matched moved to the rest frame by them.

        features: (N, in_width, length) of the trunk; lines: (N, length), `line_signal` of the spectrum.
        The second is the expectation over the distribution, (N, width + 1, length + n_shifts).
        """
        with torch.autocast(features.device.type, enabled=False):  # no half-precision Fourier transform
            matched = torch.cat([lines.float()[:, None], self.reduce(features.float())], dim=1)
            spectrum = torch.fft.rfft(matched, n=self.size)
            template = torch.fft.rfft(self.template.float(), n=self.size)
            lags = torch.fft.irfft((spectrum.conj() * template).sum(dim=1), n=self.size)
            log_probability = F.log_softmax(lags[:, 1 : self.n_shifts + 1].flip(1) + self.bias, dim=1)
            shift = F.pad(log_probability.exp().flip(1), (1, 0))
            moved = torch.fft.irfft(spectrum * torch.fft.rfft(shift, n=self.size)[:, None], n=self.size)
            return log_probability, moved[:, :, : self.length + self.n_shifts]

    def characteristic(self, log_probability: torch.Tensor) -> torch.Tensor:
        """E[exp(i w ln(1 + z))] at `n_harmonics` frequencies, cosines then sines: (N, 2 n_harmonics).

        Close redshifts have close values at low frequencies and are told apart at high ones; an uncertain redshift
        has no amplitude at frequencies that it does not resolve. From half a cycle over ln(1 + z) = 1 to the
        Nyquist frequency of the classes.
        """
        place = torch.arange(self.n_shifts, device=log_probability.device) * self.step
        cycles = torch.logspace(math.log10(0.5), math.log10(0.5 / self.step), self.n_harmonics, device=place.device)
        phase = 2 * math.pi * place[:, None] * cycles
        return log_probability.exp() @ torch.cat([phase.cos(), phase.sin()], dim=1)


def line_template(size: int, wave_min: float, step: float) -> torch.Tensor:
    """(size,) the strengths of `LINES` at their places of a grid of `step` in ln(wavelength) whose first bin starts at
    `wave_min`, shared between the two nearest bins."""
    template = torch.zeros(size)
    for wavelength, strength in LINES:
        place = math.log(wavelength / wave_min) / step - 0.5
        low = math.floor(place)
        if 0 <= low < size - 1:
            template[low] += strength * (low + 1 - place)
            template[low + 1] += strength * (place - low)
    return template


def line_signal(spectrum: Normalised, stride: int) -> torch.Tensor:
    """How far a spectrum stands above its own running mean, in units of the noise, through asinh: (N, L / stride).

    A place is `stride` pixels; the running mean is over the known pixels of `CONTINUUM_PIXELS`.
    """
    information = torch.expm1(3 * spectrum.known)
    known = (information > 0).to(information.dtype)
    precision = information.square()
    stacked = torch.stack([spectrum.x * known, known, spectrum.x * precision, precision], dim=1)
    shown, share, weighted, weight = F.avg_pool1d(stacked, stride).unbind(dim=1)
    places = CONTINUUM_PIXELS // stride // 2 * 2 + 1
    around = F.avg_pool1d(torch.stack([shown, share], dim=1), places, stride=1, padding=places // 2)
    continuum = around[:, 0] / around[:, 1].clamp_min(1e-3)
    return asinh(stride**0.5 * (weighted - continuum * weight) / weight.sqrt().clamp_min(1e-6))


class SpectrumTower(nn.Module):
    """(N, L) flux and ivar -> tokens (N, 3 + L/patch, E) and, through the head, embeddings (N, D).

    Tokens: the level and amplitude; the redshift distribution; the spectrum in its rest frame; then one a patch of
    the observed frame.
    """

    N_GLOBAL = 3
    HEAD = ("head.",)  # as in `ImageTower`

    def __init__(self, config: SpectrumTowerConfig, projection_dim: int) -> None:
        super().__init__()
        if config.n_pixels % config.patch or config.patch % config.trunk_stride:
            raise ValueError(
                f"n_pixels {config.n_pixels} must be a multiple of patch {config.patch}, "
                f"and that of trunk_stride {config.trunk_stride}"
            )
        if config.n_bands and config.n_pixels % config.n_bands:
            raise ValueError(f"n_pixels {config.n_pixels} must be a multiple of n_bands {config.n_bands}")
        self.n_bands = config.n_bands
        self.patch = config.patch
        self.stride = config.trunk_stride
        self.n_tokens = config.n_pixels // config.patch
        self.trunk = _trunk(config)
        length = config.n_pixels // config.trunk_stride
        self.match = TemplateMatch(
            in_width=config.trunk_width,
            width=config.match_width,
            length=length,
            wave_min=config.wave_min,
            step=math.log(config.wave_max / config.wave_min) / length,
            redshift_max=config.redshift_max,
            n_harmonics=config.n_harmonics,
        )
        places = config.patch // config.trunk_stride
        self.token_embed = nn.Conv1d(config.trunk_width, config.embed_dim, places, places)
        rest_places = max(1, places // 2)
        self.statistics_embed = nn.Linear(N_STATISTICS, config.embed_dim)
        self.redshift_embed = nn.Linear(2 * config.n_harmonics, config.embed_dim)
        self.rest_pool = nn.Conv1d(config.match_width + 1, config.trunk_width, rest_places, rest_places)
        n_rest = (length + self.match.n_shifts) // rest_places
        self.rest_embed = nn.Linear(config.trunk_width * n_rest, config.embed_dim)
        self.position_embed = nn.Parameter(torch.randn(1, self.N_GLOBAL + self.n_tokens, config.embed_dim) * 0.02)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.n_heads, config.mlp_ratio) for _ in range(config.n_layers)
        )
        self.final_layernorm = nn.LayerNorm(config.embed_dim)
        self.head = CrossAttentionHead(config, projection_dim)

    def encode(
        self, spectrum: Normalised, hidden_tokens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Contextual tokens (N, N_GLOBAL + T, E), which are missing (N, N_GLOBAL + T), and the log probabilities of the
        redshift (N, n_shifts).

        hidden_tokens: (N, L/patch) bool, tokens whose pixels the encoder must not see (masked modelling); they
        keep their place and are predicted from the others, unlike missing ones, which nobody attends to.
        """
        if hidden_tokens is not None:
            spectrum = spectrum.hiding(hidden_tokens.repeat_interleave(self.patch, dim=1))
        features = self.trunk(torch.stack([spectrum.x, spectrum.known], dim=1))
        redshift, rest = self.match(features, line_signal(spectrum, self.stride))
        rest = self.rest_pool(rest)
        tokens = torch.cat(
            [
                self.statistics_embed(spectrum.statistics)[:, None],
                self.redshift_embed(self.match.characteristic(redshift))[:, None],
                self.rest_embed(F.gelu(rest).flatten(1))[:, None],
                self.token_embed(features).transpose(1, 2),
            ],
            dim=1,
        )
        tokens = tokens + self.position_embed
        empty = ~spectrum.valid.view(len(features), self.n_tokens, self.patch).any(dim=2)
        missing = F.pad(empty, (self.N_GLOBAL, 0), value=False)
        allowed = ~missing[:, None, None, :]
        for block in self.blocks:
            tokens = block(tokens, allowed)
        return self.final_layernorm(tokens), missing, redshift

    def features(self, flux: torch.Tensor, ivar: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens that are there, (N, E): the unaligned representation, as upstream's evaluation."""
        tokens, missing, _ = self.encode(normalise(flux, ivar))
        present = (~missing)[..., None].to(tokens.dtype)
        return (tokens * present).sum(1) / present.sum(1)

    def read(
        self, flux: torch.Tensor, ivar: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the head takes: tokens (N, T, E), which are missing (N, T), the redshift's characteristic function
        (N, 2 n_harmonics), and the photometry (N, 1 + 2 n_bands) where the model has bands."""
        tokens, missing, redshift = self.encode(normalise(flux, ivar))
        photometry = broadband(flux, ivar, self.n_bands) if self.n_bands else None
        return tokens, missing, self.match.characteristic(redshift), photometry

    def forward(self, flux: torch.Tensor, ivar: torch.Tensor) -> torch.Tensor:
        return self.head(*self.read(flux, ivar))


def _trunk(config: SpectrumTowerConfig) -> nn.Sequential:
    """Convolutions from 2 channels of pixels to `trunk_width` features every `trunk_stride` pixels."""
    layers: list[nn.Module] = []
    for block in range(config.trunk_blocks):
        first = block == 0
        channels, stride = (2, config.trunk_stride) if first else (config.trunk_width, 1)
        kernel = 4 * config.trunk_stride + 1 if first else 9
        layers += [
            nn.Conv1d(channels, config.trunk_width, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm1d(config.trunk_width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
