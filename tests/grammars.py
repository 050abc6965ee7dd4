"""What may a model folder hold? Grammars that write its files, now and then with something else in
a place: a shard field by field and operation by operation, as torch.save may or might have,
params.json key by key, a tokenizer of either kind token by token, an int8 folder tensor by tensor.
"""

import base64
import io
import itertools
import json
import math
import struct
import zlib

import second_reader
import torch
from checkpoints import shapes, tiny_params
from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 7, 12, 255, 256, 2**16, 2**31 - 1, 2**31, 2**40, 2**63])
NAMES = ["norm.weight", "wq", "a", "", "rope.freqs", "x\n\x1b[2J", "é", "a" * 300]


class Writer:
    """In `odd` places of a hundred something else comes."""

    def __init__(self, draw):
        self.draw, self.odd = draw, draw(st.sampled_from([0, 1, 3]))

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def strange(self):
        return self.odd > 0 and self.draw(st.integers(0, 99)) >= 100 - self.odd

    def other(self, value, *others):
        return self.one_of(*others) if self.strange() else value


class ShardWriter(Writer):
    def __init__(self, draw):
        super().__init__(draw)
        self.places = itertools.count()

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


CALLS = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)


class FolderWriter(Writer):
    """The other files of a model folder."""

    # params.json: the text of a JSON object.

    def json(self, value):
        if isinstance(value, dict):
            pairs = [f"{self.json(k)}:{self.space()}{self.json(x)}" for k, x in value.items()]
            pairs += [self.one_of("", '"dim": 8', "7", "}", '"dim"')] if self.strange() else []
            return f"{{{f',{self.space()}'.join(pairs)}}}"
        return self.other(json.dumps(value), "NaN", "-Infinity", "01", "'a'", "1e999", '"\\ud800"')

    def space(self):
        return self.other(self.one_of("", " ", "\n"), "\t\r ", "//", "\0", "\xa0")

    def params(self):
        self.odd *= 4  # it has few places
        n_heads, width = self.one_of(1, 2, 6, 32), self.one_of(2, 8, 128)
        values = {"dim": n_heads * width, "n_layers": self.one_of(1, 40, 1000), "n_heads": n_heads}
        values["norm_eps"] = self.one_of(1e-5, 1e-6, 0.1)
        more = {
            "vocab_size": self.one_of(-1, WORDS),
            "multiple_of": self.one_of(1, 256, 4096),
            "n_kv_heads": self.one_of(*(n for n in (1, 2, 8) if n_heads % n == 0), None),
            "ffn_dim_multiplier": self.one_of(1.3, 1, 0.5, None),
            "rope_theta": self.one_of(10000, 5e5),
            "use_scaled_rope": self.draw(st.booleans()),
            "max_seq_len": self.one_of(2048, None),
            "max_batch_size": 32,
        }
        values |= {key: more[key] for key in self.draw(st.sets(st.sampled_from([*more])))}
        for key in [*values]:
            if self.strange():
                values[key] = self.one_of(0, -1, 1.5, 3, 2**70, "4", None, True, [1], {}, 1e-300)
            if self.strange():
                del values[key]
            if self.strange():
                values[self.one_of("Dim", "moe", "lora_args", "int8_format", "\x1b[2J")] = 1
        values = {key: values[key] for key in self.draw(st.permutations([*values]))}
        text = self.json({"model": values} if self.strange() else values)
        text = self.other(text, text[:-1], f"[{text}]", f"{text},", "", "null")
        return text.encode(self.other(self.one_of("utf-8", "utf-8-sig"), "utf-16"))

    # tokenizer.model of the kind of Llama 3: a token and its rank a line.

    def ranks(self):
        first = self.draw(st.integers(0, 255))
        tokens = [bytes([byte ^ first]) for byte in range(256)]
        for _ in range(self.draw(st.integers(0, 40))):
            a, b = (self.one_of(*tokens[-20:], b"a", b"b", b" ", b"\xc3", b"\xa9") for _ in "ab")
            tokens += [a + b] if a + b not in tokens else []
        lines = [base64.b64encode(token) + b" %d" % n for n, token in enumerate(tokens)]
        for _ in range(self.draw(st.integers(0, self.odd))):
            place = self.draw(st.integers(0, len(lines) - 1))
            token, rank = lines[place].split(b" ") if b" " in lines[place] else (b"", b"")
            odd = [b"", token, rank, token + b"  " + rank, token + b" " + rank + b"\t"]
            odd += [b"YWI= " + rank, token[:-1] + b" " + rank, token + b" 0" + rank, b"= " + rank]
            odd += [token + b" -1", token + b" 1_0", b"YWI " + rank, b"\xff " + rank, b"Y-_= 9"]
            lines[place : place + self.one_of(0, 1, 1)] = [self.one_of(*odd)] * self.one_of(0, 1, 2)
        end = self.one_of(b"\n", b"\r\n")
        content = end.join(lines) + self.one_of(end, b"")
        return self.other(content, content[:-9], end + content, content + end, content[:300])

    # tokenizer.model of the kind of LLaMA: a protobuf message.

    def varint(self, n):
        n, code = n % 2**64, b""
        while n >= 128:
            n, code = n >> 7, code + bytes([n & 127 | 128])
        return code + bytes([n])

    def field(self, number, value):
        """value is the content of a message or a text, a whole number or a score."""
        if isinstance(value, float):
            return self.varint(number << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, int):
            return self.varint(number << 3) + self.varint(value)
        return self.varint(number << 3 | 2) + self.varint(len(value)) + value

    def odd_field(self, number, value):
        length = value if isinstance(value, bytes) else b""
        wrong = self.varint(number << 3 | 2) + self.varint(self.one_of(0, 3, 2**31)) + length
        others = (
            self.field(99, value),
            self.field(number + 1, value),
            self.field(0, value),
            b"",
            wrong,
        )
        return self.one_of(*others, self.field(number, self.one_of(b"x", 7, math.nan, 1e30)))

    def sentencepiece(self):
        letters = [*"ab e\u2581\xe9\u65e5"]
        pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
        has_bytes = self.draw(st.booleans())
        pieces += [(f"<0x{byte:02X}>", 6) for byte in range(256 * has_bytes)]
        names = letters[: self.draw(st.integers(1, len(letters)))]
        for _ in range(self.draw(st.integers(0, 30))):
            name = self.one_of(*names) + self.one_of(*names[-10:])
            names += [name] if name not in names else []
        pieces += [(name, 1) for name in self.draw(st.permutations(names))]
        places = st.integers(0, len(pieces) - 1)
        for _ in range(self.draw(st.integers(0, self.odd))):
            place = self.draw(places)
            odd = ("", 1), ("a", 1), ("<s>", 1), ("<0x41>", 6), ("zz", 4), ("b", 5), ("\u2581a", 9)
            pieces[place : place + self.one_of(0, 1)] = [self.one_of(*odd)]
        content, odd = b"", self.draw(st.sets(places, max_size=self.odd))
        for n, (name, kind) in enumerate(pieces):
            field = self.odd_field if n in odd else self.field
            message = field(1, name.encode()) + field(2, float(-n if kind == 1 else 0))
            content += field(1, message + (field(3, kind) if kind != 1 else b""))
        ids = {40: 0, 41: 1, 42: 2, 43: -1}
        trainer = {3: self.other(2, 1, 3, 4, 0), 35: int(has_bytes)} | ids
        trainer |= self.other({}, {46: b"<bos>"}, {47: b"a"})
        rules = {1: b"identity", 2: b"", 4: self.other(0, 1)} | self.other({}, {3: 0}, {5: 0})
        for number, values in ((2, trainer), (3, rules)):
            some = [self.other(self.field, self.odd_field)(*item) for item in values.items()]
            content += self.other(self.field, self.odd_field)(number, b"".join(some))
        return self.other(content, content[:-3], content[:1000], content + b"\x08\1", content * 2)

    # A folder that llama.quantize may have written.

    def numbers(self, shape, dtype):
        """Few, again and again: drawing each one would take hypothesis seconds."""
        count, some = math.prod(shape), [self.draw(st.integers(-127, 127)) for _ in range(7)]
        if dtype.is_floating_point:
            some = [n / 100 for n in some]
        x = torch.tensor(some).repeat(-(-count // 7) or 1)[:count].reshape(shape).to(dtype)
        if count and self.strange():
            odd = (
                (65504.0, 65505.0, math.nan, -math.inf, -0.0)
                if dtype.is_floating_point
                else (-128,)
            )
            x.view(-1)[count // 2] = self.one_of(*odd)
        return x

    def tensor(self, name, shape):
        """The tensors of a weight by their names."""
        if len(shape) == 1 or name.startswith("tok"):
            dtype = self.one_of(torch.float16, torch.bfloat16, torch.float32)
            tensors = {name: self.numbers(shape, self.other(dtype, torch.float64, torch.int8))}
        else:
            path = name.removesuffix(".weight")
            scales = self.numbers(shape[:1], torch.float32).abs()
            codes = self.numbers(shape, self.other(torch.int8, torch.int16, torch.float16))
            kind = torch.tensor(self.other(0, 1, 255)).byte()
            tensors = {name: codes, f"{path}.SCB": scales, f"{path}.weight_format": kind}
        for key in [*tensors]:
            x = tensors[key]
            if self.strange():
                changed = [x.half(), x[None], x.flatten(), x.T.contiguous() if x.dim() == 2 else -x]
                changed += [x[:-1].clone(), torch.cat([x, x])] if x.dim() else []
                tensors[key] = self.one_of(*changed)
            if (
                tensors[key].dim() == 2 and self.draw(st.integers(0, 9)) == 9
            ):  # the same, stored otherwise
                tensors[key] = tensors[key].T.contiguous().T
            if self.strange():
                tensors[self.one_of("", "x", f"{key}s", "norm.weight")] = tensors.pop(key)
        return tensors

    def int8(self):
        """The contents of its files by name, but for the tokenizer's."""
        params = tiny_params(dim=16, n_heads=2, n_layers=1, multiple_of=8)
        named = [self.tensor(name, shape) for name, shape in shapes(params, WORDS).items()]
        tensors = [item for weight in named for item in weight.items()]
        if self.draw(st.booleans()):
            tensors = self.draw(st.permutations(tensors))
        count = self.one_of(1, 2, 3, 7)
        files = [dict(tensors[place::count]) for place in range(count)]
        if self.strange():
            files.append(self.one_of(*files))
        if self.strange():
            files.pop(self.draw(st.integers(0, len(files) - 1)))
        params["int8_format"] = self.other(1, 2, "1", None)
        params |= self.other({}, {"dim": 32}, {"n_layers": 2}, {"n_kv_heads": 1})
        contents = {"params.json": json.dumps(params).encode()}
        for place, tensors in enumerate(files):
            file = io.BytesIO()
            torch.save(tensors, file)
            contents[f"consolidated.{place:02d}.pth"] = file.getvalue()
        return contents


WORDS = 512  # of the tokenizer beside such a folder


@st.composite
def written(draw, writer, part):
    """What the method of a writer that has the name `part` writes."""
    return getattr(writer(draw), part)()
