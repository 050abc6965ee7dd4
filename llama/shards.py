"""Reads what one shard holds: first the list of its tensors, later the bytes of each.

A shard is a zip file that torch.save (1.6 and later) wrote of a flat dict of tensors: `data.pkl` is
a pickle that lists them, and each storage is an uncompressed record of raw bytes. Nothing in it is
trusted or run. `tensors_of` walks the pickle's operations, knows those of such a dict alone and
makes each tensor a `StoredTensor`: a place in the file with a type and a shape.
"""

import ctypes
import io
import math
import pickletools
import threading
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

# What is found in place of a shard, by its first bytes, and what to do.
NOT_SHARDS = {
    b"<": "a web page, not a checkpoint: download it again",
    b"version https://git-lfs": "a git-lfs pointer, not a checkpoint: download it again",
    b"\x80": "in torch's format before 1.6, not a later one: load it with torch, save it again",
}
LARGEST_LIST = 2**20  # bytes; the list of 65B's tensors takes 2**17
LARGEST_DIRECTORY = 2**22  # bytes; that of 65B in one file takes 2**17
MOST_DIMENSIONS = 8
LARGEST_SPAN = 4  # values from a tensor's first to its last for each of its own
OTHER = "it holds more than a flat dict of tensors"


class Buffer(threading.local):
    """Memory that a thread uses again for block after block, each thread its own. In fresh memory,
    which the kernel gives page by page, quantizing took twice as long; views are kept since a call
    of torch costs 33 us, waiting for the GIL, when threads compete (16 cores, H200 machine,
    2026-11-23)."""

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.views: dict[tuple, Tensor] = {}

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The memory in this shape; what an earlier view held is lost."""
        if (shape, dtype) not in self.views:
            nbytes = math.prod(shape) * dtype.itemsize
            if self.memory.nbytes < nbytes:
                self.memory = self.memory.new_empty(nbytes, pin_memory=self.pinned)
                self.views = {}
            self.views[shape, dtype] = self.memory[:nbytes].view(dtype).view(shape)
        return self.views[shape, dtype]


@dataclass(frozen=True)
class StoredTensor:
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

    @property
    def span(self) -> int:
        """Values of its storage from its first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride))

    def split(self, rows: int) -> list["StoredTensor"]:
        """Cuts it into parts of so many rows; the last may have fewer."""
        count, *row = self.shape
        step = self.stride[0] * self.dtype.itemsize
        return [
            replace(self, offset=self.offset + i * step, shape=(min(rows, count - i), *row))
            for i in range(0, count, rows)
        ]

    def read(self, buffer: Buffer) -> Tensor:
        """Its values, in the buffer."""
        values = buffer.view((self.span,), self.dtype)
        self.read_into(values)
        return values.as_strided(self.shape, self.stride)

    def read_into(self, out: Tensor) -> None:
        """Fills out, contiguous, with the file's bytes from the tensor's first value on. It reads
        rather than maps the file: where a disk fails, touching a mapping would kill the process."""
        memory = (ctypes.c_char * out.nbytes).from_address(out.data_ptr())
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                if file.readinto(memory) < out.nbytes:
                    raise OSError("it ends too early, and was longer before")
        except OSError as error:
            raise OSError(
                f"{self.path} could not be read ({error.strerror or error}): look after its disk, "
                "or let whatever writes it end, and load again"
            ) from None


class Storage(StoredTensor):
    """All numbers of a record in one row: what tensors are views of."""


def open_shards(ckpt_dir: Path) -> dict[str, dict[str, StoredTensor]]:
    """File name -> its tensors, none of them read yet."""
    names = sorted(path.name for path in ckpt_dir.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(names))]
    if absent := sorted(set(expected) - set(names)):
        raise FileNotFoundError(
            f"{ckpt_dir} holds {some_of(names)} but not {some_of(absent)}: fetch the missing "
            "shard (download.sh resumes), or move what is no shard elsewhere"
        )
    return {name: open_shard(ckpt_dir / name) for name in expected}


def open_shard(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: replace it by the shard, download.sh fetches it")
    start = read_bytes(path, 64)
    for begin, found in NOT_SHARDS.items():
        if start.startswith(begin):
            raise ValueError(f"{path} is {found}")
    try:
        with CappedReader(io.FileIO(path)) as file:
            records = records_of(file)
            if "byteorder" in records and content(file, *records["byteorder"]) != b"little":
                raise ValueError("its numbers are of another byte order")
            tensors = tensors_of(content(file, *records["data.pkl"]), records, path)
    except Exception as error:  # a damaged file can raise any
        reason = one_line(str(error) or repr(error), 160)
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is cut short, damaged or not a "
            f"checkpoint ({reason}): compare it with checklist.chk, download it again"
        ) from None
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rope.freqs")}


class CappedReader(io.BufferedReader):
    """Gives at most LARGEST_DIRECTORY bytes at once: zipfile takes the length of a directory from
    the file."""

    def read(self, size: int = -1) -> bytes:
        return super().read(LARGEST_DIRECTORY if size < 0 else min(size, LARGEST_DIRECTORY))


def records_of(file: io.BufferedReader) -> dict[str, tuple[int, zipfile.ZipInfo]]:
    """Where the bytes of a zip file's records begin, by their names without folder and in lower
    case, as torch looks for them. ValueError unless they are as torch.save writes them, one behind
    the other from the file's start: a place that is wrong would be other weights."""
    records = {}
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        ends = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
        for entry, end in zip(entries, ends):
            archive.open(entry).close()  # compares the header before the bytes, and stops behind it
            offset, size = file.tell(), entry.file_size
            file.seek(offset + size)
            # Size and CRC are repeated behind a record that was written before they were known.
            gaps = (16, 24) if file.read(4) == b"PK\7\10" else (0,)
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == size
            if not stored or end - offset - size not in gaps:
                raise ValueError(f"its record {entry.orig_filename} is not as torch.save writes it")
            records[entry.orig_filename.partition("/")[2].lower()] = offset, entry
    folders = {entry.orig_filename.partition("/")[0] for entry in entries}
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


def tensors_of(code: bytes, records: dict, path: Path) -> dict[str, StoredTensor]:
    """The tensors that a pickle lists, made of strings, numbers, tuples and dicts. The type of a
    value is checked first: to hash, compare or print a tuple of tuples can take forever."""
    stack, outer, memo, mark = [], [], {}, pickletools.markobject  # outer: stacks below marks
    for operation, argument, _ in pickletools.genops(code):
        before, taken = operation.stack_before, []
        if mark in before:
            taken, stack = stack, outer.pop()
            before = before[: before.index(mark)]
        taken = [stack.pop() for _ in before][::-1] + taken
        match operation.name:
            case "PROTO" if argument <= 5:
                pass
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE" or None)
            case "GLOBAL":
                if argument not in GLOBALS:
                    raise ValueError(f"it names {argument}, which was not run")
                stack.append(GLOBALS[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                outer.append(stack)
                stack = []
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                target, *items = taken
                if not all(type(name) is str for name in items[::2]):
                    raise ValueError(OTHER)
                target.update(zip(items[::2], items[1::2], strict=True))
                stack.append(target)
            case "BINPERSID":
                stack.append(storage(*taken[0], records, path))
            case "REDUCE":
                function, arguments = taken
                stack.append(function(*arguments))  # of GLOBALS: nothing else can be called
            case "BUILD":  # attributes of an OrderedDict, as a module's state_dict() has them
                if [type(x) for x in taken] != [OrderedDict, dict]:
                    raise ValueError(OTHER)
                stack.append(taken[0])
            case "STOP":
                [tensors] = taken
            case other:
                raise ValueError(f"it holds the pickle operation {other}, which was not run")
    if not isinstance(tensors, dict) or not all(type(x) is StoredTensor for x in tensors.values()):
        raise ValueError(OTHER)
    return tensors


def storage(
    kind: str, dtype: torch.dtype, key: str, _device, size: int, records: dict, path: Path
) -> Storage:
    types = [type(x) for x in (kind, dtype, key, size)]
    if types != [str, torch.dtype, str, int] or kind != "storage":
        raise ValueError(OTHER)
    offset, entry = records.get(f"data/{key}", (0, None))
    if entry is None or entry.file_size != size * dtype.itemsize:
        raise ValueError(f"no record is its storage {key}")
    return Storage(path, offset, dtype, (size,), (1,))


def view(
    storage: Storage, first: int, shape: tuple, stride: tuple, _grad, _hooks, bits=None
) -> StoredTensor:
    """A tensor in a storage, as torch._utils._rebuild_tensor_v2 makes it."""
    if bits or [type(x) for x in (storage, shape, stride)] != [Storage, tuple, tuple]:
        raise ValueError(OTHER)
    numbers = all(type(n) is int and 0 <= n < 2**48 for n in (first, *shape, *stride))
    if not numbers or not len(shape) == len(stride) <= MOST_DIMENSIONS:
        raise ValueError("a tensor's shape is not one that a model has")
    offset = storage.offset + first * storage.dtype.itemsize
    tensor = StoredTensor(storage.path, offset, storage.dtype, shape, stride)
    if first + tensor.span > storage.span or tensor.span > LARGEST_SPAN * math.prod(shape):
        raise ValueError("a tensor is not within its storage, or spread over far more than itself")
    return tensor


def parameter(tensor: StoredTensor, _grad, _hooks) -> StoredTensor:
    if type(tensor) is not StoredTensor:
        raise ValueError(OTHER)
    return tensor


# What a list of tensors may name, and what stands for it here: nothing of torch's is called.
GLOBALS = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch BoolStorage": torch.bool,
    "collections OrderedDict": lambda: OrderedDict(),
    "torch._utils _rebuild_tensor_v2": view,
    "torch._utils _rebuild_parameter": parameter,
}


def read_bytes(path: Path, most: int) -> bytes:
    """The first bytes of a file, `most` of them at most; OSError names the file."""
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise type(error)(
            f"{path} could not be read ({error.strerror or error}): look after its disk and "
            "permissions, and run again"
        ) from None


def some_of(names: list[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(map(one_line, names[:3]))
    return shown + f" and {len(names) - 3} more" * (len(names) > 3)


def one_line(text: str, most: int = 80) -> str:
    """The beginning of a text that a file gives, escaped so that it stays on one line."""
    return repr(text[:most])[1:-1]
