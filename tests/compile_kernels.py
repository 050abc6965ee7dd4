"""Do the kernels compile for GPUs that are not here? python tests/compile_kernels.py

Compiles each kernel for the shapes of 13B and for compute capabilities from 8.0 on, with the ptxas
that Triton brings, and prints the shared memory it takes; exit status 1 if it is more than the chip
has. Apart from the tests because those run kernels in the interpreter.
"""

import itertools
import sys
from concurrent.futures import ProcessPoolExecutor

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llama.buffers import TILE_ROWS, quant_lists
from llama.kernels import (
    attention,
    few_rows,
    llm_int8,
    lookup,
    prefill_attention,
    rotary,
    sampling,
)
from llama.lookup import NGRAM

LIST = quant_lists((), 1, 5120, "meta").shape[1]
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB a block: CUDA programming guide


def types(text):
    """Those of a kernel's arguments."""
    return dict(argument.split(": ") for argument in text.split(", "))


LINEAR = types("digits: *i8, scales: *fp32, CB: *i8, SCB: *fp32, out: *fp32, k_cache: *fp16")
LINEAR |= types("v_cache: *fp16, positions: *i64, angles: *fp32, S: i32, EACH: i32, B: i32")
LINEAR |= types("N: i32")
SPLIT = types("x: *fp32, gain: *fp16, eps: fp32, digits: *i8, scales: *fp32")
ATTEND = types("queries: *fp16, k_cache: *fp16, v_cache: *fp16, positions: *i64, partial: *fp32")
ATTEND |= types("arrivals: *i32, digits: *i8, scales: *fp32, S: i32, EACH: i32")
ROTATE = types("qkv: *fp16, k_cache: *fp16, v_cache: *fp16, places: *i32, rotation: *fp32, T: i32")
ROTATE |= types("tokens: *i64, bos: i32, first_k: *fp16, first_v: *fp16, S: i32")
PREFILL = types("qkv: *fp16, k_cache: *fp16, v_cache: *fp16, tiles: *i32, out: *fp16, S: i32")
PREFILL |= types("scale: fp32")
QUANT = types("x: *fp16, weight: *fp16, eps: fp32, digits: *i8, step: *fp32, used: *i32")
QUANT |= types("lists: *i32")
PRODUCT = QUANT | types("CB: *i8, SCB: *fp32, out: *fp32, M: i32, N: i32")
GUESS = types("tokens: *i64, lengths: *i64, found: *i1, stride: i32, count: i32")
SAMPLING = types("logits: *fp32, extremes: *fp32, uniform: *fp32, parent: *i64, total: *i64")
SAMPLING |= types("level: *i64, gathered: *i64, tokens: *i64, stride: i32, V: i32, warmth: fp32")
SAMPLING |= types("top_p: fp32, top_k: i32, last: i32")


def cases():
    """(kernel, types of its arguments, constants, launch options)"""
    words = LINEAR | {"digits": "*i32", "CB": "*i32"}
    for D, then in ((5120, "swiglu"), (13824, "add"), (5120, "rotate")):
        constants = {"D": D, "GROUP": few_rows.GROUP, "THEN": then, "HKV": 40, "K": 128}
        constants["DP4A"] = True
        yield few_rows.one_row_kernel, words, constants, {"num_warps": few_rows.WARPS}
        for B in (8, 32):
            block_n, stages = few_rows.tile_of(B)
            options = {"num_warps": few_rows.WARPS, "num_stages": stages}
            sizes = {"BLOCK_B": B, "BLOCK_N": block_n}
            yield few_rows.few_rows_kernel, LINEAR, constants | sizes, options
    constants = {name: getattr(few_rows, name) for name in ("TILE", "GROUP", "DIGITS")}
    constants |= {"D": 5120, "TILES": 5120 // few_rows.TILE, "NORM": True}
    yield few_rows.split_kernel, SPLIT, constants, {"num_warps": 4}
    names = ("BLOCK", "LEAST", "MAX_SPLITS", "DIGITS")
    constants = {name: getattr(attention, name) for name in names}
    constants |= {"H": 64, "HKV": 8, "K": 128, "HEADS": 16}
    options = {"num_warps": attention.WARPS, "num_stages": attention.STAGES}
    yield attention.attend_kernel, ATTEND, constants, options

    constants = {"H": 64, "HKV": 8, "K": 128, "BLOCK_T": rotary.BLOCK_T}
    yield rotary.rotate_kernel, ROTATE, constants, {"num_warps": 4}
    for K in (64, 128):
        constants = {"H": 64, "HKV": 8, "K": K}
        constants |= {"ROWS": TILE_ROWS, "BLOCK": prefill_attention.BLOCK}
        options = {"num_warps": 4, "num_stages": prefill_attention.STAGES}
        yield prefill_attention.attend_kernel, PREFILL, constants, options
    names = ("TWO_DIGITS", "MOST_STEPS", "ROUND", "LIST_ROWS", "LIST_COLUMNS")
    constants = {name: getattr(llm_int8, name) for name in names}
    constants |= {"THRESHOLD": llm_int8.OUTLIER_THRESHOLD, "LIST": LIST}
    for before, x in (("rms_norm", "*fp32"), ("nothing", "*fp16")):
        sizes = {"D": 5120, "TILE": 1024, "TILES": 5, "BEFORE": before}
        yield (
            llm_int8.vectorwise_quant_kernel,
            QUANT | {"x": x},
            constants | sizes,
            {"num_warps": 8},
        )
    sizes = {"D": 13824, "TILE": 2048, "TILES": 7, "BEFORE": "swiglu"}
    yield llm_int8.vectorwise_quant_kernel, QUANT, constants | sizes, {"num_warps": 16}
    constants |= {name: getattr(llm_int8, name) for name in ("BLOCK_K", "NEIGHBOURS")}
    for M, N, then in ((1, 5120, "add"), (128, 27648, "store"), (1900, 5120, "add")):
        block_m, block_n, stages = llm_int8.tile_of(M, N)
        sizes = {"D": 5120, "BLOCK_M": block_m, "BLOCK_N": block_n, "THEN": then}
        options = {"num_warps": llm_int8.WARPS, "num_stages": stages}
        given = PRODUCT | {"out": "*fp16" if then == "store" else "*fp32"}
        yield llm_int8.mixed_scaled_mm_kernel, given, constants | sizes, options

    constants = {"P": 16, "BLOCK": sampling.BLOCK}
    yield sampling.extremes_kernel, SAMPLING, constants, {"num_warps": 8}
    constants = constants | {"P2": 16, "CUT": True, "COUNT": True}
    yield sampling.measure_kernel, SAMPLING, constants | {"FIRST": False}, {"num_warps": 8}
    constants = constants | {"ID_BITS": 17}
    yield sampling.gather_kernel, SAMPLING, constants, {"num_warps": 8}
    constants = constants | {"BLOCK": sampling.FOUND_BLOCK}
    yield sampling.find_kernel, SAMPLING, constants, {"num_warps": 16}

    constants = {"NGRAM": NGRAM, "COUNT": 8, "BLOCK": lookup.BLOCK}
    yield lookup.guess_kernel, GUESS, constants, {"num_warps": 4}


def shared_memory(case: int, capability: int) -> tuple[str, float]:
    """KiB that one of cases() takes."""
    kernel, given, constants, options = list(cases())[case]
    if "PDL" in kernel.arg_names:
        constants = constants | {"PDL": capability >= 90}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: given.get(name, "constexpr") for name in kernel.arg_names}
    # As at a launch, where pointers and sizes are multiples of 16: else nothing is loaded ahead,
    # and little shared memory taken.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if given.get(name, "")[:1] == "*" or (name in given and name in "NS")
    }
    constants = {name: constants[name] for name in constants if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    return kernel.__name__, compiled.metadata.shared / 1024


def main() -> int:
    each = list(itertools.product(range(len(list(cases()))), SHARED))
    failed = 0
    with ProcessPoolExecutor() as pool:
        for (_, capability), (name, shared) in zip(each, pool.map(shared_memory, *zip(*each))):
            print(f"{name} {capability}: {shared:.0f} of {SHARED[capability]} KiB")
            failed += shared > SHARED[capability]
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
