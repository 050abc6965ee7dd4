"""The script for many GPUs, with two models on the CPU."""

import json
import re

import pytest
from conftest import ROOT, python

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="runs Ray Data, which is not installed")

import ray_data  # noqa: E402


def test_every_prompt_is_continued_once(tmp_path, make_folder):
    """By the README's command."""
    line = re.search(r"^python (tests/ray_data.py .*)$", (ROOT / "README.md").read_text(), re.M)[1]
    folder, _, _ = make_folder(2)
    line = line.replace("/w/13B", str(folder)).replace(" results", f" {tmp_path / 'results'}")
    command = line.replace("prompts.jsonl", str(tmp_path / "prompts.jsonl")).split()
    prompts = [f"Once upon a time {i}" for i in range(20)]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    done = python(*command, RAY_USAGE_STATS_ENABLED="0")
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    files = (tmp_path / "results").glob("*.json")
    results = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    results.sort(key=lambda result: result["index"])
    assert [result["prompt"] for result in results] == prompts
    for result in results:
        assert result["result"].startswith(result["prompt"])
        assert len(result["result"]) > len(result["prompt"]) + 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ckpt_dir=/nowhere"], "/nowhere does not exist"),
        (["--out_dir=/"], "/ is there already: pass another --out_dir"),
        (["--max_seq_len=2"], "prompt"),
        (["--max_gen_len=0"], "max_gen_len is 0, expected a whole number"),
        (["--max_gn_len=5"], "did you mean --max_gen_len"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_before_ray_starts(
    run_command, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.setattr(ray_data.ray, "init", lambda: pytest.fail("Ray was started"))
    (tmp_path / "prompts.txt").write_text("Once upon a time there was a little fox\n")
    given = [f"--prompt_file={tmp_path / 'prompts.txt'}"]
    if not arguments[0].startswith("--out_dir"):
        given.append(f"--out_dir={tmp_path / 'results'}")
    status, out, err = run_command(ray_data.main, *given, *arguments)
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1
