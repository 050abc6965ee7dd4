"""Does the comparison of int8 with floating point compute what it says?"""

import math
import re
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import DEMO

from llama import perplexity
from llama.perplexity import cut, draw, with_interval

TEXT = DEMO.parents[1] / "LICENSE"


@pytest.fixture
def run(run_command):
    return partial(run_command, perplexity.main, "--device=cpu")


def test_figures_and_picture(run, tmp_path, demo, demo_float):
    picture = tmp_path / "p.png"
    sizes = ["--window=40", "--windows=3"]
    status, out, err = run("--text", TEXT, *sizes, "--picture", picture)
    assert status == 0, err
    if find_spec("matplotlib"):
        assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in err
    assert out.startswith(f"3 windows of 40 tokens from {TEXT}, on cpu\n")
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (\w+) \| ([\d.]+).*?\| (.*)\|$", out, re.M)}
    ids = demo.tokenizer.encode(TEXT.read_text(), bos=False, eos=False)
    windows = cut(ids, 1, 40, 3)
    for llm, name in ((demo, "int8"), (demo_float, "float32")):
        scores = [
            s for window in windows for s in llm.score([llm.tokenizer.decode(window)])[0]
        ]  # decode drops what encode adds, so that the text's tokens are the window's
        assert float(rows[name][0]) == pytest.approx(math.exp(-sum(scores) / 117), rel=1e-3)
    p, q = (
        torch.cat([torch.cat(list(llm.logits(w[:-1]))) for w in windows]).log_softmax(-1)
        for llm in (demo_float, demo)
    )
    ratio, divergence, same = re.findall(r"([\d.e-]+)%? \[", rows["int8"][1])
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert float(divergence) == pytest.approx(kl, rel=0.05)
    agree = 100 * (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert float(same) == pytest.approx(agree, abs=0.01)
    assert float(ratio) == pytest.approx(float(rows["int8"][0]) / float(rows["float32"][0]), 1e-3)


def test_windows_are_spread_and_none_overlaps():
    ids = list(range(100, 200))
    windows = cut(ids, 1, 11, 3)
    assert [w[:2] for w in windows] == [[1, 100], [1, 130], [1, 160]]
    assert all(len(w) == 11 for w in windows)
    assert len(cut(ids, 1, 11, 500)) == 10
    assert cut(ids[:5], 1, 11, 500) == [[1, *ids[:5]]]


def test_interval_covers_the_mean_of_windows_of_known_spread():
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) + 5
    mean, low, high = map(float, re.findall(r"[\d.]+", with_interval(values, "{:.4f}".format)))
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    one_window = with_interval(values[:1], "{:.4f}".format)
    assert one_window.count(".") == 1  # it says nothing of the spread


def test_picture(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved = []
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **kwargs: saved.append(self))
    values = torch.tensor([[[3.0, 1.0]], [[0.5, -0.25]]])  # losses of two tokens, and their change
    draw(tmp_path / "p.png", "13B on $1 and $2.txt", "fp16", {"int8, bnb": values})
    [figure] = saved
    [axes] = figure.axes
    assert axes.get_title() == "13B on $1 and $2.txt"
    assert axes.collections[0].get_offsets().tolist() == [[-2.5, -0.5], [-1.25, 0.25]]
    assert list(axes.lines[0].get_ydata()) == [0, 0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text=/nowhere"], "'/nowhere' does not exist: pass a text file"),
        (["--text=-"], "- holds no text: pass another file"),
        (["--text", TEXT, "--window=1"], "window is 1, expected a whole number, from 2"),
        (["--text", TEXT, "--windows=0"], "windows is 0, expected a whole number, from 1"),
        (["--text", TEXT, "--picture=/nowhere/p.png"], "picture is /nowhere/p.png, expected"),
        (["--text", TEXT, "--picture=p.bmp"], "picture is p.bmp, expected a .png, .svg or"),
        (["--text", TEXT, "--picture=/"], "picture is /, expected a .png, .svg or"),
        ([], "--text is missing: write --text=VALUE"),
    ],
    ids=str,
)
def test_mistakes(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "") and message in err.splitlines()[-1]


def test_without_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    status, out, err = run("--text=-", "--window=20", "--windows=2", stdin=b"The king said. " * 20)
    assert status == 0 and "No picture without matplotlib: pip install matplotlib" in err
    assert "2 windows of 20 tokens" in out and not list(tmp_path.iterdir())
