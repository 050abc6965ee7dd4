"""Are the tensors that the one reader of shards finds those that torch loads, and is what torch
itself takes for something else read right or refused?"""

import io
import struct
import zipfile
import zlib
from collections import OrderedDict
from functools import partial

import pytest
import torch

from llama.shards import Buffer, open_shard, some_of


def read(path):
    return {name: piece.read(Buffer()).clone() for name, piece in open_shard(path).items()}


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert torch.equal(found[name], x.detach()), name


def numbers(*shape, dtype=torch.float32):
    return torch.randint(0, 100, shape).to(dtype)


def some_views():
    """Of one storage, cut and turned at random."""
    of, views = numbers(6, 8, 10), {}
    for i in range(200):
        x = of.permute(*torch.randperm(3).tolist())
        for dim in range(3):
            first = int(torch.randint(0, x.shape[dim], ()))
            x = x.narrow(dim, first, int(torch.randint(0, x.shape[dim] - first + 1, ())))
        x = x[0] if i % 3 == 0 and len(x) else x
        spread = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride()))
        if not x.numel() or spread <= 4 * x.numel():
            views[str(i)] = x
    assert len(views) > 100
    return views


GOOD = {
    "types": lambda: {
        str(dtype): numbers(3, 4, dtype=dtype)
        for dtype in (torch.half, torch.bfloat16, torch.float, torch.double, torch.int8)
        + (torch.uint8, torch.bool, torch.int, torch.long)
    },
    "shapes": lambda: {str(shape): numbers(*shape) for shape in [(), (0,), (3, 0), (7,), (1,) * 8]},
    "views": some_views,
    "expanded": lambda: {"x": numbers(1, 3).expand(4, 3), "y": numbers(1, 3)[:, :0]},
    "a state_dict": lambda: torch.nn.Sequential(torch.nn.Linear(3, 4)).state_dict(),
    "parameters": lambda: OrderedDict(torch.nn.Linear(3, 4).named_parameters()),
    "nothing": dict,
}


@pytest.mark.parametrize("kind", GOOD)
def test_it_reads_what_torch_loads(kind, tmp_path):
    torch.manual_seed(0)
    torch.save(GOOD[kind](), tmp_path / "x.pth")
    assert_equal(read(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth", weights_only=True))


def test_the_format_before_1_6_can_be_saved_again(tmp_path):
    path, tensors = tmp_path / "x.pth", GOOD["types"]()
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before 1.6, .*: load it with torch, save it again$"):
        open_shard(path)
    torch.save(torch.load(path), path)
    assert_equal(read(path), tensors)


def test_rows_are_those_of_the_tensor(tmp_path):
    x = numbers(10, 6)
    torch.save({"x": x, "turned": numbers(6, 10).T}, tmp_path / "x.pth")
    for name, tensor in torch.load(tmp_path / "x.pth").items():
        piece = open_shard(tmp_path / "x.pth")[name]
        assert (piece.nbytes, piece.span) == (240, 60)
        parts = [part.read(Buffer()).clone() for part in piece.split(3)]
        assert [len(part) for part in parts] == [3, 3, 3, 1]
        assert torch.equal(torch.cat(parts), tensor)


def zipped(records):
    """A zip file of records, the name's place for NUL marked with %."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records:
            archive.writestr(name, content)
    return file.getvalue().replace(b"%", b"\0")


def with_record(name, content, first=False):
    def forge(records):
        more = [(name, content)]
        return zipped([*more, *records] if first else [*records, *more])

    return forge


def with_gap(records):
    """Eight bytes that are no record's, before the directory."""
    good = zipped(records)
    start = int.from_bytes(good[-6:-2], "little")
    return good[:start] + bytes(8) + good[start:-6] + struct.pack("<IH", start + 8, 0)


def with_content(name, change):
    """Another content of a record, as change(content) gives it."""

    def forge(records):
        return zipped([(n, change(c) if n.endswith(name) else c) for n, c in records])

    return forge


with_list = partial(with_content, "data.pkl")


def with_method(records):
    """Records that say they are deflated, and as long as they are."""
    good = zipped(records)
    for head in (b"PK\3\4\x14\0\0\0", b"PK\1\2\x14\3\x14\0\0\0"):
        good = good.replace(head + b"\0\0", head + b"\x08\0")
    return good


def with_sum(other):
    """Another sum for the list of tensors."""

    def forge(records):
        [code] = [content for name, content in records if name.endswith("data.pkl")]
        return zipped(records).replace(struct.pack("<I", zlib.crc32(code)), other)

    return forge


def storage_alone(code):
    return b"\x80\2}X\1\0\0\0a" + code[code.index(b"((") + 1 : code.index(b"Q") + 1] + b"s."


def second_directory(records):
    """Beside the one that is read another, in a record, whose data/0 and data/1 are each other. A
    zip64 locator, in the comment of the last record, leads there."""
    good = zipped(records)
    size, start = struct.unpack("<II", good[-10:-2])
    other = good[start : start + size].replace(b"data/0", b"data/!")
    other = other.replace(b"data/1", b"data/0").replace(b"data/!", b"data/1")
    at = start + 30 + len("x/more")
    zip64 = struct.pack("<4sQHHII4Q", b"PK\6\6", 44, 45, 45, 0, 0, *[len(records)] * 2, size, at)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + size, 1)
    forged = zipped([*records, ("x/more", other + zip64)])
    entry = forged.rindex(b"PK\1\2")
    entry = forged[entry : entry + 32] + struct.pack("<H", 20) + forged[entry + 34 : -22] + locator
    size, start = struct.unpack("<II", forged[-10:-2])
    end = forged[-22:-10] + struct.pack("<IIH", size + 20, start, 0)
    return forged[: forged.rindex(b"PK\1\2")] + entry + end


# What was forged, and whether the tensors are read, since no other ones can be meant.
FORGED = {
    "an unused record before": (with_record("x/data/9", bytes(24), first=True), True),
    "an unused record behind": (with_record("x/data/9", bytes(24)), True),
    "byteorder in capitals": (with_record("x/BYTEORDER", b"big"), False),
    "byteorder in another folder": (with_record("y/byteorder", b"little"), False),
    "a second list in capitals": (with_record("x/DATA.PKL", b"\x80\2}."), False),
    "a second list behind NUL": (with_record("x/data.pkl%y", b"\x80\2}."), True),
    "a second storage": (with_record("x/data/0", bytes(24)), False),
    "a longer record": (with_content("data/0", lambda values: values + bytes(4)), False),
    "a shorter record": (with_content("data/0", lambda values: values[:-4]), False),
    "a tensor past its storage": (with_list(lambda code: code.replace(b"QK\0", b"QK\1")), False),
    "other values for a tensor": (with_list(lambda code: code.replace(b"u.", b"}bu.")), False),
    "a tensor of other bits": (
        with_list(lambda code: code.replace(b"q\x0bt", b"q\x0b\x88t")),
        False,
    ),
    "a storage for a tensor": (with_list(storage_alone), False),
    "another kind of storage": (
        with_list(lambda code: code.replace(b"storage", b"stories")),
        False,
    ),
    "a method": (with_method, False),
    "a gap": (with_gap, False),
    "a sum, too low": (with_sum(b"\1\0\0\0"), False),
    "a sum, too high": (with_sum(b"\xff\xff\xff\xff"), False),
    "a second directory": (second_directory, None),  # newer Pythons refuse it
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", FORGED)
def test_forged(name, tmp_path):
    forge, is_read = FORGED[name]
    names = "a" if "record" in name else "ab"
    tensors = {name: numbers(2, 3) for name in names}
    torch.save(tensors, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        records = [(n, archive.read(n)) for n in archive.namelist() if n != "x/byteorder"]
    (tmp_path / "x.pth").write_bytes(forge(records))
    try:
        found = read(tmp_path / "x.pth")
    except ValueError as error:
        assert not is_read and "is cut short, damaged or not a checkpoint" in str(error)
    else:
        assert is_read is not False
        assert_equal(found, tensors)


def test_of_many_names_three_are_shown():
    assert some_of([*"abc"]) == "a, b, c" and some_of([*"abcde"]) == "a, b, c and 2 more"


@pytest.mark.parametrize("bits", ["negative", "conjugate"])
def test_views_whose_numbers_are_others_are_refused(bits, tmp_path):
    x = numbers(3, dtype=torch.cfloat).conj()
    torch.save({"x": x.imag if bits == "negative" else x}, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match="more than a flat dict of tensors|names torch ComplexFloatStorage"
    ):
        read(tmp_path / "x.pth")
