"""The spectrum tower: normalisation, convolutional tokens, a pre-norm transformer, a cross-attention head.

* Two channels a pixel: the scaled flux, and how well it is known. A pixel without information is 0 in both.
* Tokens whose pixels are all missing are masked in every attention, so an SDSS spectrum that ends at 9200 A is a
  DESI spectrum with fewer tokens, not one that falls to zero.
* Amplitude and level go into a token of their own (as SpecFormer's mean and std): the shape alone does not hold
  the luminosity.
* Convolutions make the tokens because on a log-wavelength grid a redshift is a translation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from astroclip.models.configuration import SpectrumTowerConfig

__all__ = ["Normalised", "SpectrumTower", "normalise"]

N_STATISTICS = 4
MIN_SCALE = 1e-3  # 1e-17 erg/s/cm2/A; fainter than any sky-subtracted spectrum's noise


class Normalised:
    """`x` (N, L) scaled flux, `known` (N, L) information a pixel, `statistics` (N, 4), `valid` (N, L) bool."""

    def __init__(self, flux: torch.Tensor, ivar: torch.Tensor) -> None:
        valid = ivar > 0
        hidden = flux.masked_fill(~valid, float("nan"))
        level = hidden.nanmedian(dim=1, keepdim=True).values.nan_to_num(0.0)
        spread = (hidden - level).abs().nanmedian(dim=1, keepdim=True).values.nan_to_num(0.0)
        scale = (1.4826 * spread).clamp_min(MIN_SCALE)
        information = scale * ivar.clamp_min(0).sqrt()
        self.valid = valid
        self.x = torch.asinh((flux - level) / scale).masked_fill(~valid, 0.0)
        self.known = (torch.log1p(information) / 3).masked_fill(~valid, 0.0)
        snr = (level.abs() * ivar.clamp_min(0).sqrt()).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
        self.statistics = torch.cat(
            [torch.asinh(level), torch.log10(scale), torch.asinh(level / scale) / 2, torch.log1p(snr) / 3],
            dim=1,
        )


def normalise(flux: torch.Tensor, ivar: torch.Tensor) -> Normalised:
    """Scale each spectrum by its own median and 1.4826 MAD over good pixels, then asinh.

    flux, ivar: (N, L) float32, 1e-17 erg/s/cm2/A and its inverse square, ivar 0 where missing.
    """
    return Normalised(flux, ivar)


class SelfAttention(nn.Module):
    """Multi-head attention from one fused q|k|v projection (key names as SpecFormer's)."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = self.attention(x).view(n, t, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.projection(out.transpose(1, 2).reshape(n, t, d))


class Feedforward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(dim, hidden)
        self.decoder = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(F.gelu(self.encoder(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, n_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.layernorm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, n_heads)
        self.layernorm2 = nn.LayerNorm(dim)
        self.mlp = Feedforward(dim, mlp_ratio * dim)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attention(self.layernorm1(x), allowed)
        return x + self.mlp(self.layernorm2(x))


class CrossAttentionHead(nn.Module):
    """One learned query attends to all tokens; LayerNorm; residual MLP (Parker+2024, section 4)."""

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

    def forward(self, tokens: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        attended, _ = self.attention(query, tokens, tokens, key_padding_mask=missing, need_weights=False)
        h = self.layernorm(attended)[:, 0]
        return self.projection(h + self.mlp(h))


class SpectrumTower(nn.Module):
    """(N, L) flux and ivar -> tokens (N, 1 + L/patch, E) and, through the head, embeddings (N, D)."""

    def __init__(self, config: SpectrumTowerConfig, projection_dim: int) -> None:
        super().__init__()
        if config.n_pixels % config.patch:
            raise ValueError(f"n_pixels {config.n_pixels} is not a multiple of patch {config.patch}")
        self.patch = config.patch
        self.n_tokens = config.n_pixels // config.patch
        self.stem = _stem(config)
        self.statistics_embed = nn.Linear(N_STATISTICS, config.embed_dim)
        self.position_embed = nn.Parameter(torch.randn(1, 1 + self.n_tokens, config.embed_dim) * 0.02)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.n_heads, config.mlp_ratio) for _ in range(config.n_layers)
        )
        self.final_layernorm = nn.LayerNorm(config.embed_dim)
        self.head = CrossAttentionHead(config, projection_dim)

    def tokens(
        self, spectrum: Normalised, hidden_tokens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contextual tokens and which of them are missing.

        hidden_tokens: (N, L/patch) bool, tokens whose pixels the encoder must not see (masked modelling); they
        keep their place and are predicted from the others, unlike missing ones, which nobody attends to.
        """
        x, known = spectrum.x, spectrum.known
        if hidden_tokens is not None:
            seen = ~hidden_tokens.repeat_interleave(self.patch, dim=1)
            x, known = x * seen, known * seen
        tokens = self.stem(torch.stack([x, known], dim=1)).transpose(1, 2)
        tokens = torch.cat([self.statistics_embed(spectrum.statistics)[:, None], tokens], dim=1)
        tokens = tokens + self.position_embed
        empty = ~spectrum.valid.view(len(x), self.n_tokens, self.patch).any(dim=2)
        missing = F.pad(empty, (1, 0), value=False)
        allowed = ~missing[:, None, None, :]
        for block in self.blocks:
            tokens = block(tokens, allowed)
        return self.final_layernorm(tokens), missing

    def features(self, flux: torch.Tensor, ivar: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens that are there, (N, E): the unaligned representation, as upstream's evaluation."""
        tokens, missing = self.tokens(normalise(flux, ivar))
        present = (~missing)[..., None].to(tokens.dtype)
        return (tokens * present).sum(1) / present.sum(1)

    def forward(self, flux: torch.Tensor, ivar: torch.Tensor) -> torch.Tensor:
        return self.head(*self.tokens(normalise(flux, ivar)))


def _stem(config: SpectrumTowerConfig) -> nn.Sequential:
    """Strided convolutions from 2 channels of pixels to one token a patch: kernels overlap, so no line is cut."""
    n_convs = len(config.stem) + 1
    stride = round(config.patch ** (1 / n_convs))
    if stride**n_convs != config.patch:
        raise ValueError(f"patch {config.patch} is not {n_convs} equal strides; give another `stem`")
    widths = (2, *config.stem, config.embed_dim)
    layers: list[nn.Module] = []
    for index in range(n_convs):
        layers.append(nn.Conv1d(widths[index], widths[index + 1], 2 * stride + 1, stride, padding=stride))
        if index < n_convs - 1:
            layers += [nn.GroupNorm(1, widths[index + 1]), nn.GELU()]
    return nn.Sequential(*layers)
