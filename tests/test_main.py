"""Does `python -m llama` do for a user what its help says?"""

import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
from conftest import python

import llama
from llama import __main__, checkpoint
from llama.cli import arguments

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(run_command):
    """run(*arguments, stdin=b"") -> exit status, stdout, stderr."""
    return partial(run_command, __main__.main, "--device=cpu")


@pytest.mark.parametrize(
    "prompt", ["13", "[1, 2]", 'it\'s "so"', "a\nb", "\N{FOX FACE}", "-x", "None", "a=b", " two  "]
)
def test_text_is_taken_as_text(run, prompt):
    status, out, err = run("--prompt", prompt, "--max_gen_len=2")
    assert (status, out[: len(prompt)]) == (0, prompt), err


def test_prompts_are_what_generate_continues(run, demo):
    prompts = ["One day", "The king", "A fox"]
    expected = demo.generate(prompts, 8, seed=3, stop=["queen", "5"])
    words = ["--prompt_file=-", "--max_gen_len=8", "--seed=3", "--stop=['queen', \"5\"]"]
    for batch in (1, 2, 32):  # the seed's draws are by place in the list, not in the batch
        stdin = "\n".join(prompts).encode()
        status, out, err = run(*words, f"--max_batch_size={batch}", stdin=stdin)
        assert status == 0 and "prompt/s" in err  # a progress bar
        texts = out.split("\n\n==================================\n\n")
        assert texts == [*expected, ""]
    summary = r"\d+ prompt tokens, \d+ new tokens, [\d.]+ s to the first token, [\d.]+ tokens/s, "
    assert re.search(rf"^{summary}peak memory [\d.]+ [MG]iB$", err, re.M)


def test_files_and_standard_input(run, tmp_path, demo):
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_bytes("\ufeffOne day\r\n\r\n13 \N{FOX FACE}\r\n".encode())
    objects.write_text('"One day"\n{"prompt": "13 \\ud83e\\udd8a", "id": 5}\n')
    expected = demo.generate(["One day", "13 \N{FOX FACE}"], 2, seed=1)
    short = ["--max_gen_len=2", "--seed=1", "--json"]
    inputs = [(lines, b""), (objects, b""), ("-", lines.read_bytes()), ("-", objects.read_bytes())]
    for file, stdin in inputs:
        status, out, err = run("--prompt_file", file, *short, stdin=stdin)
        assert status == 0, err
        results = [json.loads(line) for line in out.splitlines()]
        assert [one["prompt"] + one["text"] for one in results] == expected
        ids = [one.get("id") for one in results]  # other keys come through
        assert ids == ([None, 5] if b"id" in (stdin or file.read_bytes()) else [None] * 2)
    for end in (b"", b"\n"):  # of echo
        status, out, _ = run("--prompt", "-", *short, stdin=b"two\nlines" + end)
        assert json.loads(out)["prompt"] == "two\nlines"


def test_json_has_what_was_generated(run, demo):
    words = ["--max_gen_len=12", "--seed=2", "--json", "true", "--logprobs", "--stop=."]
    status, out, _ = run("--prompt_file=-", *words, stdin=b"One day\nThe king")
    assert status == 0
    expected = demo.generate(["One day", "The king"], 12, seed=2, stop=["."])
    results = sorted(map(json.loads, out.splitlines()), key=lambda one: one["index"])
    assert [one["prompt"] + one["text"] for one in results] == expected
    for one in results:
        assert one["finish_reason"] in ("stop", "length")
        assert len(one["tokens"]) == len(one["logprobs"]) and max(one["logprobs"]) < 0
        assert 0 < one["seconds_to_first_token"] <= one["seconds"]


def untimed(lines):
    results = [json.loads(line) for line in lines]
    return [{key: one[key] for key in one if "seconds" not in key} for one in results]


def test_a_run_that_was_interrupted_goes_on(run, tmp_path):
    """Wherever its file ends: each result is there once, as if nothing had happened."""
    prompts, results = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    records = [{"prompt": f"{text} {i}", "id": -i} for i in range(3) for text in ("A", "The king")]
    prompts.write_text("\n".join(map(json.dumps, records)))
    words = ["--prompt_file", prompts, "--seed=3", "--max_gen_len=5", "--resume", results]
    words += ["--max_batch_size=2", "--logprobs", "--stop=e"]
    status, out, err = run(*words)
    assert (status, out) == (0, "") and "6/6" in err
    whole = results.read_bytes()
    lines = whole.splitlines(keepends=True)
    expected = untimed(sorted(lines, key=lambda line: json.loads(line)["index"]))
    assert [(one["index"], one["id"]) for one in expected] == [(i, -(i // 2)) for i in range(6)]
    starts = [0, len(lines[0]), len(lines[0] + lines[1])]
    for end in (0, 5, *starts[1:], starts[1] + 40, starts[2] - 1, len(whole) - 1, len(whole)):
        results.write_bytes(whole[:end])
        assert run(*words)[0] == 0
        assert results.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, end) + 1])
        found = results.read_bytes().splitlines()
        assert untimed(sorted(found, key=lambda line: json.loads(line)["index"])) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"index": 0, "prompt": "B"}\n', """line 1 is '{"index": 0, "prompt": "B"}', expected"""),
        ('{"index": 1, "prompt": "A"}\n', "line 1 is"),
        ("A\n", "line 1 is 'A', expected the result of one of these prompts: pass the prompts"),
        ("A", "ends in 'A', expected a line that --resume wrote: pass another file"),
    ],
)
def test_another_file_is_not_resumed(run, tmp_path, content, message):
    """Nor changed, and the model is not loaded."""
    (tmp_path / "file").write_text(content)
    status, out, err = run("--prompt=A", "--resume", tmp_path / "file")
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == content


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "there is no prompt: pass --prompt TEXT"),
        (["--prompt", "--json"], "--prompt has no value: write --prompt=VALUE"),
        (["--prompt=a", "--logprobs"], "--logprobs is a part of what --json prints: add --json"),
        (["--prompt=a", "--json=yes"], "json is 'yes', expected True or False"),
        (["--prompt=a", "--stop="], "stop is "),
        (["--prompt=a", "--top_k=-1"], "top_k is -1, expected a whole number"),
        (["--prompt=a", f"--seed={'-' * 5000}1"], "seed is '-----"),
        (["--prompt=a", f"--seed={'-' * 100_000}1"], "seed is '-----"),
        (["--prompt=a", f"--seed={'1+' * 5000}1"], "seed is '1+1+1"),
        (["--prompt=a", f"--ckpt_dir=/{'x' * 4000}"], "File name too long: '/xxx"),
        (["--prompt=a", "--ckpt_dir=/a\nb\0"], r"/a\nb\x00 does not exist: pass the model folder"),
        (["--prompt=" + "a " * 600], "prompt 1 has"),
        (["--prompt_file=/nowhere"], "'/nowhere' does not exist: pass a text file"),
        (["--prompt_file", ROOT / "llama/demo/tokenizer.model"], "is not UTF-8 text (byte "),
        (["--prompts=a"], "unknown flag --prompts: did you mean --prompt?"),
        (["-p", "a"], "unknown flag -p: did you mean --prompt?"),
        (["--max_new_tokens=5"], "unknown flag --max_new_tokens: did you mean --max_gen_len?"),
        (["--max-tokens", "5"], "unknown flag --max-tokens: did you mean --max_gen_len?"),
        (["--max_new_token=5"], "unknown flag --max_new_token: did you mean --max_gen_len?"),
        (["--model", "13B"], "unknown flag --model: did you mean --ckpt_dir?"),
        (["--temp=1"], "unknown flag --temp: did you mean --temperature?"),
        (["The king"], "'The king' belongs to no flag: write --prompt=TEXT or --ckpt_dir="),
        (["--prompt=a", "--prompt", "b"], "--prompt is given twice: give it once"),
        (["--prompt=-", "--prompt_file=-"], "- is all of standard input, which can be read once"),
        (["--prompt=-", "--interactive"], "- is all of standard input"),
        (["--prompt=a", '--stop=["b", "c"'], "which is not a whole list"),
        (["-c=/w/13B"], "unknown flag -c: did you mean --ckpt_dir?"),
        *(
            (
                ["--chat", f"--{other}"],
                f"--chat answers what is typed, --{other.partition('=')[0]} is",
            )
            for other in ("json", "logprobs", "interactive", "prompt=a", "prompt_file=-")
        ),
        (["--prompt=a", "--system=b"], "--system is for conversations: add --chat"),
        (["--chat", "--max_seq_len=x"], "max_seq_len is 'x', expected a whole number"),
        (["--prompt_file=-"], "standard input holds no prompt: pass a file with a prompt per line"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_mistakes(run, words, message):
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert len(err) < 700


@pytest.mark.parametrize("stderr", [None, "/dev/full"])
def test_a_mistake_that_nobody_can_read_is_an_exit_status(run, monkeypatch, stderr):
    stream = stderr and io.TextIOWrapper(io.FileIO(stderr, "w"), write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    assert run("--bogus") == (1, "", "")


@pytest.mark.parametrize(
    "line, found",
    [("{", "'{'"), ("5", "'5'"), ('{"text": "a"}', "'{"), ("[" * 10**5, "'[[[")],
    ids=["broken", "number", "other key", "deep"],
)
def test_mistakes_in_json_lines(run, tmp_path, line, found):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    for file, source in ((tmp_path / "p.jsonl", tmp_path / "p.jsonl"), ("-", "standard input")):
        stdin = (tmp_path / "p.jsonl").read_bytes()
        status, out, err = run("--prompt_file", file, stdin=stdin)
        assert (status, out) == (1, "") and f"{source}, line 2 is {found}" in err


def test_prose_that_begins_with_a_quotation_is_text(run):
    status, out, err = run("--prompt_file=-", "--max_gen_len=2", stdin=b'"He said"\nand went\n')
    assert status == 0 and out.startswith('"He said"') and "\nand went" in out


def test_every_way_to_write_a_flag():
    def command(out, n: int = 1, json: bool = False, name: str = ""):
        pass

    flags = inspect.signature(command).parameters
    plain = ["--out=o", "--json=True", "--n=-3", "--name=-"]
    assert arguments(plain, flags) == plain
    assert arguments(["o", "--json", "--n", "-3", "--name", "-"], flags) == plain
    assert arguments(["-o", "o", "-json", "True", "--n=-3", "--name=-"], flags) == plain
    assert arguments(["o", "--nojson"], flags) == ["--out=o", "--json=False"]
    with pytest.raises(ValueError, match="--out is missing: write --out=VALUE"):
        arguments(["--json"], flags)


def test_a_warning_is_one_line(run, make_folder, monkeypatch):
    warn = partial(warnings.warn, "it is tight", stacklevel=2)
    monkeypatch.setattr(checkpoint, "check_room", lambda *_: warn())
    status, _, err = run("--prompt=a", "--max_gen_len=2", "--ckpt_dir", make_folder()[0])
    assert status == 0
    assert err.startswith("warning: it is tight\n")


def test_interactive_goes_on_after_ctrl_c_and_mistakes():
    """A real process and a real signal; then bytes that are no text."""
    words = ["--interactive", "--max_seq_len=20000", "--max_gen_len=19000", "--device=cpu"]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "llama", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    ) as process:
        for prompt in (b"The old king", b"A little fox"):
            process.stdin.write(prompt + b"\n")
            process.stdin.flush()
            assert process.stdout.read(len(prompt) + 20).strip().startswith(prompt)
            process.send_signal(signal.SIGINT)
            process.stdout.readline()
            while process.stderr.readline() != b"stopped\n":
                assert process.poll() is None
        process.stdin.write(b"\xff\n")
        process.stdin.close()
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert b"Traceback" not in rest and rest.startswith(b"error: that is not utf-8 text")


def test_bytes_that_are_no_text_where_a_locale_keeps_them(run):
    status, _, err = run("--interactive", stdin=b"\xff\n", errors="surrogateescape")
    assert status == 0 and "error: prompt 1 holds half a" in err


def test_ctrl_c_while_an_interrupted_command_ends_changes_nothing():
    code = "import atexit, os, signal; from llama import cli\n"
    code += "def command():\n    atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    code += "    raise KeyboardInterrupt\ncli.run(command)"
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_version(run):
    assert run("--version") == (0, f"llama-int8 {llama.__version__}\n", "")


def test_help_has_a_sentence_and_the_default_of_every_flag():
    command = [sys.executable, "-m", "llama", "--seed=1", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    flags, expected = flags_of(done.stdout), inspect.signature(__main__.main).parameters
    assert list(flags) == list(expected)
    for name, (default, sentence) in flags.items():
        assert len(sentence) > 15 and default == repr(expected[name].default), name


def flags_of(text):
    """name -> (default, sentence)"""
    pattern = r"^    (?:-\w, )?--(\w+)=\w+\n(?: +Type: .*\n)? +Default: (.*)\n +(\S.*)$"
    return {name: about for name, *about in re.findall(pattern, text, re.M)}
