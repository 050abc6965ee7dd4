"""Are the 8 bits bitsandbytes' own, and is the product what they stand for?"""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from llama import ModelArgs, Transformer
from llama.int8 import Int8Linear, check_saved, quantize


def matrix(rows=150, columns=96, dtype=torch.float16):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    w[5] = 0
    w[7, 3] = 60000
    w[9] *= 1e-7  # fp16 denormals
    w[11] = 0.125
    w[13] = 2**-24  # the smallest
    w[15] = -65024  # the largest that bfloat16 has too
    return w


def ours(w):
    CB, SCB = torch.empty(w.shape, dtype=torch.int8), torch.empty(len(w))
    values = w.half().float()
    quantize(values, CB, SCB)
    assert torch.equal(values, CB.float())  # NaN, as of 0 / 0, would become some code
    return CB, SCB


def theirs(w):
    parameter = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    return parameter.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_codes_equal_bitsandbytes(dtype):
    w = matrix(dtype=dtype)
    CB, SCB = ours(w)
    assert torch.equal(SCB, theirs(w).SCB)
    nonzero = SCB > 0  # 0 / 0 is what bitsandbytes' host path rounds in a row of zeros
    assert torch.equal(CB[nonzero], theirs(w).CB[nonzero])
    assert (CB[5] == 0).all() and SCB[5] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0], ids=str)
def test_values_that_fp16_does_not_hold_are_refused(value):
    w = matrix(dtype=torch.float32)
    w[3, 3] = value
    with pytest.raises(ValueError, match="not finite in fp16"):
        ours(w)


def test_what_quantize_may_make_is_accepted():
    check_saved(torch.tensor([0, 65504.0]))
    check_saved(torch.tensor([-127, 127], dtype=torch.int8))
    check_saved(torch.tensor([3, 3], dtype=torch.int8))


def test_product_is_that_of_the_dequantized_matrix():
    layer = Int8Linear(96, 150)
    CB, SCB = ours(matrix())
    layer.set(CB, SCB)
    x = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(2))
    exact = x.double() @ (CB.double() * SCB.double()[:, None] / 127).T
    # Products of 96 terms, one float32 rounding each, relative to the sum of their magnitudes.
    magnitude = x.double().abs() @ (CB.double().abs() * SCB.double()[:, None] / 127).T
    assert ((layer(x) - exact).abs() <= 96 * 2**-24 * magnitude + 1e-30).all()


def test_every_linear_layer_is_a_linear8bitlt():
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=100, multiple_of=32)
    linears = [m for m in Transformer(args).modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2 * 7 + 1
    for layer in linears:
        assert isinstance(layer, bnb.nn.Linear8bitLt)
        assert layer.state.threshold == 6.0 and not layer.state.has_fp16_weights


def test_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias is True"):
        Int8Linear(96, 150, bias=True)


def test_state_dict_has_bitsandbytes_names_and_types_even_in_another_type():
    model = nn.Sequential(Int8Linear(96, 150))
    model[0].set(*ours(matrix()))
    for _ in range(2):
        state = model[0].state_dict()
        assert set(state) == {"weight", "SCB", "weight_format"}
        assert state["weight"].dtype == model[0].state.CB.dtype == torch.int8
        assert not model[0].weight.has_fp16_weights and not model[0].weight.requires_grad
        assert state["SCB"].dtype == model[0].state.SCB.dtype == torch.float32
        model.half()
    model[0].set(model[0].state.CB.to("meta"), model[0].state.SCB)  # codes that went ahead
    assert model.half()[0].state.SCB.is_meta


@pytest.mark.cuda
def test_layer_follows_its_model_to_the_gpu_and_multiplies_as_bitsandbytes():
    w = matrix(160, 96)
    w[7, 3] = 1
    model = nn.Sequential(Int8Linear(96, 160))
    model[0].set(*ours(w))
    model.cuda()
    stock = bnb.nn.Linear8bitLt(96, 160, bias=False, has_fp16_weights=False, threshold=6.0)
    stock.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    stock.cuda().eval()
    x = torch.randn(5, 96, device="cuda").half()
    x[2, 7] = 9
    assert model[0].state.CB.is_cuda and model[0].state.SCB.is_cuda
    assert torch.equal(model(x), stock(x))
