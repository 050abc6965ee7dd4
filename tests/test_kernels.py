"""Does each kernel compute what its torch twin says? In Triton's interpreter where there is no GPU.

A kernel differs from its twin in the order of float32 sums and in where it rounds to fp16. Sums of
D terms: a relative error of at most D 2^-24 of the sum of magnitudes; results stored in fp16: one
rounding more, 2^-11 of the value. `test_twins_can_differ` shows that one wrong code is outside.
"""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, python

pytest.importorskip("triton", reason="needs triton")
from llama import Settings  # noqa: E402
from llama.buffers import attend_buffers, linear_buffers, quant_buffers  # noqa: E402
from llama.kernels import attention, few_rows, llm_int8, rotary, sampling  # noqa: E402
from llama.sampling import NOT_FINITE, draw, next_token  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Inputs, outputs: odd in the interpreter; of 7B to 65B on a GPU.
SHAPES = [(300, 90), (64, 2), (1156, 131)]
LARGE = [
    (4096, 12288, "store"),
    (5120, 5120, "add"),
    (13824, 5120, "add"),
    (6656, 35840, "swiglu"),
    (22016, 8192, "add"),
    (8192, 32000, "store"),
]


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
    """Whole numbers are exact; what comes of each is rounded to float32 three times, then added to
    that of the groups before it, of three other quarters, and scaled."""
    weights = (CB.float().abs() * (SCB / 127)[:, None]).T
    return few_rows.joined(x).abs() @ weights * ((x[1].shape[1] + 9) * 2**-24)


def check_linear(B, D, N, then, group=few_rows.GROUP):
    x, (CB, SCB) = few_rows.split_torch(random(B, D) * 30, group=group), matrix(D, N)
    n = N // 2 if then == "swiglu" else N
    ours = random(B, n) if then == "add" else poisoned(B, n)
    theirs = ours.double()
    parts = linear_buffers(n, ours.device)
    for _ in range(1 if then == "add" else 2):  # the counts must be ready for the next time
        few_rows.linear(x, (CB, SCB), ours, then, parts)
    few_rows.linear_torch(x, (CB, SCB), theirs, then)
    if then == "swiglu":
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    else:
        assert ((ours - theirs).abs() <= linear_bound(x, CB, SCB) + 2**-22 * theirs.abs()).all()
    return x, CB, SCB, ours


@pytest.mark.parametrize("B", [1, 5, 33])
@pytest.mark.parametrize("then", ["store", "add", "swiglu"])
@pytest.mark.parametrize("D, N", SHAPES)
def test_linear(B, D, N, then):
    """33 rows go as 32 and as a single one."""
    N -= N % 2 if then == "swiglu" else 0
    check_linear(B, D, N, then)


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("K", [32, 64])
def test_linear_with_a_scale_for_each_head(B, K):
    check_linear(B, 7 * K, 70, "add", group=K)


@pytest.mark.cuda
@pytest.mark.parametrize("B", [1, 8, 32])
@pytest.mark.parametrize("D, N, then", LARGE)
def test_linear_at_real_sizes(B, D, N, then):
    torch.backends.cuda.matmul.allow_tf32 = False
    check_linear(B, D, N, then)


@pytest.mark.parametrize("B", [1, 5])
def test_twins_can_differ(B):
    x, CB, SCB, ours = check_linear(B, 300, 90, "store")
    x[0][:, 0, 7], CB[4, 7] = 20, CB[4, 7] ^ 8
    theirs = torch.empty_like(ours)
    few_rows.linear_torch(x, (CB, SCB), theirs, "store")
    assert not ((ours - theirs).abs() <= linear_bound(x, CB, SCB))[:, 4].any()


@pytest.mark.parametrize("then", ["store", "add", "swiglu"])
@pytest.mark.parametrize("D, N", [(300, 90), LARGE[1][:2] if CUDA else (64, 6)])
def test_a_row_has_the_same_bits_in_any_company(D, N, then):
    """Alone it goes through dp4a, beside others through tensor cores; one digit off shows."""
    x, CB, SCB, ours = check_linear(17, D, N, then)
    parts, start = linear_buffers(N, ours.device), random(17, ours.shape[1])

    def product(rows):
        out = start[rows].clone()
        few_rows.linear([part[rows].contiguous() for part in x], (CB, SCB), out, then, parts)
        return out

    together = product(range(17))
    for rows in ([3], [16], [5, 3], range(9), [16] * 8 + [3]):
        assert torch.equal(product(rows), together[rows])
    x[0][3, 1, 7] += 1
    assert not torch.equal(product([3]), together[[3]])


@pytest.mark.parametrize("B, D, norm", [(1, 64, False), (3, 1300, True), (9, 2048, True)])
def test_split(B, D, norm):
    norm = norm_of(D) if norm else None
    x = random(B, D) * 30
    x[0, :130] = 0
    digits, scales = few_rows.split(x, norm)
    theirs, their_scales = few_rows.split_torch(x, norm)
    assert torch.allclose(scales, their_scales, rtol=2**-21)
    whole, their_whole = (d[:, 0].int() * 256 + d[:, 1] for d in (digits, theirs))
    assert (whole - their_whole).abs().max() <= 1  # halves, rounded the one way or the other
    off = (few_rows.joined((digits, scales)) - few_rows.normalized(x, norm)).abs()
    scales = scales.repeat_interleave(few_rows.GROUP, 1)[:, :D]
    assert (off <= scales * few_rows.DIGITS / 64_000).all()


def norm_of(D):
    return random(D, dtype=torch.float16), 50.0  # an epsilon that shows in what is 30 times random


def rotation_of(T, K):
    angles = torch.outer(torch.arange(T), 0.01 ** torch.linspace(0, 1, K // 2)).to(DEVICE)
    return torch.stack([angles.cos(), angles.sin()], -1)


def check_attend(positions, S, H, Hkv, K):
    B = len(positions)
    qkv = random(B, (H + 2 * Hkv) * K)
    caches = [random(B, S, Hkv, K, dtype=torch.float16) for _ in range(2)]
    for b, position in enumerate(positions):  # what no token has written must not be looked at
        for cache in caches:
            cache[b, position:] = torch.nan
    twins = [cache.clone() for cache in caches]
    rotation = rotation_of(S, K)
    positions = torch.tensor(positions, device=DEVICE)
    splits = attend_buffers(B, H, Hkv, K, qkv.device)
    for _ in range(2):  # the count of arrivals must be ready for the next time
        ours = few_rows.joined(attention.attend(qkv, caches, positions, rotation, splits))
    theirs = few_rows.joined(attention.attend_torch(qkv, twins, positions, rotation))
    assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()
    for cache, twin in zip(caches, twins):
        assert torch.allclose(cache, twin, rtol=2**-10, atol=1e-6, equal_nan=True)
    # One token left out of 64 shifts the mean by its share.
    if positions.min() > 0:
        wrong = few_rows.joined(attention.attend_torch(qkv, twins, positions - 1, rotation))
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


def rows(M, D, before, outliers):
    """Input of vectorwise_quant() with that many columns of large values, and a row of zeros."""
    x = random(M, 2 * D if before == "swiglu" else D)
    weight = torch.ones(D, device=DEVICE).half() / 2
    columns = torch.randperm(D)[:outliers].to(DEVICE)
    if before == "rms_norm":
        weight[columns] = 16
    else:
        x[:, columns] = (x[:, columns] * 20).copysign(x[:, columns])
    x[M // 2] = 0
    return (x if before == "rms_norm" else x.half()), weight


def check_llm_int8(M, D, N, before, outliers, then):
    (x, weight), (CB, SCB) = rows(M, D, before, outliers), matrix(D, N)
    room, their_room = (quant_buffers(M, D, x.device) for _ in range(2))
    norm = (weight, 0.1) if before == "rms_norm" else None
    CA, SCA, kept = llm_int8.vectorwise_quant(x, 6.0, room, before, norm)
    llm_int8.vectorwise_quant_torch(x, 6.0, their_room, before, norm)
    A = x if before == "nothing" else room[0]
    assert torch.allclose(A, their_room[0], rtol=2**-10, atol=1e-6)
    their_CA, their_SCA, theirs = llm_int8.vectorwise_quant_torch(A, 6.0, their_room)
    n = int(kept[1])
    assert n == theirs[1] and (outliers == 0 or n > 0)
    assert torch.equal(kept[0][:n].long(), theirs[0]) and torch.equal(SCA, their_SCA)
    off = (CA.int() - their_CA).abs()  # a quotient that is nearly half may fall to either side
    assert off.max() <= 1 and off.sum() <= 1e-3 * off.numel()
    difference = (kept[2][:, :n] - theirs[2]).float().abs()
    step = (off[:, theirs[0]] + 1e-3) * SCA[:, None] / 127
    assert (difference <= step + 2**-10 * theirs[2].abs()).all()

    ours = random(M, N) if then == "add" else poisoned(M, N, dtype=torch.float16)
    theirs = ours.double()
    start = theirs.clone()
    llm_int8.mixed_scaled_mm(CA, SCA, kept, (CB, SCB), ours, then)
    llm_int8.mixed_scaled_mm_torch(CA, SCA, kept, (CB, SCB), theirs, then)
    # Whole numbers are exact; the rest: an fp16 rounding of what a code left out, float32 sums.
    weights = (CB.double().abs() * (SCB.double() / 127)[:, None]).T
    bound = (A.double().abs() @ weights) * 2**-21 + SCA[:, None] / 254 * weights.sum(0) * 2**-11
    if then == "store":
        bound += theirs.abs() * 2**-11 + 2**-25
    assert ((ours - theirs).abs() <= bound + 2**-23 * start.nan_to_num().abs()).all()
    return A, CA, SCA, kept, CB, SCB, theirs, bound


@pytest.mark.parametrize("before", ["nothing", "rms_norm", "swiglu"])
@pytest.mark.parametrize(
    "M, D, N, outliers",
    [(1, 300, 90, 0), (5, 64, 131, 1), (130, 257, 130, 40), (4, 64, 66, 32), (3, 256, 64, 256)],
)
def test_llm_int8(M, D, N, outliers, before):
    check_llm_int8(M, D, N, before, outliers, "add" if M % 2 else "store")


@pytest.mark.cuda
@pytest.mark.parametrize("D, N, then", LARGE)
@pytest.mark.parametrize("M, outliers", [(1, 0), (77, 5), (600, 100)])
def test_llm_int8_at_real_sizes(M, D, N, then, outliers):
    before = {"store": "rms_norm", "add": "nothing", "swiglu": "swiglu"}[then]
    check_llm_int8(M, D, N, before, outliers, "add" if then == "add" else "store")


def test_llm_int8_twins_can_differ():
    A, CA, SCA, kept, CB, SCB, before, bound = check_llm_int8(5, 300, 90, "nothing", 3, "add")
    CA[4, int(kept[0][0]) - 1] += 4
    ours = torch.zeros_like(before)
    llm_int8.mixed_scaled_mm(CA, SCA, kept, (CB, SCB), ours, "add")
    theirs = torch.zeros_like(before)
    CA[4, int(kept[0][0]) - 1] -= 4
    llm_int8.mixed_scaled_mm_torch(CA, SCA, kept, (CB, SCB), theirs, "add")
    assert ((ours - theirs).abs() > bound)[4].any()


def product(x, CB, SCB):
    out = torch.zeros(len(x), len(CB), device=DEVICE)
    codes = llm_int8.vectorwise_quant(x, 6.0, quant_buffers(*x.shape, x.device))
    llm_int8.mixed_scaled_mm(*codes, (CB, SCB), out, "add")
    return out


def test_tokens_do_not_depend_on_later_ones():
    """A later outlier lengthens the list, which changes the order of float32 sums alone; kept
    apart in all rows, its column would lose its rounding error of 1 / 254 of the row's scale."""
    (x, _), weights = rows(9, 300, "nothing", 4), matrix(300, 90)
    results = []
    for value in (1, 1000):
        x[-1, 5] = value
        results.append(product(x, *weights))
    assert torch.allclose(results[0][:-1], results[1][:-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0][-1], results[1][-1], rtol=1e-1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_its_row(value):
    (x, _), (CB, SCB) = rows(9, 300, "nothing", 4), matrix(300, 90)
    x[3, 7] = value
    finite = product(x, CB, SCB).isfinite()
    assert not finite[3, SCB > 0].any() and finite[:3].all() and finite[4:].all()


@pytest.mark.cuda
@pytest.mark.parametrize("D, N, then", LARGE)
def test_error_is_at_most_that_of_bitsandbytes(D, N, then):
    """Of a prompt's product against float64, and a decode step's is at most the prompt's."""
    from llama.int8 import Int8Linear

    (x, weight), (CB, SCB) = rows(256, D, "rms_norm", 6), matrix(D, N)
    room = quant_buffers(256, D, x.device)
    codes = llm_int8.vectorwise_quant(x, 6.0, room, "rms_norm", (weight, 1e-5))
    A = room[0]
    prefill, decode = (torch.zeros(M, N, device=DEVICE) for M in (256, 8))
    llm_int8.mixed_scaled_mm(*codes, (CB, SCB), prefill, "add")
    parts = linear_buffers(N, x.device)
    few_rows.linear(few_rows.split(A[:8].float()), (CB, SCB), decode, "store", parts)
    stock = Int8Linear(D, N)
    stock.set(CB, SCB)
    exact = A.double() @ (CB.double() * (SCB.double() / 127)[:, None]).T
    errors = [
        (y - exact[: len(y)]).square().mean().sqrt() for y in (stock(A).double(), prefill, decode)
    ]
    print([f"{e / exact.std():.2e}" for e in errors])
    assert errors[1] <= errors[0] and errors[2] <= errors[1]


@pytest.mark.parametrize("T, H, Hkv, K", [(1, 2, 2, 16), (33, 4, 1, 8), (300, 40, 8, 128)])
def test_rotate(T, H, Hkv, K):
    if not CUDA and T * H > 1000:
        T, H = 17, 8
    qkv = random(T, (H + 2 * Hkv) * K, dtype=torch.float16)
    caches = [poisoned(T + 3, Hkv, K, dtype=torch.float16) for _ in range(2)]
    twins, twin_qkv = [cache.clone() for cache in caches], qkv.clone()
    rotation = rotation_of(T + 9, K)
    rotary.rotate(qkv, *caches, rotation)
    rotary.rotate_torch(twin_qkv, *twins, rotation)
    for ours, theirs in zip((qkv, *caches), (twin_qkv, *twins)):
        assert torch.allclose(ours, theirs, rtol=2**-10, atol=1e-6, equal_nan=True)


CUTS = [
    {"top_p": 0.9531},  # of V tokens that are all alike this is no whole number
    {"top_p": 1.0},
    {"top_p": 0.0},
    {"top_p": 0.5003, "temperature": 1.5},
    {"top_k": 1},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 2**31, "top_p": 1.0},
    {"min_p": 1.0},
    {"min_p": 0.02, "top_k": 9, "top_p": 0.99},
    {"temperature": 1e-30},
]


def varied(V):
    """Rows of logits: usual, peaked, flat, all alike, many of one value, one far above the rest."""
    logits = random(6, V) * torch.tensor([3, 15, 0.1, 0, 2, 1], device=DEVICE)[:, None]
    logits[4] = logits[4].round()
    logits[5, V // 2] = 1000
    return logits + 5


def check_draws(drawn, logits, uniform, settings):
    """The kernel draws what its twin in float64 draws for a uniform number and a top_p within 1e-6;
    the twin in float32 adds up V terms, which errs as much. Tokens whose logits differ by less than
    float32 tells distances of 32 nats apart may have changed places."""
    rank = logits.sort(stable=True, descending=True).indices.argsort()
    drawn = drawn[:, None]
    near = []
    for off in (-1e-6, 1e-6):
        cut = replace(settings, top_p=min(max(settings.top_p + off, 0), 1))
        u = (uniform.double() + off).clamp(0, 1 - 1e-12)
        near.append(draw(logits.double(), u, cut)[:, None])
    ranks = [rank.gather(1, tokens) for tokens in (drawn, *near)]
    values = [logits.gather(1, tokens) for tokens in (drawn, *near)]
    beside = [(values[0] - value).abs() for value in values[1:]]
    close = torch.minimum(*beside) <= 2**-19 * settings.temperature
    swapped = close & (torch.minimum(*beside) > 0)
    assert (swapped | (ranks[1] <= ranks[0]) & (ranks[0] <= ranks[2])).all()
    return int((ranks[1] == ranks[2]).sum())  # rows with a single right answer


@pytest.mark.parametrize("V", [7, 4096, 32_000, pytest.param(128_256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_draw(V, cuts):
    logits, settings, uniform = varied(V), Settings(**cuts), torch.rand(6, device=DEVICE)
    uniform[torch.randperm(6)[:2]] = torch.tensor([0, 1 - 2**-24], device=DEVICE)
    drawn = sampling.draw(logits, uniform, settings)
    assert check_draws(drawn, logits, uniform, settings) >= 2


def test_draws_can_differ():
    """A uniform number that is off by 1e-4 is seen in a flat row of 32,000 tokens."""
    logits, uniform = random(4, 32_000) / 10, torch.rand(4, device=DEVICE) * 0.99
    wrong = draw(logits, uniform + 1e-4, Settings())
    with pytest.raises(AssertionError):
        check_draws(wrong, logits, uniform, Settings())


def test_a_draw_does_not_depend_on_other_rows_nor_on_the_run():
    logits, settings, uniform = varied(9000), Settings(), torch.rand(6, device=DEVICE)
    drawn = sampling.draw(logits, uniform, settings)
    assert torch.equal(drawn, sampling.draw(logits, uniform, settings))
    for b in range(len(logits)):
        assert sampling.draw(logits[b : b + 1], uniform[b : b + 1], settings) == drawn[b]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_draws_of_rows_that_are_not_finite(value):
    logits, settings, uniform = varied(9000), Settings(top_k=3), torch.rand(6, device=DEVICE)
    before = sampling.draw(logits, uniform, settings)
    logits[1, 8999], logits[3] = value, value
    drawn = sampling.draw(logits, uniform, settings)
    bad = torch.tensor([False, True, False, True, False, False], device=DEVICE)
    assert torch.equal(drawn, before.where(~bad, NOT_FINITE))


@pytest.mark.cuda
@pytest.mark.parametrize("cuts", [{}, {"top_p": 1.0}, {"top_k": 50}, {"min_p": 0.01}], ids=str)
def test_draws_in_a_graph(cuts):
    """20,000 of them; the graph must leave all counts ready for the next time."""
    settings, B, V = Settings(**cuts), 32, 128_256
    logits = random(B, V) * torch.linspace(0.5, 8, B, device=DEVICE)[:, None]
    uniform = torch.rand(B, device=DEVICE)
    next_token(logits, None, None, uniform, settings)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = next_token(logits, None, None, uniform, settings)
    sure = 0
    for _ in range(625):
        uniform.copy_(torch.rand(B, device=DEVICE))
        graph.replay()
        sure += check_draws(drawn, logits, uniform, settings)
    assert sure >= 0.5 * 625 * B


@pytest.mark.slow
def test_kernels_compile_for_other_gpus(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = python(ROOT / "tests" / "compile_kernels.py", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
