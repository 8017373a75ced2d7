"""The contrastive loss that aligns the towers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["info_nce"]


def info_nce(
    a: torch.Tensor,
    b: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    all_a: torch.Tensor | None = None,
    all_b: torch.Tensor | None = None,
    first_row: int = 0,
) -> torch.Tensor:
    """Symmetric InfoNCE (van den Oord+2018; CLIP, Radford+2021, fig. 3).

    a, b:         (N, D) unit vectors; row i of both is one object.
    logit_scale:  multiplier of the cosines (not its logarithm).
    all_a, all_b: (M, D) the same gathered over all processes, local rows at `first_row`; default: a and b.
    Returns the scalar mean of the two cross-entropies.
    """
    all_a = a if all_a is None else all_a
    all_b = b if all_b is None else all_b
    target = torch.arange(len(a), device=a.device) + first_row
    a_to_b = F.cross_entropy(logit_scale * a @ all_b.T, target)
    b_to_a = F.cross_entropy(logit_scale * b @ all_a.T, target)
    return (a_to_b + b_to_a) / 2
