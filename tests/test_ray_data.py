"""Does the script for many GPUs work? With two actors on the CPU."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(find_spec("ray") is None, reason="runs Ray Data, which is not installed")
def test_every_prompt_is_continued_once(tmp_path, make_folder):
    """By the README's command."""
    line = re.search(r"^python (tests/ray_data.py .*)$", (ROOT / "README.md").read_text(), re.M)[1]
    folder, _, _ = make_folder(2)
    line = line.replace("/w/13B", str(folder)).replace(" results", f" {tmp_path / 'results'}")
    command = line.replace("prompts.jsonl", str(tmp_path / "prompts.jsonl")).split()
    prompts = [f"Once upon a time {i}" for i in range(20)]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    files = (tmp_path / "results").glob("*.json")
    results = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(result["prompt"] for result in results) == sorted(prompts)
    for result in results:
        assert result["result"].startswith(result["prompt"])
        assert len(result["result"]) > len(result["prompt"]) + 20
