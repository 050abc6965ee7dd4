"""Matrices in 8 bits: how they are quantized, stored and multiplied.

As in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339, section 3), row r of a weight (out, in) is
kept as int8 codes CB[r] and one float32 scale SCB[r], the row's largest magnitude, so that
weight = CB * SCB / 127. Both are bit for bit those of bitsandbytes, which multiplies on CUDA; on
the CPU, where it is slow, x @ weight is computed in float32 without rounding activations.
"""

import functools
import logging
import math
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor


def _compile_when_called(function=None, **options):
    """torch.compile, whose import takes 3 s, put off until the function is called."""
    if function is None:
        return functools.partial(_compile_when_called, **options)
    compiled = functools.cache(lambda: torch.compile(function, **options))
    return functools.wraps(function)(lambda *args, **given: compiled()(*args, **given))


# At import, bitsandbytes compiles 4-bit functions (not called here) and warns of a missing kernel.
warns = logging.getLogger("bitsandbytes.backends.cpu.ops")
with patch("torch.compile", _compile_when_called), patch.object(warns, "disabled", True):
    import bitsandbytes as bnb

SMALLEST = 2**-24  # above 0 in fp16
OUTLIER_THRESHOLD = 6.0  # activations from here on are kept in more bits (section 3.2)


class Int8Linear(bnb.nn.Linear8bitLt):
    """A Linear8bitLt for inference that follows its model's `.to(device)`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        if bias:
            raise ValueError("bias is True: LLaMA's linear layers have none")
        super().__init__(
            in_features, out_features, bias, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD
        )
        self.eval()

    def set(self, CB: Tensor, SCB: Tensor) -> None:
        """CB int8 (out, in), SCB float32 (out,), on the device where the layer is to work."""
        self.weight = bnb.nn.Int8Params(CB, requires_grad=False, has_fp16_weights=False)
        self.state.CB, self.state.SCB = CB, SCB

    def forward(self, x: Tensor) -> Tensor:
        if self.state.CB is None:  # nothing was loaded: the layer's own random weights
            weight = self.weight.data
            allocate([self], weight.device)
            quantize(weight.half().float(), self.state.CB, self.state.SCB)
        if x.is_cuda:
            return super().forward(x)
        return F.linear(x, self.state.CB.to(x.dtype)) * (self.state.SCB / 127).to(x.dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.weight.CB is not None:  # bitsandbytes quantizes what moves
            self.init_8bit_state()
        if self.state.CB is not None:
            self.set(self.weight.data, self.state.SCB.to(self.weight.device))
        return self


def allocate(linears: list[Int8Linear], device: torch.device) -> None:
    """Gives layers that read the same input views of one matrix, whose values are not set."""
    rows = [linear.out_features for linear in linears]
    CB = torch.empty(sum(rows), linears[0].in_features, dtype=torch.int8, device=device)
    SCB = torch.empty(sum(rows), dtype=torch.float32, device=device)
    for linear, codes, scales in zip(linears, CB.split(rows), SCB.split(rows)):
        linear.set(codes, scales)


def join(linears: list[Int8Linear]) -> tuple[Tensor, Tensor]:
    """CB and SCB of several layers as one matrix; moves layers not allocated together."""
    states = [linear.state for linear in linears]
    if len({state.CB.untyped_storage().data_ptr() for state in states}) > 1:
        old = [(state.CB, state.SCB) for state in states]
        allocate(linears, states[0].CB.device)
        for state, (CB, SCB) in zip(states, old):
            state.CB.copy_(CB)
            state.SCB.copy_(SCB)
    CB, SCB, rows = states[0].CB, states[0].SCB, sum(len(state.CB) for state in states)
    return CB.as_strided((rows, CB.shape[1]), CB.stride()), SCB.as_strided((rows,), (1,))


def quantize(x: Tensor, CB: Tensor, SCB: Tensor) -> None:
    """Fills codes CB int8 (rows, in) and scales SCB float32 (rows,) from x (rows, in) float32,
    rounded to fp16 before, as by bitsandbytes. Overwrites x. ValueError if it is not finite."""
    # amax and amin together take one core 0.12 ns a value; aminmax, which torch does not vectorize
    # along rows, 2.7 (AMD EPYC, torch 2.11 and 2.13, 2026-11-23).
    torch.maximum(x.amax(1), x.amin(1).abs_(), out=SCB)
    check_finite(SCB.max())
    # A row of zeros has the scale 0: divided by the smallest scale of any other, it stays zeros.
    CB.copy_(x.mul_(127 / SCB[:, None].clamp(min=SMALLEST)).round_())


def check_saved(values: Tensor) -> None:
    """ValueError unless values, codes in int8 or scales in float32, are such as quantize makes."""
    least, most = (-127, 127) if values.dtype == torch.int8 else (0, 65504)
    low, high = values.aminmax()
    if not least <= low.item() <= high.item() <= most:
        raise ValueError("holds codes or scales that bitsandbytes makes of no fp16 weights")


def check_finite(*values: Tensor) -> None:
    """ValueError unless each value, a tensor of one element, is finite."""
    if not all(math.isfinite(value.item()) for value in values):
        raise ValueError("holds values that are not finite in fp16 (NaN, or beyond 65,504)")
