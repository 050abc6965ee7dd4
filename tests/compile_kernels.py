"""Do the kernels compile for GPUs that are not here? python tests/compile_kernels.py

Compiles each kernel for the shapes of 13B and for compute capabilities from 8.0 on, with the ptxas
that Triton brings, and prints the shared memory it takes; exit status 1 if it is more than the chip
has. Apart from the tests because those run kernels in the interpreter.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llama import kernels

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB a block: CUDA programming guide
LINEAR = {"x": "*fp16", "CB": "*i8", "SCB": "*fp32", "out": "*fp32", "N": "i32"}
FEW = {
    "digits": "*i8",
    "scales": "*fp32",
    "CB": "*i8",
    "SCB": "*fp32",
    "out": "*fp32",
    "partial": "*fp32",
    "arrivals": "*i32",
    "B": "i32",
    "N": "i32",
}
ATTEND = {
    "qkv": "*fp32",
    "k_cache": "*fp16",
    "v_cache": "*fp16",
    "positions": "*i64",
    "rotation": "*fp32",
    "partial": "*fp32",
    "arrivals": "*i32",
    "out": "*fp16",
    "S": "i32",
    "scale": "fp32",
}


def cases():
    """(kernel, types of its arguments, constants, launch options)"""
    few = {"GROUP": kernels.GROUP, "BLOCK_N": kernels.BLOCK_N}
    for D, then, splits in ((5120, "swiglu", 2), (13824, "add", 4)):
        tiles = triton.cdiv(D, kernels.TILE)
        constants = {"D": D, "TILE": kernels.TILE, "TILES": tiles, "THEN": then}
        yield kernels.matvec_kernel, LINEAR, constants, {"num_warps": 4}
        constants = few | {"D": D, "BLOCK_B": 32, "SPLITS": splits, "THEN": then}
        options = {"num_warps": 4, "num_stages": kernels.STAGES}
        yield kernels.few_rows_kernel, FEW, constants, options
    types = {"x": "*fp16", "digits": "*i8", "scales": "*fp32", "B": "i32"}
    constants = {"D": 5120, "GROUP": kernels.GROUP, "DIGITS": kernels.DIGITS}
    yield kernels.split_kernel, types, constants, {"num_warps": 1}
    types = {"x": "*fp32", "weight": "*fp16", "out": "*fp16", "eps": "fp32"}
    yield kernels.rms_norm_kernel, types, {"D": 5120, "BLOCK": 8192}, {"num_warps": 8}
    sizes = {"K": 128, "SPLIT": 64, "BLOCK": 64, "MAX_SPLITS": kernels.MAX_SPLITS}
    yield kernels.attend_kernel, ATTEND, sizes | {"H": 64, "HKV": 8}, {"num_warps": 4}


def main() -> int:
    failed = 0
    for kernel, types, constants, options in cases():
        for capability, limit in SHARED.items():
            constants = constants | {"PDL": capability >= 90}
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            source = ASTSource(kernel, signature, constants)
            target = GPUTarget("cuda", capability, 32)
            shared = triton.compile(source, target=target, options=options).metadata.shared / 1024
            print(f"{kernel.__name__} {capability}: {shared:.0f} of {limit} KiB")
            failed += shared > limit
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
