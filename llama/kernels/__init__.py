"""What runs faster than torch's own ops? Prefill and decode steps on CUDA, as Triton kernels.

Each op is a kernel, its launcher and, with the same arguments and results, a twin in plain torch
that says what it computes; no op waits for the host. Kernels run in Triton's interpreter on a CPU
(TRITON_INTERPRET=1) and compile for compute capability 8.0 and later.

T tokens of a prompt, B rows of a batch, D inputs, N outputs, S length of the cache, H heads, Hkv of
them for keys and values, K head dimension. CA, SCA, CB, SCB: codes and scales of activations and
weights, as bitsandbytes has them.
"""

from llama.kernels.attention import attend, attend_buffers, attend_torch
from llama.kernels.few_rows import linear, linear_buffers, linear_torch, split, split_torch
from llama.kernels.launch import Repeated
from llama.kernels.llm_int8 import (
    mixed_scaled_mm,
    mixed_scaled_mm_torch,
    quant_room,
    vectorwise_quant,
    vectorwise_quant_torch,
)
from llama.kernels.rotary import rotate, rotate_torch

__all__ = [
    "Repeated",
    "attend",
    "attend_buffers",
    "attend_torch",
    "linear",
    "linear_buffers",
    "linear_torch",
    "mixed_scaled_mm",
    "mixed_scaled_mm_torch",
    "quant_room",
    "rotate",
    "rotate_torch",
    "split",
    "split_torch",
    "vectorwise_quant",
    "vectorwise_quant_torch",
]
