"""Triton kernels for what prefill and decode steps compute on CUDA.

Each op is a kernel, its launcher and a twin in plain torch, which says what the kernel computes. No
op waits for the host. Kernels run in Triton's interpreter on a CPU (TRITON_INTERPRET=1) and compile
for compute capability 8.0 and later.

A prompt: llm_int8 (linear layers), rotary, prefill_attention, which launch starts. A step: few_rows
(linear layers, rotation, cache), attention, lookup. Both: few_rows for the output head, sampling.

Letters in shapes: T tokens (or M rows) of a prompt, B rows of a step, D inputs, N outputs, S length
of the cache, H heads, Hkv heads of keys and values, K head dimension. CB and SCB are the codes and
scales of weights, as bitsandbytes names them.
"""
