"""Does a file changed at random either load as the tensors it holds, or fail with our error?

Nothing is read twice to compare sums of the weights' own bytes: the md5 sums of checklist.chk tell
of damage there. So what must come out is what the file has where the good one keeps each tensor.
"""

import math
import shutil
import zipfile

import faults
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_faults import OURS, trials, write_good

from llama.shards import open_shard

pytestmark = pytest.mark.slow

EXAMPLES = 120  # of each file
FILES = dict.fromkeys(["params.json", "tokenizer.model", "consolidated.00.pth"], "shards")
FILES["consolidated.01.pth"] = "int8"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_good(tmp_path_factory.mktemp("good"), 1, n_layers=1)


def placed(path):
    """The tensors of a good file by name, as places in it."""
    pieces = open_shard(path).items()
    return {name: piece for name, piece in pieces if not name.endswith("weight_format")}


def tensors_at(places, content):
    return {
        name: torch.frombuffer(
            bytearray(content), dtype=at.dtype, count=math.prod(at.shape), offset=at.offset
        )
        for name, at in places.items()
    }


def stretches(path):
    """Where a file says what it holds: all but the bytes of weights."""
    if path.suffix != ".pth":
        return [(0, path.stat().st_size)]
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        of_data = [e.header_offset for e in entries if "/data/" in e.filename]
        ends = [(0, of_data[0]), (archive.start_dir - 20, path.stat().st_size)]
        return ends + [(begin - 20, begin + 70) for begin in of_data]


def changes(content, where):
    """One change to a file: the bytes from a place on, so many, become others."""
    place = st.sampled_from([*where, (0, len(content))]).flatmap(lambda ends: st.integers(*ends))
    other = st.one_of(
        st.binary(max_size=4),
        st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1]).map(lambda n: n.to_bytes(4, "little")),
        place.map(lambda start: content[start : start + 64]),
    )
    count = st.one_of(st.just(1), st.just(4), st.integers(0, 200), st.just(len(content)))
    flip = st.integers(0, 7).map(lambda bit: 1 << bit)
    return st.tuples(place, count, st.one_of(other, flip))


def changed(content, change):
    place, count, other = change
    if isinstance(other, int):
        count, other = 1, bytes([byte ^ other for byte in content[place : place + 1]])
    return content[:place] + other + content[place + count :]


@pytest.mark.parametrize("file", FILES)
def test_random_changes(file, good, tmp_path):
    form = FILES[file]
    folder, use_int8 = shutil.copytree(good / form, tmp_path / form), form == "int8"
    content = (folder / file).read_bytes()
    places = {path.name: placed(path) for path in folder.glob("*.pth")}

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
    @given(st.lists(changes(content, stretches(folder / file)), min_size=1, max_size=3))
    def check(some):
        spoilt = content
        for change in some:
            spoilt = changed(spoilt, change)
        (folder / file).write_bytes(spoilt)
        found = load(folder, use_int8)
        assert found["seconds"] < faults.SECONDS and found["MiB"] < faults.MIB
        if found["kind"] is not None:
            assert found["kind"] in OURS and found["message"].isprintable(), found
            return
        expected = {}
        for name, of_file in places.items():
            expected |= tensors_at(of_file, (folder / name).read_bytes())
        assert all(x.isfinite().all() for x in expected.values())
        assert found["digest"] == faults.digest(expected)

    with trials() as load:
        check()
