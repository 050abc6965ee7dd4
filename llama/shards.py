"""What do the files of a model folder hold?

`params.json`, and one `consolidated.NN.pth` for each model-parallel shard, a zip file as torch.save
writes it. Nothing in them is trusted: what could run code, ask for terabytes or pass other bytes
off as a tensor is refused. Opening a shard reads its list of tensors alone, each `Piece` is read
when its turn comes.
"""

import ctypes
import json
import math
import pickle
import pickletools
import re
import struct
import threading
import warnings
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from llama.tokenizer import read_bytes

INT8_FORMAT = 1  # of the folders that checkpoint.save_int8 writes, in their params.json
# What is found in place of a shard, by its first bytes.
NOT_SHARDS = {
    b"<": "a web page",
    b"version https://git-lfs": "a git-lfs pointer",
    b"\x80": "in torch's format before 1.6",
}
LARGEST_PARAMS = 2**20  # bytes; Meta's files have about 100
LARGEST_PICKLE = 2**20  # bytes; the list of 65B's tensors takes 2**17
# What a list of tensors may name. Torch refuses to call what could run code; it does let a list ask
# for any amount of memory.
OF_TENSORS = re.compile(
    r"torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict"
)
# The operations of such a list, by what they make: a string, number or class; a tuple; others.
ATOMS = "BINUNICODE BININT BININT1 BININT2 LONG1 NONE NEWTRUE NEWFALSE GLOBAL".split()
TUPLES = "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3".split()
OTHERS = """PROTO EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS BINFLOAT BINPERSID REDUCE
BUILD STOP""".split()
LARGEST_KEY = 8  # strings and numbers of a tensor's place: torch.save writes 6
LARGEST_DIRECTORY = 2**22  # bytes; that of 65B in one file takes 2**17
LARGEST_SPAN = 4  # values between a tensor's first and last for each of its own


@dataclass(frozen=True)
class Piece:
    """A tensor of a shard or some of its rows. It is memory-mapped, but for its address alone:
    where a disk fails or a file is cut short, touching it would kill the process, and reading the
    file raises."""

    tensor: Tensor
    path: Path
    mapped_at: int  # address of the file's first byte

    def split(self, rows: int) -> list["Piece"]:
        return [replace(self, tensor=part) for part in self.tensor.split(rows)]

    def as_matrix(self) -> "Piece":
        return self if self.tensor.dim() == 2 else replace(self, tensor=self.tensor[None])

    def read(self) -> Tensor:
        """Its values, until this thread reads the next piece."""
        values = scratch("read", (span(self.tensor),), self.tensor.dtype)
        self.read_into(values)
        return values.as_strided(self.tensor.shape, self.tensor.stride())

    def read_into(self, out: Tensor) -> None:
        """Fills out, contiguous, with the bytes from the piece's first value on."""
        bytes_ = memoryview((ctypes.c_char * out.nbytes).from_address(out.data_ptr())).cast("B")
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.tensor.data_ptr() - self.mapped_at)
                while bytes_:
                    count = file.readinto(bytes_)
                    if not count:
                        raise OSError("it ends too early, and was longer before")
                    bytes_ = bytes_[count:]
        except OSError as error:
            raise OSError(
                f"{self.path} could not be read ({error.strerror or error}): look after its disk, "
                "or let whatever writes it end, and load again"
            ) from None


_of_this_thread = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> Tensor:
    """This thread's buffer of that name, viewed so. Quantizing in fresh memory took twice as long,
    since the kernel gives it page by page; views are kept since each call of torch costs a thread
    among others 33 us, the wait for Python (16 cores of an H200 machine, 2026-11-23)."""
    buffer, views = _of_this_thread.__dict__.get(name, (None, {}))
    if (shape, dtype) not in views:
        nbytes = math.prod(shape) * dtype.itemsize
        if buffer is None or buffer.nbytes < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            views = {}
            _of_this_thread.__dict__[name] = buffer, views
        views[shape, dtype] = buffer[:nbytes].view(dtype).view(shape)
    return views[shape, dtype]


def open_shards(ckpt_dir: Path) -> dict[str, dict[str, Piece]]:
    """File name -> its tensors, none of them read yet."""
    names = sorted(path.name for path in ckpt_dir.glob("consolidated.*.pth"))
    strange = [name for name in names if not re.fullmatch(r"consolidated\.\d{2,}\.pth", name)]
    if strange:
        raise ValueError(
            f"{ckpt_dir} holds {some_of(strange)}, expected consolidated.00.pth and so on alone: "
            "move what is no shard elsewhere"
        )
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(names))]
    if set(names) != set(expected):
        absent = sorted(set(expected) - set(names))
        raise FileNotFoundError(
            f"{ckpt_dir} holds {some_of(names)} but not {some_of(absent)}: "
            "fetch the missing shard, download.sh resumes"
        )
    return {name: open_shard(ckpt_dir / name) for name in expected}


def open_shard(path: Path) -> dict[str, Piece]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: replace it by the shard, download.sh fetches it")
    start = read_bytes(path, 64)
    kind = next((kind for begin, kind in NOT_SHARDS.items() if start.startswith(begin)), None)
    if kind:
        raise ValueError(f"{path} is {kind}, not a checkpoint: download it again")
    try:
        check_directory(path)
        with zipfile.ZipFile(path) as archive:
            records = tensor_records(archive)
            about = {}
            for entry in archive.infolist():
                if entry.filename.endswith(("/data.pkl", "/byteorder")):
                    entry.CRC = entry.CRC or None  # read() compares it; torch.save may omit it
                    name = entry.filename.rpartition("/")[2]
                    if name in about:
                        raise ValueError(f"it has two records {name}")
                    about[name] = archive.read(entry)
        if about.get("byteorder", b"little") != b"little":  # as of every machine with a GPU
            raise ValueError("its numbers are of another byte order")
        check_list(about["data.pkl"])
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        shard = dict(dict.items(shard)) if isinstance(shard, dict) else None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors, which loading could run as code: it was refused, "
            "pass Meta's original checkpoint"
        ) from None
    except Exception as error:  # torch raises many kinds, none of which names the file
        reason = one_line((str(error).strip().splitlines() or [repr(error)])[0], 160)
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or not a checkpoint ({reason}): "
            "compare it with checklist.chk, download it again"
        ) from None
    if not isinstance(shard, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and span(tensor) <= LARGEST_SPAN * max(1, tensor.numel())
        for name, tensor in shard.items()
    ):
        raise ValueError(f"{path} holds no flat dict of tensors: expected one of Meta's shards")
    mapped_at = 0
    if storages := [tensor.untyped_storage() for tensor in shard.values() if tensor.numel()]:
        found = {(storage.data_ptr(), storage.nbytes()) for storage in storages}
        first = min(found)[0]
        # Where the file is mapped, torch does not tell. Each storage is a record of it.
        places = [first - start for start, _ in records]
        fits = [p for p in places if {(address - p, n) for address, n in found} <= records]
        if not fits:
            raise ValueError(f"{path} keeps tensors as torch.save never does: download it again")
        mapped_at = fits[0]
    return {
        name: Piece(tensor.detach(), path, mapped_at)
        for name, tensor in shard.items()
        if not name.endswith("rope.freqs")
    }


def check_directory(path: Path) -> None:
    """ValueError if the list of a zip file's records is longer than any of torch.save: Python reads
    it whole, from the size that is given at the file's end."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**17))
        end = file.read()
    at = len(end) - 22 if end[-22:].startswith(b"PK\5\6") else end.rfind(b"PK\5\6")
    if at < 0:
        raise ValueError("it is no zip file")
    (size,) = struct.unpack_from("<I", end, at + 12)
    if end[max(0, at - 76) :].startswith(b"PK\6\6"):  # of more than 4 GiB
        (size,) = struct.unpack_from("<Q", end, at - 76 + 40)
    if size > LARGEST_DIRECTORY:
        raise ValueError("its list of records is too long")


def check_list(code: bytes) -> None:
    """UnpicklingError if the list of tensors is not one that torch.save writes: what it names, and
    what it takes for a key, which can be small here and take forever to hash or to print."""
    stack, memo = [], {}  # of each value how many strings and numbers it has; inf: it has others
    for operation, argument, _ in pickletools.genops(code):
        name, before, taken = operation.name, operation.stack_before, []
        if pickletools.markobject in before:
            while (value := stack.pop()) != "mark":
                taken.append(value)
            before = before[: before.index(pickletools.markobject)]
        taken += [stack.pop() for _ in before]  # the newest first
        keys = {"SETITEMS": taken[1:-1:2], "SETITEM": taken[1:2], "BINPERSID": taken}.get(name, [])
        if any(key > LARGEST_KEY for key in keys):
            raise pickle.UnpicklingError
        if name == "GLOBAL" and not OF_TENSORS.fullmatch(argument):
            raise pickle.UnpicklingError
        if name == "MARK":
            stack.append("mark")
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in TUPLES:
            stack.append(1 + sum(taken))
        elif name in ATOMS:
            stack.append(1)
        elif name in OTHERS:
            stack += [math.inf] * len(operation.stack_after)
        else:
            raise pickle.UnpicklingError


def span(tensor: Tensor) -> int:
    """Values of its storage from its first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))


def tensor_records(archive: zipfile.ZipFile) -> set[tuple[int, int]]:
    """Where in the file the bytes of its storages begin, and their number.

    ValueError unless its records lie as torch.save writes them, one behind the other: torch takes
    places from the headers of records as they are, and a wrong one would be other weights.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    ends = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
    records = set()
    for entry, end in zip(entries, ends):
        archive.fp.seek(entry.header_offset)
        begin, name_size, extra_size = struct.unpack("<4s22xHH", archive.fp.read(30))
        name = archive.fp.read(name_size)
        start = entry.header_offset + 30 + name_size + extra_size
        # Its size and CRC are repeated after a record that was written before they were known.
        behind = (16, 24) if entry.flag_bits & 8 and entry.file_size else (0,)
        if (
            (begin, name) != (b"PK\3\4", entry.orig_filename.encode())
            or entry.compress_type != zipfile.ZIP_STORED
            or end - start - entry.file_size not in behind
        ):
            raise ValueError(
                f"its record {one_line(entry.filename)} is not as torch.save writes it"
            )
        if "/data/" in entry.filename:
            records.add((start, entry.file_size))
        elif entry.file_size > LARGEST_PICKLE:
            raise ValueError(f"its record {one_line(entry.filename)} is too long")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("it has two records of one name")
    return records


def some_of(names: list[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(map(one_line, names[:3]))
    return shown + f" and {len(names) - 3} more" * (len(names) > 3)


def one_line(name: str, most: int = 80) -> str:
    """So much of a text that a file gives, as a part of one line."""
    return repr(name[:most])[1:-1]
