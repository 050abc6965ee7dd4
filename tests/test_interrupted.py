"""Is a LLaMA as it was, and memory free, after an error or Ctrl-C at a bad moment of a list?"""

import importlib
import sys

import pytest
import torch
from conftest import DEVICES
from test_generation import LIST
from test_long_running import caches

from llama import LLaMA, decode
from llama.decode import Decoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=DEVICES)
def llm(request):
    return LLaMA.build(device=request.param, max_batch_size=3)


def engine_of(device):
    """Whose methods a step calls."""
    on_cuda = torch.device(device).type == "cuda"
    return importlib.import_module("llama.fused").FusedEngine if on_cuda else decode.TorchEngine


def fail(patch, owner, name, call, error, when=lambda *_: True):
    """Has a function raise at the end of this call, of those for which when(*arguments) holds."""
    function, calls = getattr(owner, name), []

    def failing(*arguments):
        result = function(*arguments)
        calls.extend([1] * bool(when(*arguments)))
        if len(calls) == call:
            calls.append(1)
            raise error
        return result

    patch.setattr(owner, name, failing)


def capturing(*_):
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


MOMENTS = {  # owner, None for the engine, the function, which call of it, when
    "a slot is refilled": (Decoder, "begin", 2, lambda decoder, *_: decoder.returned),
    "prompts are packed again": (None, "prefill", 2, lambda _, tokens, spans: len(spans) > 1),
    "a step is computed": (None, "step", 1, lambda *_: not capturing()),
    "a graph is captured": (None, "step", 1, capturing),
    "a step runs": (Decoder, "_advance", 5, lambda *_: True),
}


def held():
    """KV caches, and bytes of the GPU."""
    return caches(), torch.cuda.memory_allocated()  # 0 on the CPU


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_list_fails_and_the_next_is_what_it_was(llm, monkeypatch, moment, error):
    device = llm.device
    if moment == "a graph is captured" and device.type == "cpu":
        pytest.skip("the CPU has no graphs")
    expected = llm.generate(LIST, 12, seed=3)
    before = held()
    owner, name, call, when = MOMENTS[moment]
    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        fail(patch, owner or engine_of(device), name, call, error, when)
        llm.generate(LIST, 12, seed=3)
    assert caught.value is error and sys.exc_info()[0] is None
    assert held() == before and not torch.is_inference_mode_enabled()  # though the error is kept
    assert llm.generate(LIST, 12, seed=3) == expected
    assert held() == before
