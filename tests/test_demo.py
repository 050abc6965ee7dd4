"""Is the bundled model the one the model card describes?"""

import lzma
import math
import re

import pytest
from conftest import DEMO

from llama import LLaMA
from llama.demo import train

ROOT = DEMO.parents[1]
HELD_OUT = ROOT.parent / "shared" / "corpus" / "stories-valid.txt.xz"


def held_out_loss(llm, ids):
    return train.held_out_loss(lambda windows: train.nats(llm.model, windows), ids)


def test_size_and_shards():
    shards = sorted(DEMO.glob("consolidated.*.pth"))
    assert [p.name for p in shards] == ["consolidated.00.pth", "consolidated.01.pth"]
    assert sum(p.stat().st_size for p in shards) <= 16_000_000


@pytest.mark.parametrize("llm", ["demo", "demo_float"])
def test_known_good_text(llm, request):
    """The smallest gap between the two most likely tokens on this path is 0.05: no rounding of any
    CPU closes it."""
    text = request.getfixturevalue(llm).generate(["One morning the farmer"], 32, temperature=0)[0]
    assert text == (
        "One morning the farmer was sitting in the kitchen, and was eating his supper. "
        "He was hungry, and he was hungry, and he was hungry.\n'What is the matter"
    )


def test_int8_perplexity_is_within_1_percent_of_float32(demo, demo_float):
    """On text of its own making where the held-out stories are not at hand."""
    if HELD_OUT.exists():
        ids = train.encode(train.read_stories(HELD_OUT)[:8], demo.tokenizer)[:2048]
    else:
        prompts = ["Once upon a time", "The king", "A fox", "One day"] * 4
        ids = train.encode(demo_float.generate(prompts, 125, seed=1), demo.tokenizer)
    int8, float32 = (held_out_loss(llm, ids) for llm in (demo, demo_float))
    assert abs(int8 - float32) < 0.01


def test_card_has_the_held_out_figures(demo_float):
    if not HELD_OUT.exists():
        pytest.skip(f"the held-out stories are not in {HELD_OUT.parent}")
    card = (ROOT / "MODEL_CARD.md").read_text()
    perplexity = float(re.search(r"\| float32 \| ([\d.]+) ", card)[1])
    ids = train.encode(train.read_stories(HELD_OUT), demo_float.tokenizer)
    # 4,096 tokens from 16 places: a standard error of 3 nats / sqrt(4096) between tokens and as
    # much again between stories, 7 % together.
    windows = ids.unfold(0, train.CONTEXT, len(ids) // 17)[:16]
    loss = train.nats(demo_float.model, windows)[:, -256:].mean().item()
    assert math.exp(loss) == pytest.approx(perplexity, rel=0.15)


def test_training_runs_and_its_folder_loads(tmp_path):
    story = "Once upon a time there was a fox.\nHe lived in the wood, and he was {} years old.\n"
    text = "<|story|>\n".join(story.format(n) for n in range(400))
    for name in ("train", "valid"):
        with lzma.open(tmp_path / f"stories-{name}.txt.xz", "wt") as file:
            file.write(text)
    train.main(str(tmp_path), str(tmp_path / "new"), 300, 32, 1, 2, epochs=1, batch=2)
    llm = LLaMA.build(tmp_path / "new", device="cpu")
    assert llm.generate(["Once upon"], 5)[0].startswith("Once upon")
