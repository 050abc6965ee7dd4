"""Is every malformed folder refused in one line that names the file, at once, with little memory,
and is nothing in it ever run?"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import faults
import pytest
from checkpoints import tiny_params
from conftest import ROOT, python, write_folder

from llama import LLaMA, quantize

OURS = {"ValueError", "FileNotFoundError", "OSError", "MemoryError"}
QUICK = {  # what users meet: tried in this process too, each time the tests run
    "shards": """folder above, folder absent, safetensors, GGUF, params a web page, params absent,
        dim is '64', dim absent, heads of keys 3 of 4, n_layers is 1000000000000, one layer less,
        vocabulary another, vocabulary of Llama 3, a key unknown, a model of images, dim odd,
        a model with adapters, a model that was quantized, rope scaled by a number,
        NaN in embeddings, no rows, a tensor left over,
        shard empty, shard a web page, shard a git-lfs pointer, shard a folder, shard cut to 0.5,
        shard by another name, shard less, shard first gone, shards all gone,
        dim the largest, a tensor absent, int8 without scales, a list, code: open, NaN in a matrix,
        tokenizer absent, embeddings of another tokenizer""",
    "int8": """format 2, last file gone, a file between gone, file twice, a file more,
        layout by columns, norm infinite, norm -infinite, scales absent, codes in fp16,
        scales short, scales in fp16, scale NaN, scale negative, scale beyond fp16, code -128""",
}
QUICK = [(form, name) for form in QUICK for name in re.split(r",\s+", QUICK[form])]


@contextmanager
def trials():
    """Gives load(folder, use_int8) in a process with a limit on its memory; see faults.py."""
    command = [sys.executable, str(ROOT / "tests" / "faults.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:

        def load(folder, use_int8=True):
            process.stdin.write(json.dumps([str(folder), use_int8]) + "\n")
            line = process.stdout.readline()
            assert line, f"the process ended with status {process.wait()}"
            return json.loads(line)

        yield load


@pytest.fixture(scope="module")
def trial():
    with trials() as load:
        yield load


def write_good(parent, n_shards=2, **sizes):
    """The folders "shards" and "int8", of one model."""
    write_folder(parent / "shards", tiny_params(**sizes), n_shards)
    quantize.main(str(parent / "shards"), str(parent / "int8"))
    return parent


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_good(tmp_path_factory.mktemp("good"))


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
    done = python("-m", "llama", f"--ckpt_dir={folder}", "--prompt=a", "--device=cpu")
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
