"""torchvision's ResNet at any base width, depth and number of bands, without its classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

__all__ = ["resnet", "resnet_features"]


def resnet(layers: Sequence[int], bottleneck: bool, width: int, in_channels: int = 3) -> ResNet:
    """A ResNet whose output is its pooled features.

    layers: blocks a stage; bottleneck: blocks of three convolutions (ResNet-50 and up) rather than two; width: channels
    of the first stage. torchvision fixes the width at 64 and the bands at 3, hence the rebuilding.
    """
    block = Bottleneck if bottleneck else BasicBlock
    net = ResNet(block, list(layers))  # type: ignore[arg-type]
    if width != 64 or in_channels != 3:
        net.inplanes = width
        net.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        net.bn1 = nn.BatchNorm2d(width)
        net.layer1 = net._make_layer(block, width, layers[0])  # type: ignore[arg-type]
        net.layer2 = net._make_layer(block, 2 * width, layers[1], stride=2)  # type: ignore[arg-type]
        net.layer3 = net._make_layer(block, 4 * width, layers[2], stride=2)  # type: ignore[arg-type]
        net.layer4 = net._make_layer(block, 8 * width, layers[3], stride=2)  # type: ignore[arg-type]
    net.fc = nn.Identity()  # type: ignore[assignment]
    return net


def resnet_features(bottleneck: bool, width: int) -> int:
    """Length of the pooled features."""
    return 8 * width * (Bottleneck.expansion if bottleneck else BasicBlock.expansion)
