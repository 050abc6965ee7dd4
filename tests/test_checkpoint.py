"""Do the files become the right model, whatever the number of shards?"""

import hashlib
import itertools
import json
import warnings
from collections import defaultdict
from contextlib import closing

import oracle
import pytest
import torch
from checkpoints import tiny_params, write_checkpoint
from conftest import vocab_size

from llama import LLaMA, ModelArgs, Transformer, checkpoint, quantize, room
from llama.shards import open_shards

TOKENS = [1, 17, 30, 5, 5, 99, 2, 64, 31, 8, 77, 12, 50]


def logits(folder, **options):
    llm = LLaMA.build(folder, device="cpu", max_seq_len=64, **options)
    return llm.model(torch.tensor([TOKENS]), 0)[0]


@pytest.mark.parametrize("n_shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_float_load_equals_the_oracle(make_folder, n_shards, dtype):
    folder, params, weights = make_folder(n_shards, dtype)
    expected = torch.from_numpy(oracle.logits(weights, params, TOKENS)[-1])
    # 2e-5: see test_model.py.
    assert (logits(folder, use_int8=False) - expected).abs().max() < 2e-5


def test_int8_is_bit_for_bit_the_same_from_1_2_and_4_shards(make_folder):
    folders = [make_folder(n, outliers=(3,), name=f"mp{n}")[0] for n in (1, 2, 4)]
    one, two, four = map(logits, folders)
    assert torch.equal(one, two) and torch.equal(one, four)


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("values, use_int8", [(640, True), (640, False), (100, True)])
def test_matrices_come_in_blocks_of_so_many_values(
    make_folder, monkeypatch, values, use_int8, n_shards
):
    """Of one row at least; each block into its rows."""
    folder, _, _ = make_folder(n_shards, outliers=(3,))
    whole = logits(folder, use_int8=use_int8)
    fill, blocks = checkpoint.fill_block, defaultdict(list)

    def watched(buffers, name, block, targets):
        blocks[name].append(len(targets[0]))
        assert all(len(target) == len(targets[0]) for target in targets)
        fill(buffers, name, block, targets)

    monkeypatch.setattr(checkpoint, "fill_block", watched)
    monkeypatch.setattr(checkpoint, "VALUES_A_BLOCK", values)
    monkeypatch.setattr(checkpoint, "BYTES_A_BLOCK", 2 * values)  # of fp16
    assert torch.equal(logits(folder, use_int8=use_int8), whole)
    names = "attention.wq", "attention.wo", "feed_forward.w2", "attention_norm"
    for name, width, rows in zip(names, (64, 64, 192, 1), (64 // n_shards, 64, 64, 64)):
        most = min(max(1, values // width), rows)
        found = blocks[f"layers.1.{name}.weight"]
        last = [rows % most] if rows % most else []
        assert sorted(found) == sorted([*[most] * (rows // most), *last] * (sum(found) // rows))
        assert sum(found) == 64


LLAMA_3 = {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "rope_theta": 5e5, "use_scaled_rope": True}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_shards, embeddings_on", [(1, 0), (2, 0), (2, 1)])
def test_llama_3(make_folder, n_shards, embeddings_on, tied):
    """Embeddings split along the vocabulary, or, in nobody's files, as before; bf16; an output that
    is the embeddings. The int8 form is that of bitsandbytes, and the same once it is saved."""
    import bitsandbytes as bnb

    folder, params, weights = make_folder(1, torch.bfloat16, **LLAMA_3)
    if tied:
        del weights["output.weight"]
    write_checkpoint(folder, params, weights, n_shards, embeddings_on)
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    expected = torch.from_numpy(oracle.logits(weights, params, TOKENS)[-1])
    error = (logits(folder, use_int8=False) - expected).abs().max()
    assert error < 1e-5 * expected.abs().max()

    quantize.main(str(folder), f"{folder}_int8")
    for of in (folder, f"{folder}_int8"):
        model = LLaMA.build(of, device="cpu").model
        assert torch.equal(model.tok_embeddings.weight, weights["tok_embeddings.weight"].float())
        for name in ("output", "layers.1.attention.wo", "layers.0.feed_forward.w1"):
            theirs = bnb.nn.Int8Params(weights[f"{name}.weight"].clone(), requires_grad=False)
            theirs, state = theirs.to("cpu"), model.get_submodule(name).state
            assert torch.equal(state.CB, theirs.CB) and torch.equal(state.SCB, theirs.SCB), name


def test_a_shard_of_llama_3_alone_is_not_taken_for_another_vocabulary(make_folder):
    folder, params, weights = make_folder(1, torch.bfloat16, **LLAMA_3)
    write_checkpoint(folder, params, weights, 2, embeddings_on=0)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match=r"tok_embeddings.weight in .* \(it is one of 2 shards\)"):
        logits(folder)


def test_a_matrix_cut_short_is_not_taken_for_one_of_several_shards(make_folder):
    path = make_folder(1)[0] / "consolidated.00.pth"
    shard = torch.load(path)
    shard["layers.0.attention.wq.weight"] = shard["layers.0.attention.wq.weight"][:30].clone()
    torch.save(shard, path)
    with pytest.raises(ValueError, match=r"wq.weight in .* is \(30, 64\), but params.json asks"):
        logits(path.parent)


def rounding_error(make_folder, bits):
    """Of the logits, relative to their spread, when weights are rounded to `bits` on the way."""
    folder, params, weights = make_folder(2)
    expected = torch.from_numpy(oracle.logits(weights, params, TOKENS)[-1])
    for name, w in weights.items():
        if w.dim() == 2 and "tok" not in name and bits < 8:
            step = w.abs().amax(1, keepdim=True).float() / (2 ** (bits - 1) - 1)
            weights[name] = ((w.float() / step).round() * step).half()
    write_checkpoint(folder, params, weights, 2)
    return ((logits(folder) - expected).std() / expected.std()).item()


def test_int8_stays_within_its_bound(make_folder):
    """A weight is off by at most half a step, SCB / 254, evenly spread: sqrt(1/3) SCB / 254. Of
    64 normal values the largest is about 2.5 standard deviations, so an output of a matrix is off
    by 0.57 %. The matrices of two layers add it seven times each and the head once, on branches no
    larger than the stream they join: sqrt(15) 0.57 % = 2.2 % of the logits."""
    assert rounding_error(make_folder, 8) < 0.022


def test_the_int8_bound_can_fail(make_folder):
    assert rounding_error(make_folder, 7) > 0.022


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_codes_and_scales_equal_bitsandbytes(make_folder, dtype):
    import bitsandbytes as bnb

    folder, params, weights = make_folder(4, dtype)
    for weight in weights.values():
        if weight.dim() == 2:
            weight[0] *= 2**-12  # where fp16 has fewer bits than bf16
    write_checkpoint(folder, params, weights, 4)
    model = LLaMA.build(folder, device="cpu").model
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            theirs = bnb.nn.Int8Params(weights[f"{name}.weight"].clone(), requires_grad=False)
            theirs = theirs.to("cpu")
            assert torch.equal(module.state.CB, theirs.CB), name
            assert torch.equal(module.state.SCB, theirs.SCB), name


def test_few_weights_are_in_memory_before_the_first_is_used(make_folder):
    folder, params, _ = make_folder(n_layers=4)
    with torch.device("meta"):
        model = Transformer(ModelArgs(**params | {"vocab_size": vocab_size()}))
    planned = checkpoint.plan(model, open_shards(folder))
    with closing(checkpoint.fill_model(planned, model, torch.device("cpu"), None, "")) as done:
        next(done)
        held = [name for name, x in model.state_dict().items() if not x.is_meta]
    assert len(planned) > 30 and 0 < len(held) < 20


def test_progress_and_summary_go_to_stderr(make_folder, capfd, monkeypatch):
    folder, _, _ = make_folder(2)
    rise = itertools.chain([2**24], itertools.repeat(2**24 + 3 * 2**20))
    monkeypatch.setattr(checkpoint, "anonymous_bytes", rise.__next__)
    logits(folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert max(map(len, err.splitlines()[1:])) <= 80
    assert "Loading tiny: 100%" in err and "GiB" in err and "layer 2/2" in err and "left" in err
    assert "Loaded tiny in" in err and "MiB on cpu" in err and "host memory peak +3.0 MiB" in err
    logits(folder.rename(folder.parent / "original"))
    assert f"Loaded {folder.parent.name}/original in" in capfd.readouterr().err


def test_weight_bytes_are_those_of_the_loaded_model(make_folder):
    folder, _, _ = make_folder()
    model = LLaMA.build(folder, device="cpu").model
    held = sum(p.numel() * p.itemsize for p in model.parameters())
    held += sum(m.state.SCB.numel() * 4 for m in model.modules() if hasattr(m, "state"))
    assert room.weight_bytes(model, torch.float32) == held


@pytest.mark.parametrize(
    "params",
    [
        {"dim": 64, "multiple_of": 32, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-6},
        {"model": tiny_params()},
        tiny_params(n_kv_heads=2, rope_theta=1e6, ffn_dim_multiplier=1.0),
    ],
    ids=["no vocab_size", "nested", "Llama 2 keys"],
)
def test_kinds_of_params(make_folder, params):
    folder, _, weights = make_folder(**{k: v for k, v in params.items() if k != "model"})
    (folder / "params.json").write_text(json.dumps(params))
    assert logits(folder).isfinite().all()


def test_keys_of_a_session_are_ours(make_folder):
    folder, params, _ = make_folder()
    (folder / "params.json").write_text(
        json.dumps(params | {"max_seq_len": 8, "max_batch_size": 0})
    )
    assert logits(folder).isfinite().all()


def test_no_warning_for_a_good_folder(make_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(make_folder()[0])


def test_a_model_that_does_not_fit_is_refused_before_loading(make_folder, monkeypatch):
    folder, _, _ = make_folder()
    monkeypatch.setattr(room, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(checkpoint, "fill_model", None)  # nothing may be loaded
    with pytest.raises(MemoryError, match=r"needs 0.0 GiB for weights .* lower --max_seq_len"):
        LLaMA.build(folder, device="cpu")


def test_shards_that_changed_places(make_folder):
    folder = make_folder(2)[0]
    (first, second), checklist = sorted(folder.glob("*.pth")), folder / "checklist.chk"
    sums = [hashlib.md5(path.read_bytes()).hexdigest() for path in (first, second)]
    with pytest.raises(FileNotFoundError, match="no checklist.chk in .*: fetch it"):
        logits(folder, verify=True)
    checklist.write_text(f"{sums[0]}  {first.name}\n{sums[1].upper()} *{second.name}\r\n")
    expected = logits(folder, verify=True)
    first.rename(folder / "other")
    second.rename(first)
    (folder / "other").rename(second)
    assert not torch.equal(logits(folder), expected)
    wrong = rf"{first.name} has md5 sum {sums[1]}, checklist.chk says {sums[0]}: take both"
    with pytest.raises(ValueError, match=wrong):
        logits(folder, verify=True)
    checklist.write_text("nothing")
    with pytest.raises(ValueError, match="checklist.chk says nothing of it: take both"):
        quantize.main(str(folder), f"{folder}_int8")
    assert not (folder.parent / "tiny_int8").exists()


def test_shards_saved_without_sums(make_folder):
    """As torch.serialization.set_crc32_options(False) leaves them."""
    folder = make_folder(1)[0]
    expected = logits(folder)
    path = folder / "consolidated.00.pth"
    shard = torch.load(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(shard, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(logits(folder), expected)
