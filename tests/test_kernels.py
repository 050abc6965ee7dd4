"""Does each kernel compute what its torch twin says? In Triton's interpreter where there is no GPU.

A kernel differs from its twin in the order of float32 sums and in where it rounds to fp16. Sums of
D terms: a relative error of at most D 2^-24 of the sum of magnitudes; results stored in fp16: one
rounding more, 2^-11 of the value. `test_twins_can_differ` shows that one wrong code is outside.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, python

pytest.importorskip("triton", reason="needs triton")
from llama import Settings  # noqa: E402
from llama.buffers import (  # noqa: E402
    LIST_COLUMNS,
    LIST_ROWS,
    TILE_ROWS,
    attend_buffers,
    quant_buffers,
    quant_lists,
)
from llama.kernels import (
    attention,
    few_rows,
    llm_int8,
    lookup,
    prefill_attention,
    rotary,
    sampling,
)  # noqa: E402
from llama.lookup import NGRAM, guess  # noqa: E402
from llama.sampling import NOT_FINITE, draw, next_token  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Inputs, outputs: in the interpreter few and odd, and once a whole group in each quarter; of 7B to
# 65B on a GPU.
SHAPES = [(300, 35), (64, 2), (1156, 7), (512, 5)]
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
    few_rows.linear(x, (CB, SCB), ours, then)
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
    check_linear(B, 7 * K, 20, "add", group=K)


@pytest.mark.cuda
@pytest.mark.parametrize("B", [1, 8, 32])
@pytest.mark.parametrize("D, N, then", LARGE)
def test_linear_at_real_sizes(B, D, N, then):
    torch.backends.cuda.matmul.allow_tf32 = False
    check_linear(B, D, N, then)


@pytest.mark.parametrize("B", [1, 5])
def test_twins_can_differ(B):
    x, CB, SCB, ours = check_linear(B, 300, 35, "store")
    x[0][:, 0, 7], CB[4, 7] = 20, CB[4, 7] ^ 8
    theirs = torch.empty_like(ours)
    few_rows.linear_torch(x, (CB, SCB), theirs, "store")
    assert not ((ours - theirs).abs() <= linear_bound(x, CB, SCB))[:, 4].any()


@pytest.mark.parametrize("then", ["store", "add", "swiglu"])
@pytest.mark.parametrize("D, N", [(300, 34), LARGE[1][:2] if CUDA else (64, 6)])
def test_a_row_has_the_same_bits_in_any_company(D, N, then):
    """Alone it goes through dp4a, beside others through tensor cores; one digit off shows."""
    x, CB, SCB, ours = check_linear(17, D, N, then)
    start = random(17, ours.shape[1])

    def product(rows):
        out = start[rows].clone()
        few_rows.linear([part[rows].contiguous() for part in x], (CB, SCB), out, then)
        return out

    together = product(range(17))
    for rows in ([3], [16], [5, 3], range(9), [16] * 8 + [3]):
        assert torch.equal(product(rows), together[rows])
    x[0][3, 1, 7] += 1
    assert not torch.equal(product([3]), together[[3]])


def check_heads(x, weights, slots, S, H, Hkv, K, rows=slice(None)):
    """Queries (B, H K) and caches; positions are the rows' numbers."""
    x = [part[rows].contiguous() for part in x]
    B = len(x[0])
    positions = torch.arange(17, device=DEVICE)[rows] % S
    ours, theirs = (torch.full((B, H * K), torch.nan, device=DEVICE).half() for _ in range(2))
    caches = [torch.zeros(slots, S, Hkv, K, device=DEVICE).half() for _ in range(2)]
    twins = [cache.clone() for cache in caches]
    angles = rotation_of(S, K)[positions]
    few_rows.linear(x, weights, ours, "rotate", (caches, positions, angles))
    few_rows.linear_torch(x, weights, theirs, "rotate", (twins, positions, angles))
    for mine, other in zip((ours, *caches), (theirs, *twins)):
        assert torch.allclose(mine, other, rtol=2**-10, atol=2e-3)
        assert other.count_nonzero() >= other[0].numel() // S / 2
    return ours, *caches


@pytest.mark.parametrize("H, Hkv, K", [(2, 2, 16), (4, 1, 16), (1, 1, 64)])
def test_queries_and_keys_are_rotated_and_stored(H, Hkv, K):
    """The same bits whether a row is alone, has a slot of its own or shares one. A head is more
    than a program's outputs, or less."""
    D, S = 128, 20
    x, weights = few_rows.split_torch(random(17, D)), matrix(D, (H + 2 * Hkv) * K)
    q, keys, values = check_heads(x, weights, 17, S, H, Hkv, K)
    for rows in ([3], [16]):
        own_q, own_keys, own_values = check_heads(x, weights, 1, S, H, Hkv, K, rows)
        assert torch.equal(own_q[0], q[rows[0]])
        assert torch.equal(own_keys[0, rows], keys[rows, rows])
        assert torch.equal(own_values[0, rows], values[rows, rows])
    shared_q, shared_keys, _ = check_heads(x, weights, 2, S, H, Hkv, K, range(16))
    assert torch.equal(shared_q, q[:16])
    assert torch.equal(shared_keys[0, :8], keys[range(8), range(8)])
    assert torch.equal(shared_keys[1, 8:16], keys[range(8, 16), range(8, 16)])


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


def check_attend(positions, S, H, Hkv, K, slots=None):
    B = len(positions)
    q = (random(B, H * K) * K**-0.5).half()
    caches = [random(slots or B, S, Hkv, K, dtype=torch.float16) for _ in range(2)]
    positions = torch.tensor(positions, device=DEVICE)
    for slot, last in enumerate(positions.view(slots or B, -1).amax(1)):
        for cache in caches:  # what no token has written must not be looked at
            cache[slot, last + 1 :] = torch.nan
    splits = attend_buffers(B, H, Hkv, K, q.device)
    for _ in range(2):  # the count of arrivals must be ready for the next time
        ours = few_rows.joined(attention.attend(q, caches, positions, splits))
    theirs = few_rows.joined(attention.attend_torch(q, caches, positions))
    assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()
    # One token left out of 64 shifts the mean by its share.
    if positions.min() > 0:
        wrong = few_rows.joined(attention.attend_torch(q, caches, positions - 1))
        assert (wrong - theirs).abs().max() > 4e-3 * theirs.abs().max()
    return ours


@pytest.mark.parametrize(
    "positions, S", [([0], 1), ([5], 9), ([63, 64, 1, 0], 65), ([190, 128, 127], 200)]
)
@pytest.mark.parametrize("H, Hkv", [(2, 2), (4, 1)])
def test_attend(positions, S, H, Hkv):
    check_attend(positions, S, H, Hkv, 16)


def test_rows_of_one_slot_attend_each_to_what_is_before_it():
    check_attend([5, 6, 7, 70], 80, 4, 2, 16, slots=1)


def test_a_row_attends_alike_whatever_runs_beside_it(monkeypatch):
    """In splits of 64 tokens, by three programs for each key head, or by one that does all."""
    monkeypatch.setattr(attention, "LEAST", 1)
    results = []
    for programs in (1024, 1):
        torch.manual_seed(0)
        monkeypatch.setattr(attention, "PROGRAMS", programs)
        results.append(check_attend([190, 128, 127], 200, 4, 1, 16))
    assert torch.equal(*results)


def check_attend_to_each(starts, each, S, H, Hkv, K):
    """`each` tokens of a sequence at once have the bits of as many steps."""
    B = len(starts)
    q = (random(B, each, H * K) * K**-0.5).half()
    caches = [random(B, S, Hkv, K, dtype=torch.float16) for _ in range(2)]
    splits = attend_buffers(B * each, H, Hkv, K, q.device)
    positions = torch.tensor(starts, device=DEVICE)[:, None] + torch.arange(each, device=DEVICE)
    whole = attention.attend(q.flatten(0, 1), caches, positions.flatten(), splits)
    for i in range(each):
        step = attention.attend(q[:, i].contiguous(), caches, positions[:, i].contiguous(), splits)
        for ours, alone in zip(whole, step):
            assert torch.equal(ours.unflatten(0, (B, each))[:, i], alone)


@pytest.mark.parametrize("starts, each", [([5], 8), ([60, 127, 0], 3)])
@pytest.mark.parametrize("H, Hkv", [(2, 2), (4, 1)])
def test_several_tokens_of_a_sequence_attend_as_one_by_one(starts, each, H, Hkv, monkeypatch):
    monkeypatch.setattr(attention, "LEAST", 1)  # over the end of a block, and of a split
    check_attend_to_each(starts, each, 140, H, Hkv, 16)


@pytest.mark.cuda
@pytest.mark.parametrize("H, Hkv", [(40, 40), (64, 8)])
@pytest.mark.parametrize("B, each", [(1, 8), (4, 8), (16, 2)])
def test_several_tokens_attend_as_one_by_one_at_real_sizes(H, Hkv, B, each):
    """In one split and in several, over the end of a block."""
    starts = [[17, 509, 1020, 2000, 60][b % 5] + b for b in range(B)]
    check_attend_to_each(starts, each, 2048, H, Hkv, 128)


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
        x[:, columns] = x[:, columns].abs() * 20 + 10
        x[:, -D:][:, columns] += x[:, -D:][:, columns].sign()
    x[M // 2] = 0
    return (x if before == "rms_norm" else x.half()), weight


def whole(A):
    """The whole numbers (M, D) of rows that vectorwise_quant() returned."""
    digits, _, used, _ = A
    there = torch.arange(3, device=DEVICE)[None, :, None] < used[:, None, None]
    low, middle, top = (digits.int() * there).unbind(1)
    return 65536 * top + 256 * middle + low


def one_call(M, D):
    """What vectorwise_quant() is given once."""
    return *quant_buffers(M, D, DEVICE), quant_lists((), M, D, DEVICE)


def groups_of(large):
    """Those that list a large entry of any row."""
    groups = F.pad(large.any(0), (0, -large.shape[1] % LIST_COLUMNS)).view(-1, LIST_COLUMNS)
    return {*groups.any(1).nonzero()[:, 0].tolist()}


def check_llm_int8(M, D, N, before, outliers, then):
    (x, weight), (CB, SCB) = rows(M, D, before, outliers), matrix(D, N)
    norm = (weight, 0.1) if before == "rms_norm" else None
    A = llm_int8.vectorwise_quant(x, one_call(M, D), before, norm)
    values, steps = llm_int8.vectorwise_quant_torch(x, None, before, norm)
    _, step, _, lists = A
    # A quotient that is nearly half may fall to either side. What comes before has sums in another
    # order, too, which shows where a value is next to another float16.
    near, few = {"nothing": (2**-20, 1e-3), "rms_norm": (2**-10, 5e-3), "swiglu": (2**-10, 2e-2)}[
        before
    ]
    assert torch.allclose(step, steps, rtol=near)
    ours = whole(A)
    off = (ours - values).abs()
    assert (off <= 1 + values.abs() * 2 * near).all()
    small = values.abs() <= 127
    assert off[small].gt(0).sum() <= max(1, few * off.numel())
    magnitude = ours.abs() * step[:, None]
    groups = -(-D // LIST_COLUMNS)
    for (n, _, *own), rounded, by in zip(
        lists.tolist(), magnitude.split(LIST_ROWS), step.split(LIST_ROWS)
    ):
        own = {*own[groups : groups + n]}
        surely, perhaps = (groups_of(rounded >= 6 + off * by[:, None]) for off in (1, -1))
        assert len(own) == n and surely <= own <= perhaps and (n > 0) == bool(outliers)
    small = magnitude < 6 - step[:, None]
    assert ours[small].abs().max() <= 127 and (ours[~small].abs() > 127).any() == bool(outliers)

    out = random(M, N) if then == "add" else poisoned(M, N, dtype=torch.float16)
    theirs = out.double()
    start = theirs.clone()
    llm_int8.mixed_scaled_mm(A, (CB, SCB), out, then)
    llm_int8.mixed_scaled_mm_torch((ours, step), (CB, SCB), theirs, then)
    # Whole numbers are exact: three roundings of float32, and that of the sum or of fp16.
    bound = (theirs - (start if then == "add" else 0)).abs() * 4 * 2**-24
    bound += theirs.abs() * 2**-24 if then == "add" else theirs.abs() * 2**-11 + 2**-25
    assert ((out - theirs).abs() <= bound).all()
    return (ours, step), (CB, SCB), out, theirs, bound


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
    """One step off is outside the bound, of what is small and of what is kept."""
    (ours, step), weights, out, theirs, bound = check_llm_int8(5, 300, 90, "nothing", 3, "store")
    assert ((out - theirs).abs() <= bound).all()
    for column in (ours[3].abs().argmax(), ours[3].abs().argmin()):
        ours[3, column] += 1
        llm_int8.mixed_scaled_mm_torch((ours, step), weights, theirs, "store")
        assert ((out - theirs).abs() > bound)[3].any()
        ours[3, column] -= 1


def product(x, weights, order=slice(None), before="nothing", norm=None, spoil=lambda A: None):
    x = x[order].contiguous()
    out = torch.zeros(len(x), len(weights[0]), device=DEVICE)
    A = llm_int8.vectorwise_quant(x, one_call(len(x), weights[0].shape[1]), before, norm)
    spoil(A)
    llm_int8.mixed_scaled_mm(A, weights, out, "add")
    return out


@pytest.mark.parametrize("before", ["nothing", "rms_norm", "swiglu"])
def test_a_row_of_a_prompt_has_the_same_bits_in_any_company(before):
    """At other places of other tiles, with large entries in other columns of each row and none in
    one of them. Had all rows one step, it would show."""
    D, M = 300, 17
    (x, weight), weights = rows(M, D, before, 0), matrix(D, 70)
    for m in range(M - 1):  # 1 to 31 columns
        x[m, torch.randperm(D)[: 1 + m * 2]] = 40.0 + m
    x[M // 2] = random(x.shape[1])
    norm = (4 * weight, 0.1) if before == "rms_norm" else None
    together = product(x, weights, slice(None), before, norm)
    orders = [[3], [5, 3], [16], torch.randperm(M)]
    if CUDA or before == "nothing":
        orders.append(torch.arange(150) % M)  # more than a tile
    for order in orders:
        assert torch.equal(product(x, weights, order, before, norm), together[order])

    def same_step(A):
        A[1].fill_(A[1].sum())

    for order in ([3], [5, 3]):
        spoilt = product(x, weights, order, before, norm, same_step)
        assert torch.equal(spoilt[-1:], together[[3]]) == (order == [3])


def test_each_block_has_its_own_list_and_each_row_its_own_digits():
    """Large entries in one column of the first 128 rows, in another of the next; one row has three
    digits, the others two, whose third is undefined."""
    M, D = 140, 96
    x, weights = random(M, D).clamp(-4, 4).half(), matrix(D, 40)
    x[:128, 3], x[128:, 70], x[5, 3] = 20, 20, 6e4
    digits, *rest = one_call(M, D)
    A = llm_int8.vectorwise_quant(x, (digits.fill_(77), *rest))
    assert A[2].tolist() == [3 if m == 5 else 2 for m in range(M)]
    out, theirs = (
        torch.zeros(M, 40, device=DEVICE, dtype=t) for t in (torch.float32, torch.double)
    )
    llm_int8.mixed_scaled_mm(A, weights, out, "store")
    llm_int8.mixed_scaled_mm_torch((whole(A), A[1]), weights, theirs, "store")
    assert torch.allclose(out.double(), theirs, rtol=2**-20, atol=1e-6)


@pytest.mark.parametrize("value", [1e4, 6e4])
def test_sums_of_what_is_kept_fit_in_int32(value):
    """900 entries of one sign times the largest code: of 15 bits each, they would not."""
    D = 1000
    x = torch.full((2, D), value, device=DEVICE).half()
    x[:, :100] = random(2, 100).clamp(-4, 4).half() * torch.tensor([[1], [0]], device=DEVICE)
    CB = torch.full((3, D), 127, dtype=torch.int8, device=DEVICE)
    CB[1] = -127
    SCB = torch.ones(3, device=DEVICE)
    exact = x.double() @ CB.double().T / 127
    assert torch.allclose(product(x, (CB, SCB)).double(), exact, rtol=2**-13)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_its_row(value):
    (x, _), (CB, SCB) = rows(9, 300, "nothing", 4), matrix(300, 90)
    x[3, 7] = value
    finite = product(x, (CB, SCB)).isfinite()
    assert not finite[3, SCB > 0].any() and finite[:3].all() and finite[4:].all()


@pytest.mark.cuda
@pytest.mark.parametrize("D, N, then", LARGE)
def test_error_is_at_most_that_of_bitsandbytes(D, N, then):
    """Of a prompt's product against float64, and a decode step's is at most the prompt's. In up to
    6 of D columns bitsandbytes rounds nothing to int8: 6 / D of the squares."""
    from llama.int8 import Int8Linear

    (x, weight), (CB, SCB) = rows(256, D, "rms_norm", 6), matrix(D, N)
    codes = llm_int8.vectorwise_quant(x, one_call(256, D), "rms_norm", (weight, 1e-5))
    A = llm_int8.normalized(x, (weight, 1e-5)).half()
    prefill, decode = (torch.zeros(M, N, device=DEVICE) for M in (256, 8))
    llm_int8.mixed_scaled_mm(codes, (CB, SCB), prefill, "add")
    few_rows.linear(few_rows.split(A[:8].float()), (CB, SCB), decode, "store")
    stock = Int8Linear(D, N)
    stock.set(CB, SCB)
    exact = A.double() @ (CB.double() * (SCB.double() / 127)[:, None]).T
    errors = [
        (y - exact[: len(y)]).square().mean().sqrt() for y in (stock(A).double(), prefill, decode)
    ]
    print([f"{e / exact.std():.2e}" for e in errors])
    assert errors[1] <= errors[0] * (1 + 6 / D) and errors[2] <= errors[1]


@pytest.mark.parametrize(
    "spans, H, Hkv, K",
    [
        ([(0, 0, 1)], 2, 2, 16),
        ([(2, 3, 20), (0, 0, 13)], 4, 1, 8),
        ([(1, 0, 300), (3, 9, 1)], 40, 8, 128),
    ],
)
def test_rotate(spans, H, Hkv, K):
    """Tokens without a place are not touched."""
    H = H if CUDA else min(H, 8)
    there, S = sum(count for *_, count in spans), 309
    T = there + 5
    qkv = random(T, (H + 2 * Hkv) * K, dtype=torch.float16)
    caches = [poisoned(4, S, Hkv, K, dtype=torch.float16) for _ in range(2)]
    twins, twin_qkv, before = [cache.clone() for cache in caches], qkv.clone(), qkv.clone()
    rotation, places = rotation_of(S, K), rotary.places_of(spans, S, T).to(DEVICE)
    tokens, first = torch.arange(T, device=DEVICE) % 2, [random(Hkv, K).half() for _ in range(2)]
    rotary.rotate(qkv, caches, places, rotation, tokens, 0, first)
    rotary.rotate_torch(twin_qkv, twins, places, rotation, tokens, 0, first)
    for ours, theirs in zip((qkv, *caches), (twin_qkv, *twins)):
        assert torch.allclose(ours, theirs, rtol=2**-10, atol=1e-6, equal_nan=True)
    assert torch.equal(qkv[there:], before[there:])
    [first, *_] = spans
    where = caches[0][first[0], first[1] : first[1] + first[2]]
    stored = there * Hkv * K
    assert where.isfinite().all() and caches[0].isnan().sum() == caches[0].numel() - stored


def tiles_of(spans):
    """As many as there are at most, the last of them empty."""
    most = sum(1 + count // TILE_ROWS for *_, count in spans)
    return prefill_attention.tiles_of(spans, most + 1).to(DEVICE)


def check_prefill_attention(spans, S, H, Hkv, K):
    T = sum(count for *_, count in spans)
    qkv = random(T, (H + 2 * Hkv) * K, dtype=torch.float16) * 2
    caches = [random(1 + max(spans)[0], S, Hkv, K, dtype=torch.float16) for _ in range(2)]
    for slot, start, count in spans:  # what no token has written must not be looked at
        for cache in caches:
            cache[slot, start + count :] = torch.nan
    ours, theirs = (poisoned(T, H * K, dtype=torch.float16) for _ in range(2))
    tiles = tiles_of(spans)
    prefill_attention.attend(qkv, caches, tiles, ours)
    prefill_attention.attend_torch(qkv, caches, tiles, theirs)
    # The weights of the values are rounded to fp16, by at most 2^-11 each, and so are both results.
    most = caches[1].nan_to_num().abs().max()
    assert ((ours - theirs).abs() <= 2**-11 * (2 * theirs.abs() + most)).all()
    return qkv, caches, ours, theirs


@pytest.mark.parametrize("H, Hkv, K", [(2, 2, 16), (4, 1, 32)])
def test_prefill_attention(H, Hkv, K):
    spans = [(2, 0, 65), (0, 127, 2), (3, 0, 1), (1, 60, 70)]
    qkv, caches, ours, theirs = check_prefill_attention(spans, 140, H, Hkv, K)
    [(*_, n), *_] = spans
    # One key more, or another instead, takes most rows outside the bound.
    off = poisoned(*ours.shape, dtype=torch.float16)
    one = [(2, 1, n), (0, 126, 2), (3, 1, 1), (1, 59, 70)]
    finite = [cache.nan_to_num() for cache in caches]
    prefill_attention.attend_torch(qkv, finite, tiles_of(one), off)
    assert (off - theirs).abs().amax(1).median() > 2**-10 * caches[1].nan_to_num().abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("H, Hkv, K", [(40, 40, 128), (32, 8, 64)])
def test_prefill_attention_at_real_sizes(H, Hkv, K):
    check_prefill_attention(
        [(3, 0, 1900), (0, 512, 700), (1, 0, 8), (2, 1000, 129)], 2048, H, Hkv, K
    )


@pytest.mark.parametrize("H, Hkv, K", [(40, 8, 128), (8, 8, 64)] if CUDA else [(2, 1, 16)])
def test_prefill_attention_has_the_same_bits_however_rows_are_cut(H, Hkv, K):
    """A key that changes in its last bit shows."""
    T, S = 140, 200
    qkv = random(T, (H + 2 * Hkv) * K, dtype=torch.float16)
    caches = [random(2, S, Hkv, K, dtype=torch.float16) for _ in range(2)]

    def attended(spans, rows):
        out = poisoned(len(rows), H * K, dtype=torch.float16)
        prefill_attention.attend(qkv[rows].contiguous(), caches, tiles_of(spans), out)
        return out

    whole = attended([(1, 5, T)], range(T))
    for cut in (1, 59, 64, 100):
        rows = [*range(cut, T), *range(cut)]
        parts = attended([(1, 5 + cut, T - cut), (1, 5, cut)], rows)
        assert torch.equal(parts, whole[rows])
    small = [range(i, min(i + 33, T)) for i in range(0, T, 33)]
    assert torch.equal(torch.cat([attended([(1, 5 + r[0], len(r))], r) for r in small]), whole)
    caches[1][1, 7] *= 1 + 2**-10
    assert not torch.equal(attended([(1, 5, T)], range(T))[2:], whole[2:])


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


# Tokens: in the interpreter with small blocks, so that a few hundred take several programs.
SOME = 9000 if CUDA else 500
VOCABULARIES = [7, SOME, pytest.param(32_000, marks=pytest.mark.cuda)]
VOCABULARIES += [pytest.param(128_256, marks=pytest.mark.slow)]


@pytest.fixture
def small_blocks(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(sampling, "BLOCK", 256)
        monkeypatch.setattr(sampling, "FOUND_BLOCK", 64)


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


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_draw(V, cuts, request):
    if V == SOME:
        request.getfixturevalue("small_blocks")
    logits, settings, uniform = varied(V), Settings(**cuts), torch.rand(6, device=DEVICE)
    uniform[torch.randperm(6)[:2]] = torch.tensor([0, 1 - 2**-24], device=DEVICE)
    drawn = sampling.draw(logits, uniform, settings)
    assert check_draws(drawn, logits, uniform, settings) >= 2


def test_a_total_that_float64_rounds_up():
    """Above 2^53: 2,099 tokens of one logit, and one whose mass makes the total odd."""
    logits = torch.zeros(1, 2100, device=DEVICE)
    logits[0, -1] = -15.1
    settings = Settings(temperature=1, top_p=1, min_p=1e-8)
    uniform = torch.full((1,), 0.5, device=DEVICE)
    assert sampling.draw(logits, uniform, settings) == draw(logits.double(), uniform, settings)


def test_draws_can_differ():
    """A uniform number that is off by 1e-4 is seen in a flat row of 32,000 tokens."""
    logits, uniform = random(4, 32_000) / 10, torch.rand(4, device=DEVICE) * 0.99
    wrong = draw(logits, uniform + 1e-4, Settings())
    with pytest.raises(AssertionError):
        check_draws(wrong, logits, uniform, Settings())


def test_a_draw_does_not_depend_on_other_rows_nor_on_the_run(small_blocks):
    logits, settings, uniform = varied(SOME), Settings(), torch.rand(6, device=DEVICE)
    drawn = sampling.draw(logits, uniform, settings)
    assert torch.equal(drawn, sampling.draw(logits, uniform, settings))
    for b in range(len(logits)):
        assert sampling.draw(logits[b : b + 1], uniform[b : b + 1], settings) == drawn[b]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_draws_of_rows_that_are_not_finite(value, small_blocks):
    logits, settings, uniform = varied(SOME), Settings(top_k=3), torch.rand(6, device=DEVICE)
    before = sampling.draw(logits, uniform, settings)
    logits[1, -1], logits[3] = value, value
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


@pytest.mark.parametrize("count", [1, 7])
def test_guesses(count, monkeypatch):
    monkeypatch.setattr(lookup, "BLOCK", 16)
    tokens = torch.randint(3, (40, 50 + count), device=DEVICE)
    tokens[20:] = torch.randint(40, (20, 50 + count), device=DEVICE)  # which seldom repeat
    lengths = torch.randint(1, 51, (40,), device=DEVICE)
    lengths[:4] = torch.arange(1, 5, device=DEVICE)
    ours, theirs = tokens.clone(), tokens.cpu()
    found = lookup.guess(ours, lengths, count, NGRAM)
    assert torch.equal(found.cpu(), guess(theirs, lengths.cpu(), count))
    assert torch.equal(ours.cpu(), theirs) and 5 < found.sum() < 35


@pytest.mark.slow
def test_kernels_compile_for_other_gpus(tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = python(ROOT / "tests" / "compile_kernels.py", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
