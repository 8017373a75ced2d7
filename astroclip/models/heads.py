"""AstroCLIP's projection head: one learned query attends to a tower's tokens, then a small MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from astroclip.models.blocks import Feedforward

__all__ = ["LearnedQueryHead"]


class LearnedQueryHead(nn.Module):
    """Tokens (N, T, E) -> (N, D), not normalised (Parker+2024, section 4).

    h = LayerNorm(attention(query, tokens)); the embedding is h + MLP(h), or MLP(h) alone without `residual`, as the
    released image head has it. PyTorch's attention keeps one fused projection where E = D and three where not, which
    are the two layouts of the published files.
    """

    def __init__(
        self, token_dim: int, width: int, n_heads: int, hidden: int, *, residual: bool = True, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, n_heads, kdim=token_dim, vdim=token_dim, batch_first=True)
        self.layernorm = nn.LayerNorm(width)
        self.mlp = Feedforward(width, hidden)
        self.residual = residual
        self.dropout = dropout

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        attended, _ = self.attention(query, tokens, tokens, need_weights=False)
        h = self.layernorm(F.dropout(attended[:, 0], self.dropout, self.training))
        out = F.dropout(self.mlp(h), self.dropout, self.training)
        return h + out if self.residual else out

    def attention_weights(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, n_heads, T): how much the query takes of each token."""
        query = self.query.expand(len(tokens), -1, -1)
        _, weights = self.attention(query, tokens, tokens, need_weights=True, average_attn_weights=False)
        return weights[:, :, 0]
