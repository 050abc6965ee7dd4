"""Is it LLaMA? In float32 against a float64 forward that shares no code with it.

Tolerance of the equalities in float32: logits of order one, each the end of sums of 64 to 192 terms
in a row of some 15 matrices, at 6e-8 a rounding: measured 4e-6 at most, allowed five times as much.
`test_tolerance_can_fail` shows that the smallest real mistake is far outside.
"""

import copy

import oracle
import pytest
import torch
from checkpoints import random_weights, tiny_params
from torch import nn

from llama import ModelArgs, Transformer
from llama.memory import args_of
from llama.model import KVCache, RMSNorm, rotation_table

TOLERANCE = 2e-5
TOKENS = [1, 17, 30, 5, 5, 99, 2, 64, 31, 8, 77, 12, 50]
SHAPES = {
    "as LLaMA": {},
    "grouped queries": {"n_heads": 8, "n_kv_heads": 2},
    "one kv head": {"n_kv_heads": 1},
    "rope of Code Llama": {"rope_theta": 1e6, "norm_eps": 1e-6},
    "ffn of Llama 2 70B": {"ffn_dim_multiplier": 1.3, "n_layers": 3},
    "large eps": {"norm_eps": 1e-2},
    "head of 64": {"dim": 128, "n_heads": 2, "n_kv_heads": 1},
}


def float_model(params: dict, weights: dict, **limits) -> Transformer:
    vocab_size = len(weights["output.weight"])
    args = ModelArgs(**params | {"vocab_size": vocab_size}, **{"max_seq_len": 64} | limits)
    model = Transformer(args, nn.Linear).eval()
    model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=True)
    return model


def cache_of(model, batch, length=20):
    return KVCache(model.args, batch, length, torch.float32, "cpu")


def build(max_seq_len=64, **overrides):
    params = tiny_params(**overrides)
    weights = random_weights(params, dtype=torch.float32, outliers=(3,), vocab_size=100)
    return params, weights, float_model(params, weights, max_seq_len=max_seq_len)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_oracle(name):
    params, weights, model = build(**SHAPES[name])
    expected = torch.from_numpy(oracle.logits(weights, params, TOKENS))
    with torch.no_grad():
        logits = model.output(model.features(torch.tensor([TOKENS])))[0]
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("mistake", [{"rope_theta": 1.01e4}, {"norm_eps": 3e-4}], ids=str)
def test_tolerance_can_fail(mistake):
    params, weights, model = build()
    expected = torch.from_numpy(oracle.logits(weights, params | mistake, TOKENS)[-1])
    assert (model(torch.tensor([TOKENS]), 0)[0] - expected).abs().max() > 5 * TOLERANCE


def test_swapped_kv_heads_are_seen():
    params, weights, model = build(n_heads=8, n_kv_heads=2)
    for name in weights:
        if name.endswith("wk.weight"):
            weights[name] = weights[name].roll(8, 0)
    expected = torch.from_numpy(oracle.logits(weights, params, TOKENS)[-1])
    assert (model(torch.tensor([TOKENS]), 0)[0] - expected).abs().max() > 5 * TOLERANCE


@pytest.mark.parametrize("name", ["as LLaMA", "grouped queries"])
def test_cache_equals_no_cache(name):
    _, _, model = build(**SHAPES[name])
    tokens, cache = torch.tensor([TOKENS, TOKENS[::-1]]), cache_of(model, 2)
    model(tokens[:, :4], 0, cache)
    model(tokens[:, 4:9], 4, cache)
    for i in range(9, len(TOKENS)):
        cached = model(tokens[:, i : i + 1], i, cache)
    with torch.no_grad():
        expected = model.output(model.features(tokens)[:, -1])
    assert (cached - expected).abs().max() < TOLERANCE


def test_llama_3_far_into_its_context():
    """Its rope stretches what turns slowly, by 8; over 9,000 positions the slowest pair that is
    not stretched turns four times, the ones between less."""
    params, weights, model = build(
        **SHAPES["head of 64"], n_layers=1, rope_theta=5e5, use_scaled_rope=True, max_seq_len=9001
    )
    tokens = torch.randint(100, (1, 9001), generator=torch.Generator().manual_seed(0))
    sampled = [*range(0, 9001, 500), 8999, 9000]
    expected = torch.from_numpy(oracle.logits(weights, params, tokens[0].tolist())[sampled])
    cache = cache_of(model, 1, 9001)
    cuts = [*zip([0, 5000], [5000, 8990]), *((i, i + 1) for i in range(8990, 9001))]
    in_parts = [model.features(tokens[:, a:b], a, cache) for a, b in cuts]
    for features in (model.features(tokens), torch.cat(in_parts, 1)):
        with torch.no_grad():
            logits = model.output(features[0, sampled])
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_norm_is_rounded_to_fp16_before_its_gain():
    """As Meta's is; to round the product alone gives other values."""
    plain, norm, x = RMSNorm(256, 1e-5).half(), RMSNorm(256, 1e-5).half(), torch.randn(256).half()
    nn.init.uniform_(norm.weight)
    assert torch.equal(norm(x), plain(x) * norm.weight)


@pytest.mark.parametrize("size, factor", [("1B", 32), ("3B", 32), ("8B", 8), ("70B", 8), ("7B", 1)])
def test_rotation_of_the_published_models(size, factor):
    args = args_of(size, max_seq_len=131072)
    table, K = rotation_table(args, "cpu"), args.head_dim
    angles = [131071 * oracle.frequency(i, K, vars(args)) for i in range(K // 2)]
    expected = torch.tensor(angles, dtype=torch.float64)
    assert (table[-1, :, 0] - expected.cos()).abs().max() < 1e-6
    assert (table[-1, :, 1] - expected.sin()).abs().max() < 1e-6
    plain = [oracle.frequency(i, K, vars(args) | {"use_scaled_rope": False}) for i in range(K // 2)]
    assert angles[-1] == pytest.approx(131071 * plain[-1] / factor)


def test_own_positions_in_one_batch_equal_one_by_one():
    _, _, model = build()
    prompts = [TOKENS[:9], TOKENS[:3], TOKENS[:6]]
    cache = cache_of(model, 3)
    for row, prompt in enumerate(prompts):
        model(torch.tensor([prompt]), 0, cache.slot(row, len(prompt)))
    together = model(torch.tensor([[40], [41], [42]]), torch.tensor([9, 3, 6]), cache)
    for row, prompt in enumerate(prompts):
        alone = model(torch.tensor([[*prompt, 40 + row]]), 0)
        assert (together[row] - alone[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("start_pos", [5, torch.tensor([5])])
def test_nothing_to_continue_is_an_error(start_pos):
    _, _, model = build()
    with pytest.raises(ValueError, match="without a cache: pass the KVCache that holds what came"):
        model(torch.tensor([TOKENS]), start_pos)


def test_usable_as_soon_as_built():
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=100, multiple_of=32)
    for model in (Transformer(args), Transformer(args, nn.Linear)):
        logits = model(torch.tensor([[1, 2, 3]]), 0)
        assert logits.shape == (1, 100) and logits.dtype == torch.float32
        assert logits.isfinite().all()


def test_moving_a_model_before_its_first_call_changes_nothing():
    torch.manual_seed(0)
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=100, multiple_of=32)
    model = Transformer(args)
    expected = copy.deepcopy(model)(torch.tensor([[1, 2, 3]]), 0)
    assert torch.equal(model.to("cpu")(torch.tensor([[1, 2, 3]]), 0), expected)


@pytest.mark.parametrize(
    "shape, hidden",
    [
        ({}, 11008),
        ({"dim": 5120}, 13824),
        ({"dim": 6656}, 17920),
        ({"dim": 8192}, 22016),
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
        ({"dim": 4096, "ffn_dim_multiplier": 1.0}, 11008),
        ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
        ({"dim": 2048, "ffn_dim_multiplier": 1.5}, 8192),
        ({"dim": 3072, "ffn_dim_multiplier": 1.0}, 8192),
        ({"dim": 64, "multiple_of": 1, "ffn_dim_multiplier": 2.0}, 340),  # nobody's: 2 * int(170.7)
    ],
    ids=str,
)
def test_ffn_sizes_of_the_published_models(shape, hidden):
    assert ModelArgs(**shape).hidden_dim == hidden


def test_defaults_are_those_of_7b():
    args = ModelArgs()
    assert (args.dim, args.n_layers, args.n_heads, args.norm_eps) == (4096, 32, 32, 1e-5)
    assert (args.max_batch_size, args.max_seq_len) == (32, 512)


def test_cache_takes_what_it_is_asked_for():
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100)
    cache = KVCache(args, 3, 10, torch.half, "meta")
    assert cache.k.shape == cache.v.shape == (2, 3, 10, 2, 16)
