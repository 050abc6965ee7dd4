"""What is in a shard? A second reader, which shares no code with `llama.shards`: Python's own zip
files and unpickler, the latter with nothing to call but what is here. Any error: not a shard."""

import io
import math
import pickle
import zipfile
from collections import OrderedDict

import torch

DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


class Storage:
    def __init__(self, dtype, content, size):
        assert type(size) is int and len(content) == size * dtype.itemsize
        self.values = torch.frombuffer(bytearray(content), dtype=dtype) if size else torch.empty(0)
        self.values = self.values.to(dtype)


def tensor(storage, first, shape, stride, _grad, _hooks, metadata=None):
    assert type(storage) is Storage and not metadata
    assert type(shape) is type(stride) is tuple and len(shape) == len(stride)
    for number in (first, *shape, *stride):
        assert type(number) is int and number >= 0
    last = first + sum((n - 1) * step for n, step in zip(shape, stride))
    assert math.prod(shape) <= 10**6 and (0 in shape or last < len(storage.values))
    if 0 in shape:
        assert first <= len(storage.values)
        return torch.empty(shape, dtype=storage.values.dtype)
    return storage.values.as_strided(shape, stride, first).clone()


def parameter(data, _grad, _hooks):
    assert type(data) is torch.Tensor
    return data


def content(archive, name, has_sum=True):
    """Of a record; torch.save may omit its sum."""
    with archive.open(name) as record:
        record._expected_crc = has_sum and record._expected_crc or None
        return record.read()


class Unpickler(pickle._Unpickler):  # that in C takes memory for the largest place in its memo
    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(content(archive, f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        if module == "torch":
            return DTYPES[name]
        return {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): parameter,
        }[module, name]

    def persistent_load(self, place):
        kind, dtype, key, _device, size = place
        assert kind == "storage" and type(key) is str
        return Storage(dtype, content(self.archive, f"{self.folder}/data/{key}", False), size)


def read(path):
    """The tensors of a shard by name."""
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        if f"{folder}/byteorder" in archive.namelist():
            assert content(archive, f"{folder}/byteorder") == b"little"
        found = Unpickler(archive, folder).load()
    assert isinstance(found, dict)
    for name, value in found.items():
        assert type(name) is str and type(value) is torch.Tensor
    return {name: x for name, x in found.items() if not name.endswith("rope.freqs")}
