"""A notebook, run by Jupyter's kernel."""

import re
from pathlib import Path

import pytest

pytest.importorskip("ipykernel", reason="runs notebooks with ipykernel, which is not installed")
nbclient = pytest.importorskip("nbclient", reason="runs notebooks with nbclient, not installed")
nbformat = pytest.importorskip("nbformat")  # comes with nbclient

CELLS = [
    """
    import gc, sys, weakref
    import llama.perplexity
    from llama import LLaMA
    from llama.room import anonymous_bytes

    llm = LLaMA.build(device="cpu", use_int8=False)
    print("tqdm.notebook" in sys.modules)
    """,
    """
    llm.generate(["The king", "A fox"], 8, seed=1)
    """,
    """
    for piece in llm.stream("The king", 8, seed=1):
        print(piece, end="")
    """,
    """
    [len(scores) for scores in llm.score(["The king said", ""])]
    """,
    """
    model, loaded = weakref.ref(llm.model), anonymous_bytes()
    del llm
    gc.collect()
    assert model() is None
    llm = LLaMA.build(device="cpu", use_int8=False)
    print(f"{anonymous_bytes() - loaded} bytes more than before")
    """,
    """
    llm.generate(["The king"], 0)
    """,
]
CELLS.append(CELLS[1])


@pytest.fixture(scope="module")
def said():
    """What each cell prints or shows, in order: (name of the stream or of the output, text)."""
    cells = [nbformat.v4.new_code_cell(re.sub("^ {4}", "", cell, flags=re.M)) for cell in CELLS]
    cells[5].metadata.tags = ["raises-exception"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    here = {"metadata": {"path": str(Path(__file__).parents[1])}}
    nbclient.NotebookClient(notebook, timeout=120, resources=here).execute()
    return [
        "".join(o.get("text") or o.get("evalue") or o["data"]["text/plain"] for o in cell.outputs)
        for cell in notebook.cells
    ]


def test_progress_bar_is_text(said):
    """Jupyter's own bars warn without ipywidgets and stay at 0 % in a saved notebook with it."""
    assert "Loading demo: 100%" in said[0] and "Loading demo: 100%" in said[4]
    assert "False" in said[0] and "Warning" not in said[0]


def test_it_talks_and_goes_on_after_an_exception(said):
    king, fox = re.findall(r"'(.*?)'", said[1])
    assert "The king" + said[2] == king and fox.startswith("A fox")
    assert said[3] == "[3, 0]"
    assert said[5].startswith("max_gen_len is 0, expected a whole number")
    assert said[6] == said[1]


def test_memory_of_the_first_model_is_given_back(said):
    """31 MB of float32 weights would be there twice."""
    assert int(re.search(r"(-?\d+) bytes more than before", said[4])[1]) < 5e6
