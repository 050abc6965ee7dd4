"""What goes wrong while a model is loaded: one clear error, nothing of the model stays, and the
process works on, even while a notebook keeps the error."""

import errno
import gc
import os
import weakref
from unittest.mock import patch

import pytest
import torch
from conftest import DEVICES
from test_checkpoint import logits

from llama import LLaMA, checkpoint, shards


def count_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.fixture(params=DEVICES)
def fails(make_folder, monkeypatch, request):
    """fails(kind, message, happen): a load during which happen(folder) is called fails so."""

    def check(kind, message, happen):
        folder, _, _ = make_folder(2)
        LLaMA.build(folder, device=request.param)  # after which torch and bitsandbytes are set up
        threads, refs, tensors = torch.get_num_threads(), [], count_tensors()
        before = torch.cuda.memory_allocated()  # 0 on the CPU

        def room_is_checked(model, *_):
            refs.append(weakref.ref(model))
            happen(folder)

        with monkeypatch.context() as check.patch:
            check.patch.setattr(checkpoint, "check_room", room_is_checked)
            with pytest.raises(kind, match=message) as caught:
                LLaMA.build(folder, device=request.param)
        assert "\n" not in str(caught.value)
        assert refs[0]() is None  # though `caught` holds the error
        assert torch.get_num_threads() == threads
        assert torch.cuda.memory_allocated() == before and count_tensors() == tensors
        return folder

    return check


def test_shard_cut_short(fails):
    message = r"consolidated.01.pth could not be read \(it ends too early"
    fails(OSError, message, lambda folder: os.truncate(folder / "consolidated.01.pth", 100_000))


def test_shard_removed(fails):
    message = r"consolidated.01.pth could not be read \(No such file"
    fails(OSError, message, lambda folder: (folder / "consolidated.01.pth").unlink())


def test_read_error(fails):
    def broken(path, *_, **__):
        raise OSError(errno.EIO, "Input/output error")

    def happen(folder):
        fails.patch.setattr(shards, "open", broken, raising=False)

    fails(OSError, r"consolidated.0\d.pth could not be read \(Input/output error\)", happen)


def at_the_fifth_call(fails, name, error):
    """What happens: this function of checkpoint raises then."""
    function, calls = getattr(checkpoint, name), []

    def some(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return function(*arguments)

    return lambda folder: fails.patch.setattr(checkpoint, name, some)


def test_ctrl_c(fails):
    interrupt = at_the_fifth_call(fails, "anonymous_bytes", KeyboardInterrupt())
    folder = fails(KeyboardInterrupt, None, interrupt)
    assert logits(folder).isfinite().all()


def test_gpu_out_of_memory(fails):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
    full = at_the_fifth_call(fails, "allocate", error)
    fails(MemoryError, "ran out of memory while the model was loaded", full)


def test_an_error_that_was_there_before_keeps_its_frames():
    """A debugger shows their variables, and a generator among them goes on."""

    def own():
        mine = "kept"
        raise KeyError(mine)

    try:
        own()
    except KeyError as error:
        with pytest.raises(FileNotFoundError):
            LLaMA.build("/nowhere")
        with pytest.raises(MemoryError), patch.object(checkpoint, "load", side_effect=MemoryError):
            LLaMA.build(device="cpu")
        assert error.__traceback__.tb_next.tb_frame.f_locals == {"mine": "kept"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_matrices_stored_otherwise(make_folder, dtype):
    """Views that torch.save keeps as they are: of transposed matrices, and of a wider one."""
    folder, _, _ = make_folder(1, dtype)
    expected = logits(folder)
    path = folder / "consolidated.00.pth"
    shard = torch.load(path)
    wk, w2 = "layers.0.attention.wk.weight", "layers.1.feed_forward.w2.weight"
    for name in (wk, "tok_embeddings.weight"):
        shard[name] = shard[name].T.contiguous().T
    shard[w2] = torch.cat([shard[w2], shard[w2]], 1)[:, : shard[w2].shape[1]]
    assert not shard[wk].is_contiguous() and not shard[w2].is_contiguous()
    torch.save(shard, path)
    assert torch.equal(logits(folder), expected)
