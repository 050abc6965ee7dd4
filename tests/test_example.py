"""Does the script do for a user what the README says?"""

import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama import LLaMA

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd=ROOT, script=ROOT / "example.py"):
    """As a user does: a process of its own, stdout and stderr apart."""
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_demo_prints_a_story_on_stdout_and_progress_on_stderr(tmp_path):
    done = run("--max_gen_len=30", "--seed=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    assert "Loaded demo in" in done.stderr and "Loaded" not in done.stdout
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_meta_folder_with_tokenizer_beside_it(make_folder):
    folder, _, _ = make_folder(2)
    beside = folder.parent / "tokenizer.model"
    (folder / "tokenizer.model").rename(beside)
    for arguments in ([], ["--tokenizer_path", beside, "--use_int8=False"]):
        done = run("-c", folder, *arguments, "--max_batch_size=1", "--max_gen_len=5")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Once upon a time")


def test_a_single_prompt_streams():
    """The first words are there long before the last."""
    command = [sys.executable, "-u", str(ROOT / "example.py"), "--device=cpu", "--seed=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.read(4) == b"Once"
        process.stdout.read(60)
        assert process.poll() is None
        process.kill()


def edited(tmp_path, prompts):
    """A copy of the script with other prompts and without its docstring, as a user may edit it."""
    _, _, text = (ROOT / "example.py").read_text().split('"""', 2)
    start, end = text.index("prompts = ["), text.index("\n]\n") + 2
    assert text[start:end].count('",\n') == 3  # so that uncommenting one makes no longer string
    (tmp_path / "mine.py").write_text(f"{text[:start]}prompts = {prompts}{text[end:]}")
    return tmp_path / "mine.py"


def test_edited_prompts_run_in_batches(tmp_path, demo):
    prompts = ["The fox", "The fox", "The king"]
    settings = ["--max_batch_size=1", "--max_gen_len=8", "--seed=3", "--device=cpu"]
    done = run(*settings, script=edited(tmp_path, prompts))
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("\n\n==================================\n\n")
    assert texts == [*demo.generate(prompts, 8, seed=3), ""]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_genlen=5"], "unknown flag --max_genlen: did you mean --max_gen_len?"),
        (["-max_genlen=5"], "unknown flag -max_genlen: did you mean --max_gen_len?"),
        (["x"] * 20, "'x' belongs to no flag: write --NAME=VALUE, see --help"),
        (["--zzz"], "unknown flag --zzz: see --help"),
        (["--ckpt_dir", str(ROOT)], "no consolidated.*.pth in"),
        (["--tokenizer_path", str(ROOT / "setup.py")], "is not a sentencepiece model"),
        (["--temperature=hot"], "temperature is 'hot', expected a number, from 0"),
        (["--use_int8=no"], "use_int8 is 'no', expected True or False"),
        (["--max_batch_size=0"], "max_batch_size is 0, expected a whole number"),
        (["--max_seq_len=4"], "prompt 1 has 1"),
        (["--ckpt_dir=1e5"], "1e5 does not exist: pass the model folder, e.g. --ckpt_dir /w/13B"),
        (["--ckpt_dir=~/nowhere"], str(Path.home() / "nowhere")),
    ],
    ids=str,
)
def test_mistakes(arguments, message, monkeypatch, capsys, script=ROOT / "example.py"):
    monkeypatch.setattr(sys, "argv", ["example.py", "--device=cpu", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    out, err = capsys.readouterr()
    assert caught.value.code == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1  # nothing was loaded
    assert message in err


def test_a_list_without_prompts(tmp_path, monkeypatch, capsys):
    message = "the list `prompts` in this script is empty: write a prompt into it"
    test_mistakes([], message, monkeypatch, capsys, edited(tmp_path, []))


@pytest.mark.parametrize("file", ["example.py", "llama/__main__.py"])
def test_flags_are_those_of_build_and_generate(file):
    flags = inspect.signature(runpy.run_path(str(ROOT / file))["main"]).parameters
    for method in (LLaMA.build, LLaMA.generate):
        for name, parameter in inspect.signature(method).parameters.items():
            assert name in ("self", "prompts") or flags[name].default == parameter.default, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA torch may import more")
def test_a_start_does_not_import_torchs_compiler():
    """It would take 3 s of the 5 from the command to the first token."""
    code = (
        "import sys, llama; llama.LLaMA.build().generate(['A'], 2); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
