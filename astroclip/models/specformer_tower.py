"""SpecFormer, the spectrum tower of both AstroCLIP versions: overlapping slices, a transformer, a cross-attention head.

A spectrum is scaled by its own mean and deviation, which go into a first token, and cut into slices of 20 pixels every
10. Upstream drops the last slice, complete or not; `last_slice` keeps it.

Upstream knows neither ivar nor masks. Here pixels without information count in neither mean nor deviation and are 0
afterwards: what SpecFormer saw in its pretraining in place of what it had to guess. A complete spectrum is treated as
upstream treats it, bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from astroclip.models.blocks import Block
from astroclip.models.configuration import SpecFormerTowerConfig
from astroclip.models.heads import LearnedQueryHead

__all__ = ["SpecFormerTower", "masked_loss"]

MIN_DEVIATION = 0.2  # 1e-17 erg/s/cm2/A
N_CHUNKS, CHUNK_TOKENS = 6, 50  # masked pretraining: so many tokens are hidden in so many places


class SpecFormerTower(nn.Module):
    """(N, L) flux and ivar -> embeddings (N, D), not normalised.

    With a head, the embedding is the head's; without, the mean over all tokens, as in upstream's evaluation.
    """

    def __init__(self, config: SpecFormerTowerConfig) -> None:
        super().__init__()
        self.config = config
        width, dim = config.section + 2, config.embed_dim
        self.data_embed = nn.Linear(width, dim)
        self.position_embed = nn.Embedding(config.max_tokens, dim)
        self.blocks = nn.ModuleList(Block(dim, config.n_heads, config.mlp_ratio) for _ in range(config.n_layers))
        self.final_layernorm = nn.LayerNorm(dim)
        self.decoder = nn.Linear(dim, width)
        self.head = (
            LearnedQueryHead(dim, config.head_width, config.head_heads, config.head_hidden)
            if config.head_width
            else None
        )

    def tokens(self, flux: torch.Tensor, ivar: torch.Tensor) -> torch.Tensor:
        """(N, 1 + slices, 2 + section): the statistics token [(mean - 2)/2, (std - 2)/8, 0 ...], then [0, 0, slice]."""
        x, mean, std = _standardise(flux, ivar > 0)
        section, step = self.config.section, self.config.section - self.config.overlap
        starts = -(-(x.shape[1] - self.config.overlap) // step)
        if self.config.last_slice:
            x = F.pad(x, (0, max(0, (starts - 1) * step + section - x.shape[1])))
        else:
            starts -= 1
        slices = x.unfold(1, section, step)[:, :starts]
        statistics = torch.cat([(mean - 2) / 2, (std - 2) / 8], dim=1)
        return torch.cat([F.pad(statistics, (0, section))[:, None], F.pad(slices, (2, 0))], dim=1)

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, T, E) after the final norm."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.data_embed(tokens) + self.position_embed(places)
        for block in self.blocks:
            x = block(x)
        return self.final_layernorm(x)

    def reconstruct(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens as the network would have them, (N, T, 2 + section): masked modelling."""
        return self.decoder(self.encode(tokens))

    def features(self, flux: torch.Tensor, ivar: torch.Tensor) -> torch.Tensor:
        """(N, E) mean over all tokens, that of the statistics included: the unaligned representation."""
        return self.encode(self.tokens(flux, ivar)).mean(1)

    def forward(self, flux: torch.Tensor, ivar: torch.Tensor) -> torch.Tensor:
        tokens = self.encode(self.tokens(flux, ivar))
        return tokens.mean(1) if self.head is None else self.head(tokens)


def _standardise(flux: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, L) of mean 0 and deviation 1 over the known pixels, 0 elsewhere; their mean and deviation, (N, 1)."""
    n = known.sum(1, keepdim=True).clamp_min(2)
    level = flux.masked_fill(~known, 0).sum(1, keepdim=True) / n
    filled = torch.where(known, flux, level)  # the gaps add nothing to the deviation
    mean = filled.mean(1, keepdim=True)
    std = filled.std(1, keepdim=True) * ((flux.shape[1] - 1) / (n - 1)).sqrt()
    std = std.clamp_min(MIN_DEVIATION)
    return ((filled - mean) / std).masked_fill(~known, 0), mean, std


def mask_chunks(tokens: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """`tokens` with `CHUNK_TOKENS` in a row set to 0 at a random place of each of `N_CHUNKS` equal parts."""
    n, t, _ = tokens.shape
    offset = torch.randint(0, t // N_CHUNKS - CHUNK_TOKENS, (n, N_CHUNKS), generator=generator)
    first = offset + torch.arange(N_CHUNKS) * t // N_CHUNKS
    place = torch.arange(t)[None, None]
    hidden = ((place >= first[..., None]) & (place < first[..., None] + CHUNK_TOKENS)).any(1)
    return tokens.masked_fill(hidden[..., None].to(tokens.device), 0)


def masked_loss(output: torch.Tensor, tokens: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the numbers that masking changed."""
    changed = masked != tokens
    return (output - tokens)[changed].square().mean()
