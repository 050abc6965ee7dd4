"""Does `python -m llama` do for a user what its help says?"""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from llama import LLaMA, Settings, __main__, cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(run_command):
    """run(*arguments, stdin=b"") -> exit status, stdout, stderr."""
    groups = {"model": LLaMA.build, "settings": Settings}
    return partial(run_command, __main__.main, "--device=cpu", **groups)


@pytest.mark.parametrize(
    "prompt", ["13", "[1, 2]", 'it\'s "so"', "a\nb", "\N{FOX FACE}", "-x", "None", "a=b", " two  "]
)
def test_text_is_taken_as_text(run, prompt):
    for arguments in ([f"--prompt={prompt}"], ["--prompt", prompt]):
        status, out, err = run(*arguments, "--max_gen_len=2")
        assert (status, out[: len(prompt)]) == (0, prompt), err


def test_prompts_are_what_generate_continues(run, demo):
    prompts = ["One day", "The king", "A fox"]
    expected = demo.generate(prompts, 8, seed=3, stop=["queen"])
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    settings = ["--max_gen_len=8", "--seed=3", "--stop=queen"]
    for batch in (1, 2, 32):  # the seed's draws are by place in the list, not in the batch
        status, out, err = run(*given, *settings, f"--max_batch_size={batch}")
        assert status == 0
        texts = out.split("\n\n==================================\n\n")
        assert texts == [*expected, ""]
        assert ("prompt/s" in err) == (batch < 3)  # a progress bar
    assert re.search(
        r"^\d+ prompt tokens, \d+ new tokens, [\d.]+ s to the first token, "
        r"[\d.]+ tokens/s, peak memory [\d.]+ [MG]iB$",
        err,
        re.M,
    )


def test_files_and_standard_input(run, tmp_path):
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_bytes("\ufeffOne day\r\n\r\n13 \N{FOX FACE}\r\n".encode())
    objects.write_text('"One day"\n{"prompt": "13 \\ud83e\\udd8a", "id": 5}\n')
    short = ["--max_gen_len=2", "--seed=1", "--json"]
    _, expected, _ = run("--prompt=One day", "--prompt=13 \N{FOX FACE}", *short)
    for file, stdin in ((lines, b""), (objects, b""), ("-", lines.read_bytes())):
        status, out, err = run("--prompt_file", file, *short, stdin=stdin)
        assert status == 0, err
        assert results(out) == results(expected)
    for end in (b"", b"\n"):  # of echo
        status, out, _ = run("--prompt", "-", *short, stdin=b"two\nlines" + end)
        assert json.loads(out)["prompt"] == "two\nlines"


def results(out):
    timeless = [json.loads(line) for line in out.splitlines()]
    return [{k: v for k, v in one.items() if not k.startswith("seconds")} for one in timeless]


def test_json_has_what_was_generated(run, demo):
    prompts = ["One day", "The king"]
    given = [f"--prompt={prompt}" for prompt in prompts]
    arguments = ["--max_gen_len=12", "--seed=2", "--json", "--logprobs", "--stop=."]
    status, out, _ = run(*given, *arguments)
    assert status == 0
    expected = demo.generate(prompts, 12, seed=2, stop=["."])
    for line, prompt, text in zip(out.splitlines(), prompts, expected):
        one = json.loads(line)
        assert one["prompt"] + one["text"] == text and one["prompt"] == prompt
        assert one["finish_reason"] in ("stop", "length")
        assert len(one["tokens"]) == len(one["logprobs"]) and max(one["logprobs"]) < 0
        assert 0 < one["seconds_to_first_token"] <= one["seconds"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is no prompt: pass --prompt TEXT"),
        (["--prompt"], "--prompt has no value: write --prompt=VALUE"),
        (["--prompt", "--json"], "--prompt has no value"),
        (["--prompt=a", "--logprobs"], "--logprobs is a part of what --json prints: add --json"),
        (["--prompt=a", "--json=yes"], "json is 'yes', expected True or False"),
        (["--prompt=a", "--stop="], "stop is [''], expected a list of strings"),
        (["--prompt=a", "--top_k=-1"], "top_k is -1, expected a whole number"),
        (["--prompt=" + "a " * 600], "prompt 1 has"),
        (["--prompt_file=/nowhere"], "'/nowhere' does not exist: pass a text file"),
        (["--prompt_file=/"], "'/' is a folder: pass a text file"),
        (["--prompt_file", ROOT / "llama/demo/tokenizer.model"], "is no UTF-8 text (byte "),
        (["--prompts=a"], "unknown flag --prompts: did you mean --prompt?"),
        (["The king"], "'The king' belongs to no flag: write --NAME=VALUE"),
        (["--prompt=-", "--prompt=-"], "- is all of standard input, which can be read once"),
        (["--prompt=-", "--prompt_file=-"], "- is all of standard input"),
        (["--prompt=-", "--interactive"], "- is all of standard input"),
        (["--prompt_file=-"], "- holds no prompt: pass a file with a prompt a line"),
    ],
    ids=str,
)
def test_mistakes(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_warning_is_one_line(run, make_folder):
    folder, params, _ = make_folder()
    (folder / "params.json").write_text(json.dumps(params | {"beam": 4}))
    status, _, err = run("--prompt=a", "--max_gen_len=2", "--ckpt_dir", folder)
    assert status == 0
    assert err.startswith("warning: params.json: unknown keys are ignored: beam\n")


@pytest.mark.parametrize(
    "line, message",
    [("{", "line 2, is not JSON"), ("5", "line 2: expected a string"), ('{"text": "a"}', "line 2")],
)
def test_mistakes_in_json_lines(run, tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(f'"fine"\n{line}\n')
    status, out, err = run("--prompt_file", tmp_path / "p.jsonl")
    assert (status, out) == (1, "") and message in err


@pytest.mark.parametrize(
    "errors, message",
    [("strict", b"that is no utf-8 text"), ("surrogateescape", b"prompt 1 holds half a character")],
)
def test_interactive_goes_on_after_ctrl_c_and_mistakes(errors, message):
    """A real process and a real signal; bytes that are no text, as two locales take them."""
    arguments = ["--interactive", "--max_seq_len=20000", "--max_gen_len=19000", "--device=cpu"]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "llama", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"},
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
    assert b"Traceback" not in rest and rest.startswith(b"error: " + message)


@pytest.mark.parametrize("command", [["-m", "llama", "--seed=1"], ["example.py"]], ids=str)
def test_help_has_a_sentence_and_the_default_of_every_flag(command):
    done = subprocess.run(
        [sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stderr == ""
    flags = flags_of(done.stdout)
    expected = {
        **inspect.signature(LLaMA.build).parameters,
        **inspect.signature(Settings).parameters,
    }
    if command[0] == "-m":
        expected |= inspect.signature(__main__.main).parameters
    expected["debug"] = cli.DEBUG
    assert set(flags) == set(expected) - {"prompts", "model", "settings"}
    for name, (default, sentence) in flags.items():
        assert len(sentence) > 15, name
        assert default == repr(expected[name].default), name


def flags_of(text):
    """name -> (default, sentence)"""
    pattern = r"^    (?:-\w, )?--(\w+)=\w+\n +Default: (.*)\n +(\S.*)$"
    return {name: about for name, *about in re.findall(pattern, text, re.M)}
