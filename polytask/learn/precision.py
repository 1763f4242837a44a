"""The frozen base in bf16 while adapters learn in fp32, where that is quicker and one batch's loss agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALLEST = 5_000_000  # parameters below which casting costs more than bf16 saves on a CPU


def quick_in_bf16(device: torch.device, parameters: int) -> bool:
    """Whether the processor has bf16 arithmetic. Decided by what it is and not by a clock, so that a seed decides the rest."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return native and parameters >= SMALLEST
    return False


@contextmanager
def lowered(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """The module's floating-point tensors in ``dtype`` inside the block, and the very same tensors as before after it."""
    if dtype is None:
        yield
        return
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point() and tensor.dtype != dtype:
            kept.append((tensor, tensor.data))
            tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def choose(wanted: str, module: nn.Module, device: torch.device, loss: Callable[[], float]) -> tuple[str, str]:
    """The precision to learn in and why.

    Args:
        wanted: ``auto``, ``fp32`` or ``bf16``.
        module: the base.
        device: where it runs.
        loss: computes one batch's loss in the precision that the base has then.

    Returns:
        ``fp32`` or ``bf16``, and the reason in words.
    """
    if wanted != "auto":
        return wanted, "asked for"
    if not quick_in_bf16(device, sum(p.numel() for p in module.parameters())):
        return "fp32", f"this {device.type} has no quick bf16 for this base"
    full = loss()
    with lowered(module, torch.bfloat16):
        low = loss()
    if abs(low - full) > 0.02 * abs(full) + 0.01:
        return "fp32", f"one batch's loss differs in bf16: {low:.4f} instead of {full:.4f}"
    return "bf16", f"quicker here, and one batch's loss agrees ({low:.4f} and {full:.4f})"
