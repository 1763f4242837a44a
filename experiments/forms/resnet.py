"""The CIFAR-10 ResNet of He et al. (20 layers), without its last layer: images in, 64 features out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions; where the size halves, the shortcut drops every second pixel and pads channels with zeros."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.pad = stride, (outer - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """Pixels [B, 3, 32, 32] in 0..1 to features [B, 64]."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=64)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for i, (inner, outer, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), 1):
            blocks = [Block(inner, outer, stride), Block(outer, outer, 1), Block(outer, outer, 1)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1((pixel_values - self.mean) / self.std)))
        for i in (1, 2, 3):
            x = getattr(self, f"layer{i}")(x)
        return x.mean((2, 3))


def load(folder: Path) -> tuple[ResNet20, dict[str, Tensor]]:
    """The network with the stored weights, and those of the last layer (``weight`` [10, 64], ``bias`` [10])."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    last = {name: tensors.pop(f"linear.{name}") for name in ("weight", "bias")}
    module = ResNet20()
    module.load_state_dict(tensors, strict=False)
    return module.eval(), last
