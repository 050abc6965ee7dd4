"""Does each kernel compute what its torch twin says? In Triton's interpreter where there is no GPU.

A kernel differs from its twin in the order of float32 sums and in where it rounds to fp16. Sums of
D terms: a relative error of at most D 2^-24 of the sum of magnitudes; results stored in fp16: one
rounding more, 2^-11 of the value. `test_twins_can_differ` shows that one wrong code is outside.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("llama.kernels", reason="needs triton")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Inputs, outputs: odd in the interpreter; of 7B to 65B on a GPU.
SHAPES = [(300, 90), (64, 2), (257, 131)]
LARGE = [(4096, 12288), (5120, 5120), (13824, 5120), (6656, 35840), (22016, 8192), (8192, 32000)]


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)


def matrix(D, N):
    CB = torch.randint(-127, 128, (N, D), dtype=torch.int8, device=DEVICE)
    SCB = torch.rand(N, device=DEVICE) / D**0.5
    SCB[N // 2] = 0
    return CB, SCB


def linear_bound(x, CB, SCB):
    """Several rows are split in digits: an error of 1 / 64,000 of the largest of 128 columns."""
    weights = (CB.float().abs() * (SCB / 127)[:, None]).T
    bound = x.float().abs() @ weights * x.shape[1] * 2**-24
    if len(x) > 1:
        bound += x.float().abs().amax(1, keepdim=True) / 64_000 * weights.sum(0)
    return bound


def check_linear(B, D, N, then):
    x, (CB, SCB) = random(B, D, dtype=torch.float16), matrix(D, N)
    n = N // 2 if then == "swiglu" else N
    ours = random(B, n) if then == "add" else poisoned(B, n)
    theirs = ours.clone()
    parts = kernels.linear_buffers(B, n, x.device)
    if then != "add":  # the counts must be ready for the next time
        kernels.linear(x, CB, SCB, ours, then, parts)
    kernels.linear(x, CB, SCB, ours, then, parts)
    kernels.linear_torch(x, CB, SCB, theirs, then)
    if then == "swiglu":
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    else:
        bound = linear_bound(x, CB, SCB) + 2**-23 * theirs.abs()
        assert ((ours - theirs).abs() <= bound).all()
    return x, CB, SCB, ours


@pytest.mark.parametrize("B", [1, 5, 32])
@pytest.mark.parametrize("then", ["store", "add", "swiglu"])
@pytest.mark.parametrize("D, N", SHAPES)
def test_linear(B, D, N, then):
    check_linear(B, D, N - N % 2, then)


@pytest.mark.cuda
@pytest.mark.parametrize("B", [1, 3, 8, 32])
@pytest.mark.parametrize("then", ["store", "add", "swiglu"])
@pytest.mark.parametrize("D, N", LARGE)
def test_linear_at_real_sizes(B, D, N, then):
    torch.backends.cuda.matmul.allow_tf32 = False
    check_linear(B, D, N, then)


@pytest.mark.parametrize("B", [1, 5])
def test_twins_can_differ(B):
    x, CB, SCB, ours = check_linear(B, 300, 90, "store")
    x[:, 7], CB[4, 7] = 1, CB[4, 7] ^ 8
    theirs = torch.empty_like(ours)
    kernels.linear_torch(x, CB, SCB, theirs, "store")
    assert not ((ours - theirs).abs() <= linear_bound(x, CB, SCB))[:, 4].any()


@pytest.mark.parametrize("B", [2, 17])
def test_a_row_does_not_depend_on_the_others(B):
    x, CB, SCB, ours = check_linear(B, 300, 90, "store")
    x[1:] = random(B - 1, 300).half() * 100
    again = torch.empty_like(ours)
    parts = kernels.linear_buffers(B, 90, x.device)
    kernels.linear(x, CB, SCB, again, "store", parts)
    assert torch.equal(ours[0], again[0])
    kernels.linear(x.roll(1, 0), CB, SCB, again, "store", parts)
    assert torch.equal(ours[0], again[1])


@pytest.mark.parametrize("B, D", [(1, 64), (3, 300), (32, 5120)])
def test_split(B, D):
    x = random(B, D, dtype=torch.float16) * 30
    x[0, :130] = 0
    digits, scales = kernels.split(x)
    theirs, their_scales = kernels.split_torch(x)
    assert torch.equal(scales, their_scales)
    whole, their_whole = (d[0].int() * 256 + d[1] for d in (digits, theirs))
    assert (whole - their_whole).abs().max() <= 1  # halves, rounded the one way or the other
    back = whole.float() * scales.repeat_interleave(kernels.GROUP, 1)[:, :D]
    largest = scales.repeat_interleave(kernels.GROUP, 1)[:, :D] * kernels.DIGITS
    assert ((back - x.float()).abs() <= largest / 64_000).all()


@pytest.mark.parametrize("B, D", [(1, 96), (3, 100), (32, 5120)])
def test_rms_norm(B, D):
    x, weight = random(B, D) * 30, random(D, dtype=torch.float16)
    ours, theirs = (poisoned(B, D, dtype=torch.float16) for _ in range(2))
    kernels.rms_norm(x, weight, 1e-5, ours)
    kernels.rms_norm_torch(x, weight, 1e-5, theirs)
    assert torch.allclose(ours, theirs, rtol=2**-10, atol=1e-7)


def check_attend(positions, S, H, Hkv, K):
    B = len(positions)
    qkv = random(B, (H + 2 * Hkv) * K)
    caches = [random(B, S, Hkv, K, dtype=torch.float16) for _ in range(2)]
    for b, position in enumerate(positions):  # what no token has written must not be looked at
        for cache in caches:
            cache[b, position:] = torch.nan
    twins = [cache.clone() for cache in caches]
    angles = torch.outer(torch.arange(S), 0.01 ** torch.linspace(0, 1, K // 2)).to(DEVICE)
    rotation = torch.stack([angles.cos(), angles.sin()], -1)
    positions = torch.tensor(positions, device=DEVICE)
    splits = kernels.attend_buffers(B, H, K, qkv.device)
    ours, theirs = (poisoned(B, H * K, dtype=torch.float16) for _ in range(2))
    for _ in range(2):  # the count of arrivals must be ready for the next time
        kernels.attend(qkv, *caches, positions, rotation, ours, splits)
    kernels.attend_torch(qkv, *twins, positions, rotation, theirs)
    assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()
    for cache, twin in zip(caches, twins):
        assert torch.allclose(cache, twin, rtol=2**-10, atol=1e-6, equal_nan=True)
    # One token left out of 64 shifts the mean by its share.
    wrong = torch.empty_like(theirs)
    if positions.min() > 0:
        kernels.attend_torch(qkv, *twins, positions - 1, rotation, wrong)
        assert (wrong - theirs).abs().max() > 4e-3 * theirs.abs().max()


@pytest.mark.parametrize(
    "positions, S", [([0], 1), ([5], 9), ([63, 64, 1, 0], 65), ([190, 128, 127], 200)]
)
@pytest.mark.parametrize("H, Hkv", [(2, 2), (4, 1)])
def test_attend(positions, S, H, Hkv):
    check_attend(positions, S, H, Hkv, 16)


@pytest.mark.cuda
@pytest.mark.parametrize("H, Hkv", [(40, 40), (64, 8)])
@pytest.mark.parametrize("S", [160, 2048, 16384])
def test_attend_at_real_sizes(H, Hkv, S):
    check_attend([S - 1, S // 2, 17, 100], S, H, Hkv, 128)


def test_kernels_compile_for_other_gpus(tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(script.parents[1])
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
