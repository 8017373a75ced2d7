"""Several processes as if they were one: what has to look at the whole batch looks at the whole batch.

DistributedDataParallel averages gradients over processes. A loss that is a mean over a process's own rows is then the
mean over the joined batch, and needs nothing. Three things do need something:

* contrastive losses see the rows of all processes, with gradients to where they came from (`Stage.gathered`);
* means over numbers that are not equally many everywhere are divided by the number of all (`joined_mean`);
* BatchNorm takes its statistics from the joined batch (`join_batchnorm`). torch's SyncBatchNorm works on GPUs alone;
  the class here works on any device, so that the same equality is tested where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["JoinedBatchNorm", "join_batchnorm", "joined_mean", "world_size"]


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def joined_mean(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`total` / `weight`, so scaled that the mean over processes is the sum of totals over the sum of weights.

    total, weight: scalars of this process; no gradient flows through the weight. A weight below 1 counts as 1.
    """
    weight = weight.detach().clone()
    processes = world_size()
    if processes > 1:
        dist.all_reduce(weight)
    return total * processes / weight.clamp_min(1)


class _Sum(torch.autograd.Function):
    """Sum over processes. Its gradient is the sum of theirs: what each makes of the sum depends on every summand."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class JoinedBatchNorm(_BatchNorm):
    """BatchNorm over the rows of all processes in training; numbers of rows may differ. In eval mode: BatchNorm.

    The mean first and then the deviations from it, each summed over processes by an operation that has a gradient:
    two messages, where one of sums and squares would lose digits.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"found an input of {input.dim()} dimensions; wanted (N, C, ...)")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float()
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        count = x.new_tensor([x.numel() / x.shape[1]])
        dist.all_reduce(count)
        mean = _Sum.apply(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _follow(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """The running statistics, as BatchNorm keeps them: the variance unbiased."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def join_batchnorm(module: nn.Module, cuda: bool) -> None:
    """Replace every BatchNorm below `module` in place: torch's SyncBatchNorm on GPUs, `JoinedBatchNorm` elsewhere.

    Parameters, buffers and their names stay, so weights are saved and loaded as before.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, (JoinedBatchNorm, nn.SyncBatchNorm)):
            setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child) if cuda else _joined(child))
        else:
            join_batchnorm(child, cuda)


def _joined(norm: _BatchNorm) -> JoinedBatchNorm:
    made = JoinedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made.weight, made.bias = norm.weight, norm.bias
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    made.num_batches_tracked = norm.num_batches_tracked
    return made.train(norm.training)
