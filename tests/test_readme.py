"""Does the README say what is? Every command in it is run, here or, to install, by .ci/run."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import random_model
from conftest import ROOT
from test_main import flags_of

from llama import LLaMA

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S)
    for line in block.splitlines()
]


def test_every_command_is_known():
    """A new command in the README needs a test, here or elsewhere."""
    assert COMMANDS == [
        "pip install -r requirements.txt -e . && python example.py",  # .ci/run
        'python -m llama --prompt "The king" --stop . --max_gen_len 40',
        r"printf 'The king\nThe fox\n' | python -m llama --prompt_file - --json --logprobs"
        " > results.jsonl",
        "python -m llama --interactive",  # test_main.py
        'pip install -r requirements.txt -e ".[test]" && python -m pytest',  # .ci/run
        "PRESIGNED_URL='https://...' ./download.sh 7B,13B /w",  # test_download.py
        "python -m llama.memory --size 13B",
        "python example.py --ckpt_dir /w/13B --tokenizer_path /w/tokenizer.model"
        " --max_batch_size=1",
        "python -m llama.quantize --ckpt_dir /w/13B --out_dir /w/13B_int8",
        "python tests/ray_data.py prompts.jsonl results --ckpt_dir /w/13B",  # test_ray_data.py
    ]
    assert "grep '^pip install' README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def run(run_command):
    """run(line) -> what it prints"""

    def printed(line):
        python, *options = shlex.split(line)
        command = options.pop(1) if options[0] == "-m" else ROOT / options[0]
        status, out, err = run_command(command, *options[1:])
        assert status == 0 and "warning" not in err.lower(), err
        return out

    return printed


def test_commands_with_prompts(run, tmp_path):
    king = run(COMMANDS[1])
    assert king.startswith("The king") and king.endswith("\n") and "." not in king
    line = COMMANDS[2].replace("python ", f"{sys.executable} ")
    line = line.replace("--json", "--max_gen_len 5 --json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(line, shell=True, check=True, cwd=tmp_path, env=environment)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [result["prompt"] for result in results] == ["The king", "The fox"]
    assert all(len(result["logprobs"]) == 5 for result in results)


def test_comparison_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a picture goes there
    command = re.search(r"`(python -m llama.perplexity) .*?`", README)[1]
    said = run(f"{command} --text {ROOT / 'LICENSE'} --windows 2 --window 64 --device cpu")
    assert re.findall(r"^\| (\w+) \| \d+\.\d+ \[", said, re.M) == ["float32", "int8"]


def test_commands_with_metas_weights(run, make_folder):
    folder, _, _ = make_folder(2, name="13B")
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    memory, example, quantize = (
        run(command.replace("/w/", f"{folder.parent}/")) for command in COMMANDS[6:9]
    )
    assert memory.startswith("13B, 1 sequence of 2048 tokens, in GiB\n")
    assert example.startswith("Once upon a time")
    assert quantize == ""
    assert (folder.parent / "13B_int8" / "tokenizer.model").is_file()


def test_notebook_code(make_folder, capsys):
    code = re.search(r"^```python\n(.*?)^```$", README, re.M | re.S)[1]
    folder, _, _ = make_folder(2, name="13B")
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    exec(code.replace("/w/", f"{folder.parent}/"), {})
    assert capsys.readouterr().out.startswith("I believe the meaning of life is")


@pytest.mark.parametrize("int8", [False, True], ids=["shards", "int8"])
def test_random_model_is_a_model(tmp_path, monkeypatch, int8):
    monkeypatch.setitem(random_model.SIZES, "13B", {"dim": 64, "n_layers": 1, "n_heads": 4})
    monkeypatch.setattr(random_model, "OUTLIERS", [3, 17])
    random_model.main("13B", tmp_path, int8)
    llm = LLaMA.build(tmp_path, device="cpu")
    assert llm.tokenizer.n_words == 32000
    assert llm.generate(["Once upon"], 5)[0].startswith("Once upon")


def test_options_table_equals_the_help(run):
    """Flags that are shown in a command need no row."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*) \|$", README, re.M)
    flags = flags_of(run("python -m llama --help"))
    shown = {"None": "", "()": "", "'triton'": "triton"}
    help_rows = [(name, shown.get(default, default), s) for name, (default, s) in flags.items()]
    assert set(rows) <= set(help_rows)
    in_commands = ["version", *re.findall(r"--(\w+)", "".join(COMMANDS[1:4]))]
    assert set(flags) == {name for name, *_ in rows} | set(in_commands)


def test_files_of_the_tree_exist():
    tree = re.search(r"^llama/\n((?:  \S.*\n)+)", README, re.M)[1]
    named = re.findall(r"^  \w+/|\w+\.py", tree, re.M)
    named = [name.strip(" /") for name in named]
    there = {p.name for p in (ROOT / "llama").iterdir()}
    there -= {"__init__.py", "__pycache__", "py.typed"}
    assert sorted(named) == sorted(there)


def test_length():
    assert len(README.splitlines()) <= 150
