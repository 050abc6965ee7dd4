"""Is host memory bounded while a model is loaded or quantized, whatever its size?"""

import shutil
import sys

import pytest
from conftest import python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's"),
]

# In a process of its own: its memory is compared with what it held before.
MEASURE = """
import sys, threading, time
import torch
from llama import LLaMA, quantize, room
torch.ones(300, 300) @ torch.ones(300, 300)  # what torch starts at first use
folder, out, device = sys.argv[1:]
if device == "cuda":
    torch.ones(1, device="cuda")
before, peak, done, model = room.anonymous_bytes(), 0, False, 0
def watch():
    global peak
    while not done:
        peak = max(peak, room.anonymous_bytes())
        time.sleep(0.002)
watcher = threading.Thread(target=watch); watcher.start()
if out:
    quantize.main(folder, out)
else:
    llm = LLaMA.build(folder, device=device)
    model = room.weight_bytes(llm.model, llm.model.tok_embeddings.weight.dtype)
done = True; watcher.join()
print(peak - before, model)
"""


def measure(folder, out="", device="cpu"):
    done = python("-c", MEASURE, folder, out, device)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.fixture(scope="module")
def saved(large_folder):
    """The large folder's int8 form, and the peak of its making."""
    out = large_folder.parent / "large_int8"
    peak, _ = measure(large_folder, out)
    yield out, peak
    shutil.rmtree(out)


def test_on_the_cpu(large_folder):
    peak, model = measure(large_folder)
    assert model > 200 * 2**20
    # 0.5 GiB is the promise for any model and 8 threads; here two threads have a block in work, in
    # float32 as it is read, in fp16 and again in float32: 80 MiB. 79 to 108 were seen.
    assert peak < model + 130 * 2**20


def test_of_the_saved_form_on_the_cpu(saved):
    peak, model = measure(saved[0])
    assert peak < model + 50 * 2**20


def test_of_quantizing(saved):
    """Two layers of 50 MiB in int8 and two blocks of 40 MiB in work: 150 to 188 were seen. With the
    whole model, of 200 MiB, it would be 280."""
    assert saved[1] < 220 * 2**20


@pytest.mark.cuda
def test_on_cuda(large_folder, saved):
    """2 GiB is the promise for any model; here at most 16 blocks of 4 million values in work, 24
    to 30 MiB each, and what CUDA adds."""
    for folder in (large_folder, saved[0]):
        peak, _ = measure(folder, device="cuda")
        assert peak < 2**30
