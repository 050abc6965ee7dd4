"""Is the saved int8 form the same model, and is a folder that is not whole never taken for one?"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import bitsandbytes as bnb
import pytest
import torch
from conftest import DEMO, ROOT, python
from test_checkpoint import logits

from llama import LLaMA, checkpoint, quantize


def save(folder, **options):
    out = folder.parent / f"{folder.name}_int8"
    quantize.main(str(folder), str(out), **options)
    return out


def unfinished(folder):
    return folder.parent / f"{folder.name}_int8.unfinished"


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_same_logits_bit_for_bit(make_folder, n_shards, dtype):
    folder, _, _ = make_folder(n_shards, dtype, outliers=(3,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(save(folder)), logits(folder))


def test_it_tells_the_same_story_in_less_than_two_thirds_of_the_bytes(tmp_path, demo):
    out = tmp_path / "new" / "demo_int8"
    quantize.main(str(DEMO), str(out))
    again = LLaMA.build(out, device="cpu")
    assert again.generate(["The king"], 20, seed=3) == demo.generate(["The king"], 20, seed=3)
    ours, whole = (sum(p.stat().st_size for p in f.glob("*.pth")) for f in (out, DEMO))
    assert ours < whole * 2 / 3


def test_names_are_those_of_bitsandbytes(make_folder):
    folder, params, weights = make_folder(2)
    out = save(folder)
    saved = {}
    for path in sorted(out.glob("*.pth")):
        saved |= torch.load(path, mmap=True, weights_only=True)
    path = "layers.1.feed_forward.w2"
    weight = weights[f"{path}.weight"]
    layer = bnb.nn.Linear8bitLt(*weight.T.shape, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    of_layer = layer.to("cpu").state_dict()
    assert set(of_layer) == {"weight", "SCB", "weight_format"}
    for name, value in of_layer.items():
        assert torch.equal(saved[f"{path}.{name}"], value), name
    assert json.loads((out / "params.json").read_text()) == params | {"int8_format": 1}


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(make_folder, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: fsync(file) or synced.append(os.fstat(file)))
    out = save(make_folder()[0])
    files = [path.stat() for path in sorted(out.glob("*.pth"))]
    assert [(s.st_ino, s.st_size) for s in synced] == [(s.st_ino, s.st_size) for s in files]


def test_the_tokenizer_comes_along(make_folder, tmp_path):
    folder, _, _ = make_folder(1)
    (folder / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    out = save(folder, tokenizer_path=str(tmp_path / "elsewhere.model"))
    assert (out / "tokenizer.model").read_bytes() == (DEMO / "tokenizer.model").read_bytes()


def test_what_is_refused(make_folder, monkeypatch):
    folder, _, _ = make_folder()
    out = folder.parent / "tiny_int8"
    out.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="tiny_int8 is there already: pass an --out_dir"):
        save(folder)
    out.unlink()
    save(folder)
    with pytest.raises(FileExistsError, match="tiny_int8 is there already: pass an --out_dir"):
        save(folder)
    with pytest.raises(ValueError, match="tiny_int8 holds int8 weights already"):
        save(out)
    with pytest.raises(ValueError, match="tiny_int8 holds int8 weights, which do not"):
        LLaMA.build(out, device="cpu", use_int8=False)
    shutil.rmtree(out)
    free = shutil.disk_usage(folder)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match="form needs .* MiB, .* has 0.1 MiB free: make room there"):
        save(folder)
    assert os.listdir(folder.parent) == ["tiny"]


def test_disk_full(make_folder):
    """A limit on the size of files, met within the first layer, in a process of its own."""
    folder, _, _ = make_folder()
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))\n"
    code += "from llama.cli import run; from llama.quantize import main; run(main)"
    done = python("-c", code, f"--ckpt_dir={folder}", f"--out_dir={folder}_int8")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: {unfinished(folder)}/consolidated.0"), error
    assert "could not be written" in error and "File too large" in error
    assert os.listdir(folder.parent) == ["tiny"]


def test_ctrl_c(make_folder, monkeypatch):
    folder, _, _ = make_folder()

    def interrupt(*_):
        assert unfinished(folder).is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write", interrupt)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        save(folder)
    assert os.listdir(folder.parent) == ["tiny"] and torch.get_num_threads() == threads


def test_a_killed_process_leaves_no_model(make_folder):
    folder, _, _ = make_folder()
    code = "import sys, time\nfrom llama import checkpoint, quantize\nwrite = checkpoint.write\n"
    code += "def slow(*a): write(*a); time.sleep(60)\n"
    code += "checkpoint.write = slow\nquantize.main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), f"{folder}_int8"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    first = unfinished(folder) / "consolidated.00.pth"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(os.listdir(folder.parent)) == ["tiny", "tiny_int8.unfinished"]
    with pytest.raises(FileNotFoundError, match="no params.json in"):
        LLaMA.build(unfinished(folder), device="cpu")
    with pytest.raises(FileExistsError, match="int8.unfinished is there already: .* delete"):
        save(folder)
