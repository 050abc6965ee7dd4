"""How is a matrix stored and multiplied in 8 bits?

As in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339, section 3): row r of a weight (out, in) is
kept as int8 codes CB[r] and one float32 scale SCB[r], the row's largest magnitude, so that
weight = CB * SCB / 127. Codes and scales are bit for bit those of bitsandbytes, which on CUDA also
multiplies. On the CPU, where its product is a slow emulation in fp16, the activations are not
rounded: x @ (CB * SCB / 127) in float32.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import Executor
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

# At import, bitsandbytes prepares 4-bit functions that nothing here calls: it warns that a kernel
# of theirs is missing, and hands them to torch.compile, whose own import takes 3 s.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
with patch("torch.compile", lambda function, **_: function):
    import bitsandbytes as bnb

OUTLIER_THRESHOLD = 6.0  # activations from here on stay in fp16: arXiv 2208.07339, section 3.2
ROWS_A_BLOCK = 64  # a block of fp32 rows stays in a core's L2 cache


class Int8Linear(bnb.nn.Linear8bitLt):
    """A Linear8bitLt for inference that follows its model's `.to(device)`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(
            in_features, out_features, bias, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD
        )
        self.requires_grad_(False)
        self.eval()

    def set(self, CB: Tensor, SCB: Tensor) -> None:
        """CB int8 (out, in), SCB float32 (out,), on the device where the layer is to work."""
        self.weight = bnb.nn.Int8Params(CB, requires_grad=False, has_fp16_weights=False)
        self.state.CB, self.state.SCB = CB, SCB

    def forward(self, x: Tensor) -> Tensor:
        if self.state.CB is None:  # a layer nobody has loaded: its own random weights
            self.set(*quantize([[self.weight.data]]))
        if x.is_cuda:
            return super().forward(x)
        return F.linear(x, self.state.CB.to(x.dtype)) * (self.state.SCB / 127).to(x.dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.state.CB is not None:
            self.set(self.weight.data, self.state.SCB.to(self.weight.device))
        return self


def quantize(
    blocks: Iterable[list[Tensor]], pool: Executor | None = None, pin: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes CB int8 (out, in) and scales SCB float32 (out,) of a matrix given as consecutive blocks
    of rows, each a list of pieces that stand side by side. Peak memory beside the result: a float32
    copy of one block a thread.

    ValueError if a value is not finite in fp16, in which bitsandbytes quantizes.
    """
    blocks = list(blocks)
    ends = torch.tensor([block[0].shape[0] for block in blocks]).cumsum(0).tolist()
    width = sum(piece.shape[1] for piece in blocks[0])
    device = blocks[0][0].device
    CB = torch.empty(ends[-1], width, dtype=torch.int8, device=device, pin_memory=pin)
    SCB = torch.empty(ends[-1], device=device, pin_memory=pin)

    def work(block: list[Tensor], end: int) -> None:
        rows = slice(end - block[0].shape[0], end)
        x = torch.cat([piece.half() for piece in block], 1).float()
        torch.linalg.vector_norm(x, torch.inf, dim=1, out=SCB[rows])
        # A row of zeros has the scale 0; any divisor gives its codes, which are zeros.
        x.mul_(127 / SCB[rows, None].clamp(min=torch.finfo(torch.float32).tiny)).round_()
        CB[rows] = x

    list((pool.map if pool else map)(work, blocks, ends))
    if not SCB.isfinite().all():
        raise ValueError("holds values that are not finite in fp16 (NaN, or beyond 65,504)")
    return CB, SCB
