"""Does the script do for a user what the README says?"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_edited_prompts_run_in_batches(tmp_path, demo):
    text = (ROOT / "example.py").read_text()
    start, end = text.index("prompts = ["), text.index("]\n", text.index("prompts = ["))
    edited = text[:start] + 'prompts = ["The fox", "The fox", "The king"' + text[end:]
    (tmp_path / "mine.py").write_text(edited)
    settings = ["--max_batch_size=1", "--max_gen_len=8", "--seed=3", "--device=cpu"]
    done = run(*settings, script=tmp_path / "mine.py")
    assert done.returncode == 0, done.stderr
    texts = [text.strip() for text in done.stdout.split("==================================")]
    assert texts == [*demo.generate(["The fox", "The fox", "The king"], 8, seed=3), ""]
    assert texts[0] != texts[1]


def test_a_mistake_is_one_line_on_stderr_and_exit_status_1():
    done = run("--ckpt_dir", "/nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: /nowhere does not exist: pass the model folder, e.g. --ckpt_dir /w/13B"
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_genlen=5"], "unknown flag --max_genlen: did you mean --max_gen_len?"),
        (["--max-genlen", "5"], "unknown flag --max_genlen: did you mean --max_gen_len?"),
        (["-max_genlen=5"], "unknown flag --max_genlen: did you mean --max_gen_len?"),
        (["x"] * 20, "'x' belongs to no flag: write --NAME=VALUE, see --help"),
        (["--zzz"], "unknown flag --zzz: see --help"),
        (["--ckpt_dir", str(ROOT)], "no consolidated.*.pth in"),
        (["--tokenizer_path", str(ROOT / "setup.py")], "is not a sentencepiece model"),
        (["--temperature=hot"], "temperature is 'hot', expected a number, from 0"),
        (["--use_int8=no"], "use_int8 is 'no', expected True or False"),
        (["--max_batch_size=0"], "max_batch_size is 0, expected a whole number"),
        (["--max_batch_size=two"], "max_batch_size is 'two', expected a whole number"),
        (["--max_seq_len=4"], "prompt 1 has 1"),
        (["--ckpt_dir"], "--ckpt_dir has no value: write --ckpt_dir=VALUE"),
        (["--ckpt_dir=1e5"], "1e5 does not exist"),
        (["--ckpt_dir=~/nowhere"], str(Path.home() / "nowhere")),
    ],
    ids=str,
)
def test_mistakes(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example.py", "--device=cpu", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "example.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert caught.value.code == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1  # nothing was loaded
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA torch may import more")
def test_a_start_does_not_import_torchs_compiler():
    """It would take 3 s of the 5 from the command to the first token."""
    code = (
        "import sys, llama; llama.LLaMA.build().generate(['A'], 2); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
