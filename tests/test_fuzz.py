"""Is every shard that a grammar can write read as a second reader reads it, or refused in a
sentence?

`shards` writes a zip file field by field and a pickle operation by operation, as torch.save may or
might have, and now and then something else in a place. python tests/test_fuzz.py MINUTES does so
for longer and says how many were read.
"""

import itertools
import math
import resource
import struct
import tempfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import fire
import pytest
import second_reader
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from llama.shards import Buffer, open_shard

pytestmark = pytest.mark.slow

OPTIONS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
SECONDS, MIB = 2, 200

NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 7, 12, 255, 256, 2**16, 2**31 - 1, 2**31, 2**40, 2**63])
NAMES = ["norm.weight", "wq", "a", "", "rope.freqs", "x\n\x1b[2J", "é", "a" * 300]


class Writer:
    """Draws the parts of one shard. In `odd` places of a hundred something else comes."""

    def __init__(self, draw):
        self.draw, self.places = draw, itertools.count()
        self.odd = draw(st.sampled_from([0, 1, 3]))

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def strange(self):
        return self.odd > 0 and self.draw(st.integers(0, 99)) >= 100 - self.odd

    # The pickle: each of these gives operations that push one value.

    def put(self, code):
        if self.draw(st.booleans()):
            return code
        place = next(self.places)
        return code + self.one_of(b"q%c" % place, b"r" + struct.pack("<I", place))

    def anything(self):
        codes = [b")", b"}", b"N", b"\x88", b"\x89", b"(", b"0", b"2", b"Q", b"R", b"b", b"s", b"u"]
        codes += [b"t", b"\x85", b"\x86", b"\x87", b"\x80\2", b"\x80\7", b".", b"a", b"]", b"\x81"]
        kind = self.one_of("code", "number", "text", "get", "global", "storage", "tensor", "dict")
        match kind:
            case "code":
                return b"".join(self.draw(st.lists(st.sampled_from(codes), min_size=1, max_size=3)))
            case "number":
                return self.number(self.draw(NUMBERS) * self.one_of(1, -1))
            case "text":
                return self.text(self.one_of(*NAMES, "storage", "0"))
            case "get":
                return b"h%c" % self.draw(st.integers(0, 20))
            case "global":
                name = self.one_of("os system", "torch Tensor", "torch FloatStorage", *CALLS)
                return b"c%s\n%s\n" % tuple(name.encode().split())
            case "storage":
                return self.storage(*self.draw(st.sampled_from(self.storages)))
            case "tensor":
                return self.tensor()
            case "dict":
                return self.tensors()

    def value(self, code):
        return self.anything() if self.strange() else self.put(code)

    def number(self, n):
        if 0 <= n < 256 and self.draw(st.booleans()):
            return b"K%c" % n
        if 0 <= n < 2**16 and self.draw(st.booleans()):
            return b"M" + struct.pack("<H", n)
        if -(2**31) <= n < 2**31 and self.draw(st.booleans()):
            return b"J" + struct.pack("<i", n)
        return b"\x8a\x0a" + n.to_bytes(10, "little", signed=True)

    def text(self, text):
        content = text.encode()
        return b"X" + struct.pack("<I", len(content)) + content

    def tuple(self, *codes):
        codes = [self.value(code) for code in codes]
        short = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(codes))
        if short and self.draw(st.booleans()):
            return b"".join(codes) + short
        return b"(" + b"".join(codes) + b"t"

    def call(self, name, *codes):
        return self.value(b"c%s\n%s\n" % tuple(name.encode().split())) + self.tuple(*codes) + b"R"

    def storage(self, key, dtype, size):
        kind = self.text("storage")
        texts = [b"ctorch\n%s\n" % dtype.encode(), self.text(key), self.text("cpu")]
        return self.value(self.tuple(kind, *texts, self.number(size))) + b"Q"

    def tensor(self):
        """A view within a storage, as long as no place of it is strange."""
        key, dtype, size = self.draw(st.sampled_from(self.storages))
        shape, rest = [], size
        for _ in range(self.draw(st.integers(0, 3))):
            shape.append(self.draw(st.integers(0, rest)))
            rest //= max(shape[-1], 1)
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        match self.one_of("rows", "turned", "expanded", "wide"):
            case "turned":
                turned = self.draw(st.permutations(range(len(shape))))
                shape, stride = [shape[i] for i in turned], [stride[i] for i in turned]
            case "expanded":
                shape, stride = [*shape, 2], [*stride, 0]
            case "wide":
                stride = [2 * step for step in stride]
        last = sum((n - 1) * step for n, step in zip(shape, stride)) if 0 not in shape else 0
        first = self.draw(st.integers(0, max(0, size - 1 - last)))
        places = [self.tuple(*map(self.number, numbers)) for numbers in (shape, stride)]
        hooks = self.call("collections OrderedDict")
        more = [self.one_of(b"N", b"}", b"\x88")] if self.strange() else []
        storage = self.storage(key, dtype, size)
        code = self.call(
            "torch._utils _rebuild_tensor_v2",
            *(storage, self.number(first), *places, self.one_of(b"\x89", b"\x88"), hooks, *more),
        )
        if self.draw(st.booleans()):
            return code
        return self.call("torch._utils _rebuild_parameter", code, b"\x89", b")")

    def tensors(self):
        code = self.put(self.one_of(b"}", b"ccollections\nOrderedDict\n)R"))
        for _ in range(self.draw(st.integers(0, 2))):
            items = [
                self.value(self.text(self.one_of(*NAMES))) + self.value(self.tensor())
                for _ in range(self.draw(st.integers(0, 2)))
            ]
            if len(items) == 1 and self.draw(st.booleans()):
                code += items[0] + b"s"
            else:
                code += b"(" + b"".join(items) + b"u"
        if self.draw(st.integers(0, 5)) == 5:
            code += self.one_of(b"}", b"N", b"}" + self.text("_metadata") + b"}s") + b"b"
        return code

    # The zip file.

    def near(self, n, most=2**32 - 1):
        """A field of the file that should be n."""
        if not self.strange():
            return n
        other = self.one_of(n + 1, n - 1, 0, most, n + 16, n ^ 64, 2 * n)
        return min(max(other, 0), most)

    def entry(self, name, content, method, crc, flags):
        """What a local header and the directory both have of a record."""
        size, name = len(content), name.encode()
        numbers = [self.near(flags, 65535), self.near(method, 65535), 0, 0, self.near(crc)]
        numbers += [self.near(size), self.near(size), self.near(len(name), 65535)]
        return struct.pack("<HHHHIIIH", *numbers), name

    def zipped(self, records):
        file = bytearray(b"\r\n" if self.strange() else b"")
        entries = []
        for name, content in records:
            at, written = len(file), content
            method = 8 if self.strange() else 0
            if method:
                deflate = zlib.compressobj(wbits=-15)
                written = deflate.compress(content) + deflate.flush()
            crc = 0 if self.draw(st.integers(0, 9)) == 9 else zlib.crc32(content)
            descriptor, extra = self.one_of(b"", b"", b"PK\7\10"), bytes(self.one_of(0, 8, 60))
            fields = (name, written, method, crc, 8 if descriptor else 0)
            fixed, encoded = self.entry(*fields)
            file += b"PK\3\4" + struct.pack("<H", 20) + fixed
            file += struct.pack("<H", self.near(len(extra), 65535)) + encoded + extra + written
            if descriptor:
                sizes = self.one_of("<III", "<IQQ")
                file += descriptor + struct.pack(sizes, crc, len(written), len(content))
            fixed, encoded = self.entry(*fields)
            place, more = self.near(at), b""
            if self.draw(st.integers(0, 9)) == 9:  # its place in 64 bits
                more = struct.pack("<HHQ", 1, 8, self.near(at, 2**64 - 1))
                place = 2**32 - 1
            numbers = self.near(len(more), 65535), 0, 0, 0, 0, place
            head = b"PK\1\2" + struct.pack("<HH", 20, 20) + fixed
            entries.append(head + struct.pack("<HHHHII", *numbers) + encoded + more)
            if self.strange():
                file += self.one_of(b"\0", bytes(16), bytes(24), bytes(64))
        if self.strange():
            entries = self.draw(st.permutations(entries))
        if self.strange():
            entries.append(self.one_of(*entries))
        directory, start, count = b"".join(entries), len(file), len(entries)
        file += directory
        if self.draw(st.integers(0, 4)) == 4:  # the end in 64 bits too
            numbers = [self.near(n, 2**64 - 1) for n in (count, count, len(directory), start)]
            end = struct.pack("<QHHII4Q", 44, 45, 45, 0, 0, *numbers)
            place = self.near(len(file), 2**64 - 1)
            file += b"PK\6\6" + end + b"PK\6\7" + struct.pack("<IQI", 0, place, 1)
        comment = self.one_of(b"", b"PK\5\6" + bytes(18), b"x" * 30) if self.strange() else b""
        numbers = [self.near(count, 65535), self.near(count, 65535)]
        numbers += [self.near(len(directory)), self.near(start), self.near(len(comment), 65535)]
        file += b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, *numbers) + comment
        return bytes(file)

    def shard(self):
        contents, self.storages, records = itertools.count(1), [], []
        for key in range(self.draw(st.integers(1, 3))):
            dtype, size = self.one_of(*second_reader.DTYPES), self.one_of(0, 1, 6, 24)
            width = second_reader.DTYPES[dtype].itemsize
            content = bytes(next(contents) % 100 for _ in range(size * width))
            content = content if dtype != "BoolStorage" else bytes(byte & 1 for byte in content)
            self.storages.append((str(key), dtype, size))
            records.append([f"data/{key}", content])
        start = self.one_of(b"\x80\2", b"\x80\2", b"")
        records.append(["data.pkl", start + self.value(self.tensors()) + b"."])
        if self.draw(st.booleans()):
            records.append(["byteorder", b"little"])
        if self.strange():
            name = self.one_of("byteorder", "DATA.PKL", "data/0", "data/9", "BYTEORDER", "a\0b")
            records.append([name, self.one_of(b"big", b"\x80\2}.", records[0][1])])
        if self.strange():
            self.one_of(*records)[0] = self.one_of("data/1", "data.pkl", "x/data.pkl", "", "..")
        records = self.draw(st.permutations(records))
        return self.zipped([(f"{'y' if self.strange() else 'x'}/{n}", c) for n, c in records])


CALLS = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2")
CALLS += ("torch._utils _rebuild_parameter",)


@st.composite
def shards(draw):
    return Writer(draw).shard()


def check(path, content, counts):
    """Reads a shard twice and compares; counts what came of it."""
    path.write_bytes(content)
    started = time.perf_counter()
    try:
        found = {n: piece.read(Buffer()).clone() for n, piece in open_shard(path).items()}
    except (ValueError, OSError) as error:
        assert str(error).isprintable() and len(str(error)) < 800, error
        counts["refused"] += 1
    else:
        expected = second_reader.read(path)
        assert list(found) == list(expected)
        for name, x in expected.items():
            assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
            assert found[name].tolist() == x.tolist(), name  # no numbers here are NaN
        counts["read, with tensors" if found else "read, empty"] += 1
    assert time.perf_counter() - started < SECONDS


def run(folder, counts, number, max_examples):
    """Tries shards, others for another number; hypothesis gives the smallest of those that fail."""

    @seed(number)
    @settings(max_examples=max_examples, **OPTIONS)
    @given(shards())
    def some(content):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zipfile, about names that are there twice
            check(Path(folder) / "consolidated.00.pth", content, counts)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    some()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB * 1024


def test_shards(tmp_path):
    counts = Counter()
    run(tmp_path, counts, 0, 400)
    assert len(counts) == 3 and min(counts.values()) > 20, counts


def main(minutes: float):
    counts, end = Counter(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        for number in itertools.count(1):
            run(folder, counts, number, 1000)
            if time.monotonic() > end:
                break
    print(f"{counts.total()} shards: {dict(counts)}")


if __name__ == "__main__":
    fire.Fire(main)
