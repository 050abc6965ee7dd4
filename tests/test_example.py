"""Does the script do for a user what the README says?"""

import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, python

from llama import LLaMA

SCRIPT = ROOT / "example.py"


def test_demo_prints_the_readmes_story_on_stdout_and_progress_on_stderr(tmp_path):
    story = re.search(r"`(Once upon .*) \.\.\.`", (ROOT / "README.md").read_text())[1]
    done = python(SCRIPT, "--device=cpu", "--max_gen_len=40", "--seed=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(story)
    assert "Loaded demo in" in done.stderr and "Loaded" not in done.stdout
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_meta_folder_with_tokenizer_beside_it(run_command, make_folder):
    folder, _, _ = make_folder(2)
    beside = folder.parent / "tokenizer.model"
    (folder / "tokenizer.model").rename(beside)
    for arguments in ([], ["--tokenizer_path", beside, "--use_int8=False", "--device=cpu"]):
        short = "--max_batch_size=1", "--max_gen_len=5"
        status, out, err = run_command(SCRIPT, "-c", folder, *arguments, *short)
        assert status == 0 and out.startswith("Once upon a time"), err


def test_a_single_prompt_streams():
    """The first words are there long before the last."""
    command = [sys.executable, "-u", str(SCRIPT), "--device=cpu", "--seed=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.read(4) == b"Once"
        process.stdout.read(60)
        assert process.poll() is None
        process.kill()


def edited(tmp_path, prompts):
    """A copy of the script with other prompts and without its docstring, as a user may edit it."""
    _, _, text = SCRIPT.read_text().split('"""', 2)
    start, end = text.index("prompts = ["), text.index("\n]\n") + 2
    assert text[start:end].count('",\n') == 3  # so that uncommenting one makes no longer string
    (tmp_path / "mine.py").write_text(f"{text[:start]}prompts = {prompts}{text[end:]}")
    return tmp_path / "mine.py"


def test_edited_prompts_run_in_batches(run_command, tmp_path, demo):
    prompts = ["The fox", "The fox", "The king"]
    settings = ["--max_batch_size=1", "--max_gen_len=8", "--seed=3", "--device=cpu"]
    status, out, err = run_command(edited(tmp_path, prompts), *settings)
    assert status == 0, err
    texts = out.split("\n\n==================================\n\n")
    assert texts == [*demo.generate(prompts, 8, seed=3), ""]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_genlen=5"], "unknown flag --max_genlen: did you mean --max_gen_len?"),
        (["x"] * 20, "'x' belongs to no flag: write --ckpt_dir=FOLDER, see --help"),
        (["--zzz"], "unknown flag --zzz: see --help"),
        (["--ckpt_dir", str(ROOT)], "no consolidated.*.pth in"),
        (["--tokenizer_path", str(ROOT / "setup.py")], "is not a sentencepiece model"),
        (["--temperature=hot"], "temperature is 'hot', expected a number, from 0"),
        (["--use_int8=no"], "use_int8 is 'no', expected True or False"),
        (["--max_seq_len=4"], "prompt 1 has 1"),
        (["--ckpt_dir=1e5"], "1e5 does not exist: pass the model folder, e.g. --ckpt_dir /w/13B"),
        (["--ckpt_dir=~/nowhere"], str(Path.home() / "nowhere")),
    ],
    ids=str,
)
def test_mistakes(arguments, message, run_command, script=SCRIPT):
    status, out, err = run_command(script, "--device=cpu", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1  # nothing was loaded
    assert message in err


def test_a_list_without_prompts(tmp_path, run_command):
    message = "the list `prompts` in this script is empty: write a prompt into it"
    test_mistakes([], message, run_command, edited(tmp_path, []))


@pytest.mark.parametrize("file", ["example.py", "llama/__main__.py"])
def test_flags_are_those_of_build_and_generate(file):
    flags = inspect.signature(runpy.run_path(str(ROOT / file))["main"]).parameters
    for method in (LLaMA.build, LLaMA.generate):
        for name, parameter in inspect.signature(method).parameters.items():
            if name not in ("self", "prompts"):  # None depends on --chat
                assert flags[name].default in (parameter.default, None), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA torch may import more")
def test_a_start_does_not_import_torchs_compiler():
    """It would take 3 s of the 5 from the command to the first token."""
    code = (
        "import sys, llama; llama.LLaMA.build().generate(['A'], 2); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert python("-c", code).returncode == 0
