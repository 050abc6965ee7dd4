"""Triton kernels for what prefill and decode steps compute on CUDA.

Each op is a kernel, its launcher and a twin in plain torch with the same arguments and results,
which says what the kernel computes. No op waits for the host. Kernels run in Triton's interpreter
on a CPU (TRITON_INTERPRET=1) and compile for compute capability 8.0 and later.

Letters in shapes: T tokens of a prompt, B sequences, D inputs, N outputs, S length of the cache,
H heads, Hkv heads of keys and values, K head dimension. CA, SCA, CB, SCB are the codes and scales
of activations and weights, as bitsandbytes names them.
"""

from llama.kernels.attention import attend, attend_torch
from llama.kernels.few_rows import linear, linear_torch, split, split_torch
from llama.kernels.launch import repeating
from llama.kernels.llm_int8 import (
    mixed_scaled_mm,
    mixed_scaled_mm_torch,
    vectorwise_quant,
    vectorwise_quant_torch,
)
from llama.kernels.rotary import rotate, rotate_torch

__all__ = [
    "attend",
    "attend_torch",
    "linear",
    "linear_torch",
    "mixed_scaled_mm",
    "mixed_scaled_mm_torch",
    "repeating",
    "rotate",
    "rotate_torch",
    "split",
    "split_torch",
    "vectorwise_quant",
    "vectorwise_quant_torch",
]
