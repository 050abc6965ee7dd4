"""Reads what one shard holds: a list of tensors, and the bytes of each when their turn comes.

A shard is a zip file that torch.save (1.6 and later) wrote of a flat dict of tensors: `data.pkl` is
a pickle that lists them, and each storage is an uncompressed record of raw bytes. Nothing in it is
trusted or run. `tensors_of` walks the pickle's operations, knows those of such a dict alone and
makes each tensor a `Piece`: a place in the file with a type and a shape.
"""

import ctypes
import io
import math
import pickletools
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor

from llama.tokenizer import read_bytes

# What is found in place of a shard, by its first bytes.
NOT_SHARDS = {
    b"<": "a web page",
    b"version https://git-lfs": "a git-lfs pointer",
    b"\x80": "in torch's format before 1.6",
}
LARGEST_LIST = 2**20  # bytes; the list of 65B's tensors takes 2**17
LARGEST_DIRECTORY = 2**22  # bytes; that of 65B in one file takes 2**17
MOST_DIMENSIONS = 8
LARGEST_SPAN = 4  # values from a tensor's first to its last for each of its own


class NotTensors(ValueError):
    """A list that holds something other than a flat dict of tensors."""


class Buffer:
    """Memory that one thread uses again for block after block. In fresh memory, which the kernel
    gives page by page, quantizing took twice as long; views are kept since each call of torch costs
    a thread among others 33 us, the wait for Python (16 cores of an H200 machine, 2026-11-23)."""

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self.memory: Tensor | None = None
        self.views: dict[tuple, Tensor] = {}

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The memory in this shape; what an earlier view held is lost."""
        if (shape, dtype) not in self.views:
            nbytes = math.prod(shape) * dtype.itemsize
            if self.memory is None or self.memory.nbytes < nbytes:
                self.memory = torch.empty(
                    nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned
                )
                self.views = {}
            self.views[shape, dtype] = self.memory[:nbytes].view(dtype).view(shape)
        return self.views[shape, dtype]


@dataclass(frozen=True)
class Piece:
    """A tensor of a shard, or some of its rows, as a place in the file."""

    path: Path
    offset: int  # of its first value, in bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in values

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        return self.stride == tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    def as_matrix(self) -> "Piece":
        """A vector as one row."""
        if len(self.shape) == 2:
            return self
        return replace(self, shape=(1, *self.shape), stride=(math.prod(self.shape), *self.stride))

    def split(self, rows: int) -> list["Piece"]:
        step = self.stride[0] * self.dtype.itemsize
        return [
            replace(
                self,
                offset=self.offset + first * step,
                shape=(min(rows, self.shape[0] - first), *self.shape[1:]),
            )
            for first in range(0, self.shape[0], rows)
        ]

    def read(self, buffer: Buffer) -> Tensor:
        """Its values, in the buffer."""
        values = buffer.view((span(self.shape, self.stride),), self.dtype)
        self.read_into(values)
        return values.as_strided(self.shape, self.stride)

    def read_into(self, out: Tensor) -> None:
        """Fills out, contiguous, with the file's bytes from the piece's first value on. It reads
        rather than maps the file: where a disk fails, touching a mapping would kill the process."""
        bytes_ = memoryview((ctypes.c_char * out.nbytes).from_address(out.data_ptr())).cast("B")
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
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


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Values of its storage from a tensor's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride)) if all(shape) else 0


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
    if absent := sorted(set(expected) - set(names)):
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
        with CappedReader(io.FileIO(path)) as file:
            records = records_of(file)
            if "byteorder" in records and content(file, *records["byteorder"]) != b"little":
                raise ValueError("its numbers are of another byte order")
            if "data.pkl" not in records:
                raise ValueError("it has no list of tensors")
            tensors = tensors_of(content(file, *records["data.pkl"]), records, path)
    except NotTensors as error:
        raise ValueError(
            f"{path} holds more than a flat dict of tensors ({one_line(str(error))}), none of it "
            "was run: pass Meta's original checkpoint"
        ) from None
    except Exception as error:  # a damaged file can raise any
        reason = one_line(str(error) or repr(error), 160)
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or not a checkpoint ({reason}): "
            "compare it with checklist.chk, download it again"
        ) from None
    return {name: piece for name, piece in tensors.items() if not name.endswith("rope.freqs")}


class CappedReader(io.BufferedReader):
    """Gives at most LARGEST_DIRECTORY bytes at once: zipfile takes the length of a directory from
    the file."""

    def read(self, size: int = -1) -> bytes:
        return super().read(LARGEST_DIRECTORY if size < 0 else min(size, LARGEST_DIRECTORY))


def records_of(file: io.BufferedReader) -> dict[str, tuple[int, zipfile.ZipInfo]]:
    """Where the bytes of a zip file's records begin, by their names without folder and in lower
    case, as torch looks for them. ValueError unless they are as torch.save writes them, one behind
    the other from the file's start: a place that is wrong would be other weights."""
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    ends = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
    folders, records = set(), {}
    for entry, end in zip(entries, ends):
        file.seek(entry.header_offset)
        mark, name_size, extra_size = struct.unpack("<4s22xHH", file.read(30))
        name = file.read(name_size).decode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        offset = entry.header_offset + 30 + name_size + extra_size
        file.seek(offset + entry.file_size)
        # Size and CRC are repeated behind a record that was written before they were known.
        repeated = entry.flag_bits & 8 and entry.file_size and file.read(4) == b"PK\7\10"
        if (
            (mark, name) != (b"PK\3\4", entry.orig_filename)
            or entry.compress_type != zipfile.ZIP_STORED
            or entry.compress_size != entry.file_size
            or end - offset - entry.file_size not in ((16, 24) if repeated else (0,))
        ):
            raise ValueError(f"its record {one_line(name)} is not as torch.save writes it")
        folder, _, name = name.partition("/")
        folders.add(folder)
        records[name.lower()] = offset, entry
    if len(folders) != 1 or len(records) < len(entries) or entries[0].header_offset:
        raise ValueError("its records are not one folder of files of different names")
    return records


def content(file: io.BufferedReader, offset: int, entry: zipfile.ZipInfo) -> bytes:
    """A whole record that is no storage."""
    if entry.file_size > LARGEST_LIST:
        raise ValueError(f"{entry.file_size:,} bytes are too long a list of tensors")
    file.seek(offset)
    read = file.read(entry.file_size)
    if entry.CRC and zlib.crc32(read) != entry.CRC:  # torch.save may omit it
        raise ValueError("its list of tensors has a bad CRC-32")
    return read


def tensors_of(code: bytes, records: dict, path: Path) -> dict[str, Piece]:
    """The tensors that a pickle lists, made of strings, numbers, tuples and dicts. The type of a
    value is checked first: to hash, compare or print a tuple of tuples can take forever."""
    stack, memo = [], {}
    for operation, argument, _ in pickletools.genops(code):
        before, taken = operation.stack_before, []
        if pickletools.markobject in before:
            while (value := stack.pop()) is not pickletools.markobject:
                taken.append(value)
            before = before[: before.index(pickletools.markobject)]
        taken += [stack.pop() for _ in before]
        taken.reverse()
        match operation.name:
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "GLOBAL":
                if argument not in GLOBALS:
                    raise NotTensors(argument)
                stack.append(GLOBALS[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                stack.append(pickletools.markobject)
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                target, *items = taken
                if not all(type(name) is str for name in items[::2]):
                    raise NotTensors("a name that is no text")
                target.update(zip(items[::2], items[1::2]))
                stack.append(target)
            case "BINPERSID":
                stack.append(storage(*taken[0], records, path))
            case "REDUCE":
                function, arguments = taken
                if type(function) is not FunctionType:
                    raise NotTensors("a call of what is no function")
                stack.append(function(*arguments))
            case "BUILD":  # attributes of an OrderedDict, as a module's state_dict() has them
                stack.append(taken[0])
            case "STOP":
                [tensors] = taken
            case "PROTO":
                pass
            case other:
                raise NotTensors(f"the pickle operation {other}")
    if type(tensors) is not dict or not all(type(x) is Piece for x in tensors.values()):
        raise NotTensors("what is no tensor")
    return tensors


def storage(kind: str, dtype: torch.dtype, key: str, _, size: int, records: dict, path: Path):
    """A storage, all its numbers in one row."""
    if [type(x) for x in (kind, dtype, key, size)] != [str, torch.dtype, str, int]:
        raise NotTensors("a storage of another kind")
    offset, entry = records.get(f"data/{key}", (0, None)) if len(key) < 20 else (0, None)
    if kind != "storage" or entry is None or entry.file_size != size * dtype.itemsize:
        raise ValueError(f"no record is its storage {one_line(key)}")
    return Piece(path, offset, dtype, (size,), (1,))


def view(storage: Piece, first: int, shape: tuple, stride: tuple, _grad, _hooks, bits=None):
    """A tensor in a storage, as torch._utils._rebuild_tensor_v2 makes it."""
    if bits:
        raise NotTensors("a negative or conjugate view")
    if not (type(storage) is Piece and type(shape) is type(stride) is tuple):
        raise NotTensors("a tensor of another kind")
    if not len(shape) == len(stride) <= MOST_DIMENSIONS:
        raise NotTensors(f"a tensor of {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (first, *shape, *stride)):
        raise ValueError("a tensor's shape or place is not of whole numbers")
    values = span(shape, stride)
    if first + values > math.prod(storage.shape) or values > LARGEST_SPAN * math.prod(shape):
        raise ValueError("a tensor is not within its storage, or spread over far more than itself")
    offset = storage.offset + first * storage.dtype.itemsize
    return replace(storage, offset=offset, shape=shape, stride=stride)


# What a list of tensors may name, and what stands for it here: nothing of torch's is called.
TYPES = {name: getattr(torch, name.lower()) for name in "Half BFloat16 Float Double Bool".split()}
TYPES |= {"Byte": torch.uint8, "Char": torch.int8, "Int": torch.int, "Long": torch.long}
GLOBALS = {f"torch {name}Storage": dtype for name, dtype in TYPES.items()} | {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor_v2": view,
    "torch._utils _rebuild_parameter": lambda tensor, grad, hooks: tensor,
}


def some_of(names: list[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(map(one_line, names[:3]))
    return shown + f" and {len(names) - 3} more" * (len(names) > 3)


def one_line(text: str, most: int = 80) -> str:
    """So much of a text that a file gives, as a part of one line."""
    return repr(text[:most])[1:-1]
