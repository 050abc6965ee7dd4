"""What is in a model folder? A second reader, which shares no code with `llama`. Shards: Python's
own zip files and unpickler, the latter with nothing to call but what is here. Tokenizers: a message
of protobuf, and byte-pair encoding as its definition has it. Any error: not such a file."""

import codecs
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict

import byte_pairs
import regex  # comes with tiktoken
import torch
from checkpoints import shapes

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


def params(content, words):
    """What model a params.json describes, by the names of `ModelArgs`. Its JSON is read as Python,
    which has the same numbers and texts."""
    names = {"true": True, "false": False, "null": None, "NaN": math.nan, "Infinity": math.inf}
    values = eval(content.decode("utf-8-sig").replace("\r", " ").replace("\n", " "), names)
    values = values.get("model", values)
    assert values.pop("int8_format", 1) == 1
    for limit in ("max_seq_len", "max_batch_size"):
        values.pop(limit, None)
    found = {"n_kv_heads": None, "vocab_size": -1, "multiple_of": 256, "ffn_dim_multiplier": None}
    found |= {"rope_theta": 10000, "use_scaled_rope": False} | values
    assert found.keys() - {"dim", "n_layers", "n_heads", "norm_eps"} == {
        *("n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"),
        *("rope_theta", "use_scaled_rope"),
    }
    for name in ("dim", "n_layers", "n_heads", "multiple_of"):
        assert type(found[name]) is int and found[name] > 0
    for name in ("norm_eps", "rope_theta"):
        assert type(found[name]) in (int, float) and 0 < found[name] < math.inf
    assert found["ffn_dim_multiplier"] is None or 0 < found["ffn_dim_multiplier"] < math.inf
    heads, of_keys = found["n_heads"], found["n_kv_heads"] or found["n_heads"]
    assert found["n_kv_heads"] != 0 and heads % of_keys == 0 and found["dim"] % (2 * heads) == 0
    assert found["vocab_size"] in (-1, words) and type(found["use_scaled_rope"]) is bool
    return found | {"vocab_size": words}


def lowest_first(parts, rank):
    """Byte-pair encoding: joins the neighbours of the lowest rank, of several the first, as long as
    some have one."""
    parts = [*parts]
    while True:
        ranks = [(rank(a + b), place) for place, (a, b) in enumerate(zip(parts, parts[1:]))]
        _, place = min((each for each in ranks if each[0] is not None), default=(None, None))
        if place is None:
            return parts
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


class Ranks:
    """Llama 3's tokenizer.model."""

    def __init__(self, content):
        self.tokens = []
        for line in content.replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n"):
            token, rank = line.split(b" ")
            assert int(rank) == len(self.tokens) and len(token) % 4 == 0
            self.tokens.append(codecs.decode(token, "base64"))
        self.ids = {token: id for id, token in enumerate(self.tokens)}
        assert len(self.ids) == len(self.tokens) and b"" not in self.ids
        assert all(bytes([byte]) in self.ids for byte in range(256))

    def encode(self, text):
        ids = []
        for word in regex.findall(byte_pairs.PATTERN, text):
            word = word.encode()
            parts = [word[i : i + 1] for i in range(len(word))]
            parts = lowest_first(parts, self.ids.get)
            ids += [self.ids[word]] if word in self.ids else map(self.ids.get, parts)
        return ids


def fields(message, kinds):
    """(number, value) of each known field of a protobuf message, four bytes for a float. kinds has
    those that are known, and how each is written; one that is written otherwise is skipped."""
    place = 0

    def varint():
        nonlocal place
        n = shift = 0
        while True:
            byte, place = message[place], place + 1
            n, shift = n | (byte & 127) << shift, shift + 7
            if byte < 128:
                return n

    while place < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value = varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            assert place + size <= len(message)
            value, place = message[place : place + size], place + size
        if kinds.get(number) == kind:
            yield number, value


class SentencePiece:
    """LLaMA's tokenizer.model, a sentencepiece model; `usual` if texts are encoded as for LLaMA."""

    UNKNOWN, CONTROL, BYTE = 2, 3, 6

    def __init__(self, content):
        self.pieces, trainer, rules = [], {}, {3: 1, 4: 1, 5: 1}
        for number, value in fields(content, {1: 2, 2: 2, 3: 2}):
            if number == 1:
                piece = dict(fields(value, {1: 2, 2: 5, 3: 0}))
                [score], kind = struct.unpack("<f", piece.get(2, bytes(4))), piece.get(3, 1)
                kind = kind if kind in range(1, 7) else 1
                self.pieces.append((piece.get(1, b"").decode(), score, kind))
            elif number == 2:
                trainer |= dict(fields(value, {3: 0, 35: 0, 46: 2, 47: 2}))
            else:
                rules |= dict(fields(value, {3: 0, 4: 0, 5: 0}))
        # Ids are found by name: those of control pieces first.
        kinds = self.UNKNOWN, self.CONTROL, self.BYTE
        self.ids = {name: id for id, (name, _, kind) in enumerate(self.pieces) if kind not in kinds}
        self.special = {name: id for id, (name, _, kind) in enumerate(self.pieces) if kind in kinds}
        names = trainer.get(46, b"<s>"), trainer.get(47, b"</s>")
        self.bos_id, self.eos_id = (self.special[name.decode()] for name in names)
        self.has_bytes = bool(trainer.get(35, 0))
        types = {kind for *_, kind in self.pieces}
        scores = [score for name, score, _ in self.pieces if name in self.ids]
        self.usual = trainer.get(3) == 2 and (rules[3], rules[4], rules[5]) == (1, 0, 1)
        self.usual &= types <= {1, 2, 3, 6} and len({*scores}) == len(scores)

    def encode(self, text):
        text = f"\u2581{text}".replace(" ", "\u2581") if text else ""
        parts = lowest_first(text, self.rank)
        [unknown] = [i for i, (*_, kind) in enumerate(self.pieces) if kind == self.UNKNOWN]
        ids = []
        for part in parts:
            id = self.special.get(part, self.ids.get(part, unknown))
            if id == unknown and self.has_bytes:
                ids += [self.special[f"<0x{byte:02X}>"] for byte in part.encode()]
            elif id != unknown or ids[-1:] != [unknown]:
                ids.append(id)
        return ids

    def rank(self, name):
        return -self.pieces[self.ids[name]][1] if name in self.ids else None

    def decode_twice(self, id):
        name, _, kind = self.pieces[id]
        if kind in (self.UNKNOWN, self.CONTROL):
            return "" if kind == self.CONTROL else " \u2047 " * 2
        if kind == self.BYTE:
            return (2 * bytes.fromhex(name[3:-1])).decode(errors="replace")
        return (2 * name).removeprefix("\u2581").replace("\u2581", " ")


def int8_folder(folder, words):
    """The tensors of the saved int8 form of a model of one layer, by name."""
    found = {}
    for path in folder.glob("consolidated.*.pth"):
        tensors = read(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    described = params((folder / "params.json").read_bytes(), words)
    shapes_of = shapes(described | {"n_layers": 1}, words)
    assert described["n_layers"] == 1
    for name, shape in shapes_of.items():
        path, x = name.removesuffix(".weight"), found[name]
        assert x.shape == shape
        if len(shape) == 1 or name.startswith("tok"):
            assert x.dtype.is_floating_point and x.isfinite().all()
            continue
        scales, layout = found.pop(f"{path}.SCB"), found.pop(f"{path}.weight_format")
        assert x.dtype == torch.int8 and (x != -128).all() and scales.dtype == torch.float32
        assert scales.shape == shape[:1] and (scales >= 0).all() and (scales <= 65504).all()
        assert layout.dtype == torch.uint8 and layout.shape == () and layout == 0
        found[f"{path}.SCB"] = scales
    assert {name for name in found if not name.endswith(".SCB")} == shapes_of.keys()
    return found
