"""Does the README say what is? Every command in it is run, here or, to install, by .ci/run; only
`hf download` is not, as it needs a network and a licence that somebody accepted."""

import json
import os
import re
import shlex
import subprocess
import sys

import byte_pairs
import pytest
import random_model
import torch
from checkpoints import random_weights, tiny_params, write_checkpoint
from conftest import ROOT
from test_main import flags_of

from llama import LLaMA, Transformer
from llama.int8 import Int8Linear
from llama.memory import CONTEXT
from llama.params import model_args
from llama.room import GIB, need, weight_bytes

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
        'hf download meta-llama/Llama-3.1-8B-Instruct --include "original/*"'
        " --local-dir /w/Llama-3.1-8B-Instruct",
        "python -m llama.memory --size 8B --max_seq_len 8192",
        'python -m llama --chat --ckpt_dir /w/Llama-3.1-8B-Instruct/original --system "Be brief."',
        "PRESIGNED_URL='https://...' ./download.sh 7B,13B /w",  # test_download.py
        "python example.py --ckpt_dir /w/13B --tokenizer_path /w/tokenizer.model"
        " --max_batch_size=1",
        "python -m llama.quantize --ckpt_dir /w/13B --out_dir /w/13B_int8",
        "python -m llama --prompt_file prompts.jsonl --resume results.jsonl --ckpt_dir /w/13B",
        "python tests/ray_data.py prompts.jsonl results --ckpt_dir /w/13B",  # test_ray_data.py
    ]
    assert "grep '^pip install' README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def run(run_command):
    """run(line, stdin) -> what it prints"""

    def printed(line, stdin=b""):
        python, *options = shlex.split(line)
        command = options.pop(1) if options[0] == "-m" else ROOT / options[0]
        status, out, err = run_command(command, *options[1:], stdin=stdin)
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


@pytest.fixture
def llama3_folder(tmp_path):
    """What `hf download` leaves in /w/Llama-3.1-8B-Instruct/original, tiny; /w is tmp_path."""
    pytest.importorskip("tiktoken")
    folder = tmp_path / "Llama-3.1-8B-Instruct" / "original"
    params = tiny_params(n_kv_heads=2, vocab_size=len(byte_pairs.tokens()) + 256, rope_theta=5e5)
    write_checkpoint(folder, params, random_weights(params, dtype=torch.bfloat16), 1)
    (folder / "tokenizer.model").write_bytes(byte_pairs.rank_file())
    return folder


def test_commands_with_llama_3(run, llama3_folder, tmp_path):
    memory, chat = (COMMANDS[i].replace("/w/", f"{tmp_path}/") for i in (6, 7))
    assert run(memory).startswith("8B, 1 sequence of 8192 tokens, in GiB\n")
    line = f"{chat} --temperature 0 --max_gen_len 8"
    first, second = run(line, b"Hello\n"), run(line, b"Hello\nAnd you?\n")
    assert first.strip() and second.startswith(first) and len(second) > len(first)


def test_commands_with_metas_weights(run, make_folder, monkeypatch):
    folder, _, _ = make_folder(2, name="13B")
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    monkeypatch.chdir(folder)
    (folder / "prompts.jsonl").write_text('{"prompt": "A fox", "id": 5}')
    example, quantize, resume = (
        run(command.replace("/w/", f"{folder.parent}/")) for command in COMMANDS[9:12]
    )
    assert example.startswith("Once upon a time")
    assert quantize == resume == "" and '"id": 5' in (folder / "results.jsonl").read_text()
    assert (folder.parent / "13B_int8" / "tokenizer.model").is_file()


def test_notebook_code(llama3_folder, tmp_path, capsys):
    code = re.search(r"^```python\n(.*?)^```$", README, re.M | re.S)[1]
    exec(code.replace("/w/", f"{tmp_path}/"), {})
    assert "I believe the meaning of life is" in capsys.readouterr().out


LLAMA_3 = {"n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256}
SHAPES = {  # of the models in the table, by the end of their names; as Meta's params.json has them
    "3.2 1B": LLAMA_3 | {"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5},
    "3.2 3B": LLAMA_3 | {"dim": 3072, "n_layers": 28, "n_heads": 24},
    "8B": LLAMA_3 | {"dim": 4096, "n_layers": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "30B": {"dim": 6656, "n_layers": 60, "n_heads": 52},
    "34B": {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8},
    "65B": {"dim": 8192, "n_layers": 80, "n_heads": 64},
}
SHAPES["Code Llama 70B"] = SHAPES["65B"] | {
    "n_kv_heads": 8,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
}
SHAPES["3.3 70B"] = SHAPES["Code Llama 70B"] | {"vocab_size": 128256}
CARDS = 4, 6, 8, 12, 16, 24, 40, 48, 80
FREE = 0.97  # GiB that a card has free for each GB in its name


def test_table_of_models_is_computed():
    rows = re.findall(r"^\| (\w.* \d+B) \| ([\d.]+) \| (\d+) \| .* \|$", README, re.M)
    assert len(rows) == len(SHAPES)
    for name, weights, card in rows:
        [params] = [params for end, params in SHAPES.items() if f" {name}".endswith(f" {end}")]
        params = {"vocab_size": 32000, "norm_eps": 1e-5} | params
        args = model_args(params, params["vocab_size"], max_seq_len=2048)
        with torch.device("meta"):
            model = Transformer(args, Int8Linear)
        needed = need(model, 1, 2048, torch.float16)
        assert weights == f"{weight_bytes(model, torch.float16) / GIB:.1f}", name
        total = needed.total / GIB + CONTEXT
        assert int(card) == next(size for size in CARDS if total < FREE * size), name


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
    ours = [command for command in COMMANDS if "python -m llama " in command]
    in_commands = ["version", *re.findall(r"--(\w+)", " ".join(ours))]
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
