"""The image tower of AstroDINO and AstroCLIP v2: colour mapping, a DINOv2 vision transformer, a cross-attention head.

The released AstroCLIP v2 hands the backbone patches without class token and without position embedding: its image
embedding does not know where a patch is. `positions` feeds the backbone as it was trained; heads have to be trained
again for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from astroclip.models.colours import COLOURS
from astroclip.models.configuration import VitTowerConfig
from astroclip.models.heads import LearnedQueryHead

__all__ = ["VisionTransformer", "VitTower"]

NORM_EPS = 1e-6  # DINOv2's


class _Attention(nn.Module):
    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class _Block(nn.Module):
    """Pre-norm block with a learned scale on each branch (LayerScale, Touvron+2021)."""

    def __init__(self, dim: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = _Attention(dim, n_heads)
        self.ls1 = _LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = _Mlp(dim, hidden)
        self.ls2 = _LayerScale(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _PatchEmbed(nn.Module):
    """(N, 3, S, S) -> (N, (S/patch)^2, E), row by row."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.proj(pictures).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2's vision transformer (Oquab+2023) without registers; key names as its checkpoints', blocks not chunked."""

    def __init__(self, config: VitTowerConfig) -> None:
        super().__init__()
        dim, side = config.embed_dim, config.image_size // config.patch
        self.patch_embed = _PatchEmbed(config.patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, side**2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(_Block(dim, config.n_heads, config.mlp_hidden) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def patches(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, T, E) of patches alone, which do not know their places."""
        return self._encode(self.patch_embed(pictures))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 1 + T, E): the class token and the patches, each with its position."""
        tokens = self.patch_embed(pictures)
        return self._encode(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed)

    def _encode(self, tokens: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class VitTower(nn.Module):
    """(N, 3, S, S) nanomaggies in g, r, z -> embeddings (N, D), not normalised.

    With a head, the embedding is the head's; without, it is the class token.
    """

    def __init__(self, config: VitTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = VisionTransformer(config)
        self.head = (
            LearnedQueryHead(
                config.embed_dim, config.head_width, config.head_heads, config.head_hidden, residual=config.residual
            )
            if config.head_width
            else None
        )

    def mapping(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the backbone sees of (N, 3, S, S) nanomaggies."""
        return COLOURS[self.config.colours](pixels)

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, T, E) patch tokens, what the head attends to."""
        pictures = self.mapping(pixels)
        return self.backbone(pictures)[:, 1:] if self.config.positions else self.backbone.patches(pictures)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, E) the class token: the unaligned representation."""
        return self.backbone(self.mapping(pixels))[:, 0]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.features(pixels) if self.head is None else self.head(self.tokens(pixels))
