"""Is every malformed folder refused in one line that names the file, at once, with little memory,
and is nothing in it ever run?"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import faults
import pytest
from checkpoints import random_weights, tiny_params, write_checkpoint
from conftest import DEMO, vocab_size

from llama import LLaMA, quantize

ROOT = Path(__file__).parents[1]
OURS = {"ValueError", "FileNotFoundError", "OSError", "MemoryError"}
QUICK = {  # what users meet: tried in this process too, each time the tests run
    "shards": """folder above, folder absent, safetensors, GGUF, params a web page, params absent,
        dim text, dim absent, heads of keys 3 of 4, layers of terabytes, vocabulary another,
        a key unknown, a model of images, a model with adapters, a model that was quantized,
        rope scaled by a number, vocabulary of Llama 3,
        shard empty, shard a web page, shard a git-lfs pointer, shard a folder, shard cut to 0.5,
        shard by another name, shard less, shard first gone, shards all gone, one layer less,
        dim the largest, a tensor absent, int8 without scales, a list, code: open, NaN in a matrix,
        tokenizer absent, embeddings of another tokenizer""",
    "int8": """format 2, last file gone, a file between gone, a file twice, layout by columns,
        scales absent, codes in fp16, scales short""",
}
QUICK = [(form, name) for form in QUICK for name in re.split(r",\s+", QUICK[form])]


class Trial:
    """A process that loads folders, with a limit on its memory; see faults.py."""

    def __init__(self):
        command = [sys.executable, str(ROOT / "tests" / "faults.py")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, folder, use_int8=True):
        self.process.stdin.write(json.dumps([str(folder), use_int8]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the process ended with status {self.process.wait()}"
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def trial():
    one = Trial()
    yield one
    one.end()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folders "shards" and "int8", of one model."""
    params = tiny_params()
    weights = random_weights(params, vocab_size=vocab_size())
    shards = write_checkpoint(tmp_path_factory.mktemp("good") / "shards", params, weights, 2)
    shutil.copy(DEMO / "tokenizer.model", shards)
    quantize.main(str(shards), str(shards.with_name("int8")))
    return shards.parent


def spoilt(good, folder, form, name):
    """What is to be loaded: nearly always the folder."""
    spoil, message = faults.FAULTS[form, name]
    shutil.copytree(good / form, folder)
    result = spoil(folder)
    return (result if isinstance(result, Path) else folder), message


@pytest.mark.parametrize("form, name", QUICK)
def test_a_common_fault_is_one_sentence(form, name, good, tmp_path):
    folder, message = spoilt(good, tmp_path / "tiny", form, name)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        LLaMA.build(folder, device="cpu")
    assert str(caught.value).isprintable()
    assert not Path(faults.CANARY).exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["shards", "int8"])
def test_good_folders_load_with_their_tensors(form, good, trial):
    found = trial(good / form)
    assert found["kind"] is None
    llm = LLaMA.build(good / form, device="cpu")
    assert found["digest"] == faults.digest(faults.held(llm.model))


@pytest.mark.slow
@pytest.mark.parametrize("form, name", faults.FAULTS)
def test_fault(form, name, good, trial, tmp_path):
    folder, message = spoilt(good, tmp_path / "tiny", form, name)
    found = trial(folder)
    assert found["kind"] in OURS, found
    assert re.search(message, found["message"]), found["message"]
    assert found["message"].isprintable() and len(found["message"]) < 600
    assert found["seconds"] < faults.SECONDS and found["MiB"] < faults.MIB
    assert not Path(faults.CANARY).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, name", [("shards", "shards gone, strange names"), ("int8", "scale NaN")]
)
def test_fault_on_the_command_line(form, name, good, tmp_path):
    folder, message = spoilt(good, tmp_path / "tiny", form, name)
    command = [sys.executable, "-m", "llama", f"--ckpt_dir={folder}", "--prompt=a", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    *_, said = done.stderr.splitlines()
    assert said.startswith("error: ") and re.search(message, said)
    assert not Path(faults.CANARY).exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["params.json", "consolidated.01.pth", "tokenizer.model", "."])
def test_what_may_not_be_read(file, good):
    """Root may read everything, so tests that run as root try as another user."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(shutil.copytree(good / "shards", Path(parent) / "tiny"))
        (folder / file).chmod(0)
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match="Permission denied") as caught:
                LLaMA.build(folder, device="cpu")
            assert str(folder / file) in str(caught.value)
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)
