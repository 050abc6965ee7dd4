"""What must a loader refuse? A corpus of spoilt model folders, and a process that tries them.

Each fault spoils a copy of a good folder: "shards" has two shards in Meta's format, "int8" is the
saved form. `python tests/faults.py` reads lines of JSON, [path, use_int8], loads each such folder
and answers with one: what came of it, the seconds it took, and the MiB that the process had at its
peak. What crashes or hangs it ends it, and so is seen too.
"""

import base64
import faulthandler
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import sys
import time
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch

SECONDS, MIB = 5, 1024
# The second of two shards, and of the int8 folder's four files that of layer 0.
SHARD = "consolidated.01.pth"
WQ, W2 = "layers.0.attention.wq", "layers.0.feed_forward.w2"
EMBEDDINGS, NORM = "tok_embeddings.weight", "norm.weight"


def instead(file, make):
    """What make(path) makes in the file's place."""

    def spoil(folder):
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return spoil


folder_for, pipe_for = (partial(instead, make=make) for make in (Path.mkdir, os.mkfifo))


def linked(file, target):
    return instead(file, lambda path: path.symlink_to(target))


def put(file, content):
    content = content.encode() if isinstance(content, str) else content
    return instead(file, lambda path: path.write_bytes(content))


def edit(file, function):
    return lambda folder: put(file, function((folder / file).read_bytes()))(folder)


def cut(file, share):
    """Keeps that share of a file, or, negative, all but so many bytes."""
    return edit(file, lambda content: content[: int(share * len(content)) if share > 0 else share])


def params(**changes):
    """Values for keys of params.json; one that is ... removes the key."""

    def change(content):
        changed = json.loads(content) | changes
        return json.dumps({k: v for k, v in changed.items() if v is not ...}).encode()

    return edit("params.json", change)


def tensors(function):
    """The shard's dict as function(dict) changes it or what it returns instead."""

    def spoil(folder):
        found = torch.load(folder / SHARD)
        result = function(found)
        torch.save(found if result is None else result, folder / SHARD)

    return spoil


def tensor(name, function):
    return tensors(lambda found: found.update({name: function(found[name])}))


def value(number, name=f"{WQ}.weight"):
    def change(x):
        x.view(-1)[-7] = number
        return x

    return tensor(name, change)


def without(name):
    return tensors(lambda found: {k: x for k, x in found.items() if k != name})


def flipped(place, offset, bits):
    """Flips bits so far behind a place of the shard."""

    def change(content):
        content = bytearray(content)
        content[place(content) + offset] ^= bits
        return bytes(content)

    return edit(SHARD, change)


def entry(content):
    """Where the directory of a zip file has its fifth record."""
    return [found.start() for found in re.finditer(b"PK\1\2", content)][4]


def header(content):
    """Where the header that stands before the bytes of the first tensors begins."""
    return content.rindex(b"PK\3\4", 0, content.index(b"/data/0"))


def rewrite(change=lambda name, old: old, compression=zipfile.ZIP_STORED, more=(), names=str):
    """Writes a shard's zip again with records as change(name, content) gives them, and more."""

    def spoil(folder):
        with zipfile.ZipFile(folder / SHARD) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(folder / SHARD, "w", compression) as archive:
            for name, content in (*records.items(), *more):
                archive.writestr(names(name), change(name, content))

    return spoil


def zipped(**more):
    return rewrite(compression=zipfile.ZIP_DEFLATED, **more)


def pickled(content):
    """A shard whose list of tensors is this pickle."""
    return rewrite(lambda name, old: content if name.endswith("data.pkl") else old)


def twins(times, before=b""):
    """Code for a tuple of two that are each a tuple of two, and so on; in the memo's place 0."""
    return before + b")q\0" + b"h\0h\0\x86q\0" * times


def calls(function, *arguments):
    """A shard whose list of tensors calls a function when it is unpickled."""

    class Call:
        def __reduce__(self):
            return function, arguments

    return pickled(pickle.dumps({"tok_embeddings.weight": Call()}, 2))


# A list of one tensor of 2 TiB whose storage has two numbers.
TERABYTES = (
    b"\x80\2}X\x0b\0\0\0norm.weightctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storage"
    b"ctorch\nHalfStorage\nX\1\0\0\x000X\3\0\0\0cpuK\2tQK\0\x8a\6"
    + (2**40).to_bytes(6, "little")
    + b"\x85K\1\x85\x89ccollections\nOrderedDict\n)RtRs."
)


def removed(file):
    return lambda folder: (folder / file).unlink()


def renamed(old, new):
    return lambda folder: [(folder / old).rename(folder / new)]


def renamed_all(name):
    return lambda f: [p.rename(f / name.format(i)) for i, p in enumerate(sorted(f.glob("*.pth")))]


def copied(old, new):
    return lambda folder: (folder / new).write_bytes((folder / old).read_bytes())


def sparse(file, size):
    """A file of that size, nearly all of it a hole."""
    return lambda folder: os.truncate(folder / file, size)


def directory_of_gigabytes(folder):
    """At least by the zip file's end, and zeros."""
    sparse(SHARD, 2**32)(folder)
    with (folder / SHARD).open("ab") as file:
        file.write(b"PK\5\6" + bytes(8) + (2**31).to_bytes(4, "little") + bytes(6))


PAGE = "<!DOCTYPE html><html><body>403 Forbidden</body></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476939516\n"
DAMAGED = rf"{SHARD} \([\d,]+ bytes\) is cut short, damaged or not a checkpoint"
RUNS = DAMAGED + r" \((it holds more than a flat dict of tensors|.+, which was not run)\)"
UNLIKE = rf"{SHARD} and params.json do not belong together"
NOT_FINITE = "holds values that are not finite in fp16"
NOT_OURS = "holds codes or scales that bitsandbytes makes of no fp16 weights"
BYTES = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))  # Llama 3's kind
KIND = "expected torch.float16 or torch.bfloat16 or torch.float32: pass Meta's original"
EITHER = f"in consolidated.00.pth or {SHARD}"  # of a matrix that is read from both
CANARY = "/tmp/faults.canary"  # that nothing may make

# What the message says -> what is wrong -> what spoils a folder of shards so.
SHARDS = {
    r"params.json is not a JSON object \(.*\): download it again": {
        "params cut short": cut("params.json", 0.5),
        "params empty": put("params.json", ""),
        "params a web page": put("params.json", PAGE),
        "params a git-lfs pointer": put("params.json", POINTER),
        "params in UTF-16": edit("params.json", lambda c: c.decode().encode("utf-16")),
        "params in zeros": put("params.json", bytes(200)),
        "params a number of 10,000 digits": put("params.json", '{"dim": ' + "9" * 10**4),
        "params nested 100,000 deep": put("params.json", '{"a":' * 10**5),
        "params a list": put("params.json", "[4096]"),
        "params null": put("params.json", "null"),
        "params nested, no object": put("params.json", '{"model": 7}'),
        "params of a gigabyte": sparse("params.json", 2**30),
    },
    "no params.json in": {
        "params a folder": folder_for("params.json"),
        "params a symlink to itself": linked("params.json", "params.json"),
        "params a pipe": pipe_for("params.json"),
        "params absent": removed("params.json"),
    },
    "params.json lacks dim, n_layers, n_heads, norm_eps": {
        "params nested twice": put("params.json", '{"model": {"model": {"dim": 64}}}')
    },
    "params.json lacks dim": {"keys of escape codes": params(**{"\x1b[2J\n": 1}, dim=...)},
    "params.json lacks dim: download it again": {"dim absent": params(dim=...)},
    r"asks for \(4096, 131072\) from 2 shards together": {"dim the largest": params(dim=2**17)},
    "expected heads of one even width": {"dim odd": params(dim=66, n_heads=22)},
    r"asks for \(17024, 64\) from 2 shards": {"wide feed forward": params(ffn_dim_multiplier=100)},
    "belong together: missing layers.2.* and 8979 more": {"1,000 layers": params(n_layers=1000)},
    "missing nothing, left over layers.1.": {"one layer less": params(n_layers=1)},
    "n_kv_heads to divide n_heads": {"heads of keys 3 of 4": params(n_kv_heads=3)},
    "params.json has moe_args, as another model has: pass the": {
        "a key unknown": params(moe_args={})
    },
    "has vision_chunk_size, vision_max_num_chunks, as a model that sees images has: pass the": {
        "a model of images": params(vision_chunk_size=448, vision_max_num_chunks=4)
    },
    r"model with adapters \(LoRA\)": {"a model with adapters": params(lora_args={"rank": 16})},
    "has lora_args, quantization_args, as a model that Meta quantized has": {
        "a model that was quantized": params(quantization_args={"group_size": 32}, lora_args={})
    },
    "use_scaled_rope is 1, expected true or": {
        "rope scaled by a number": params(use_scaled_rope=1)
    },
    "params.json asks for 32000": {"vocabulary another": params(vocab_size=32000)},
    r"the tokenizer has 4096 pieces, params.json asks for 128256: pass the tokenizer.model": {
        "vocabulary of Llama 3": params(vocab_size=128256)
    },
    "is of int8 format 'x+'?, this": {"format of int8 unknown": params(int8_format="x" * 10**4)},
    DAMAGED: {
        "shard empty": put(SHARD, ""),
        "shard of zeros": put(SHARD, bytes(10**5)),
        "shard of 64 GiB of hole": sparse(SHARD, 2**36),
        "shard a plain zip": lambda f: zipfile.ZipFile(f / SHARD, "w").writestr("a.txt", "text"),
        "shard that unzips to 1 GB": zipped(more=[("archive/version", bytes(2**30))]),
        "shard with something before it": edit(SHARD, lambda c: b"\r\n" + c),
        "shard as text": edit(SHARD, lambda c: c.replace(b"\n", b"\r\n")),
        "shard without tensors' bytes": edit(SHARD, lambda c: c.replace(b"/data/1", b"/data/a")),
        "list of tensors absent": rewrite(names=lambda name: name.replace("data.pkl", "x.pkl")),
        "list of tensors empty": pickled(b""),
        "list of tensors cut short": pickled(b"\x80\2}q\0(X"),
        "a directory of 2 GB": directory_of_gigabytes,
        "more than its storage": pickled(TERABYTES),
        **{f"shard cut to {n:g}": cut(SHARD, n) for n in (0.0001, 0.01, 0.1, 0.5, 0.9, 0.99)},
        "shard cut to 0.999": cut(SHARD, 0.999),
        **{f"shard less {-n} bytes": cut(SHARD, n) for n in (-1, -22, -100, -1000)},
        "directory: mark": flipped(entry, 0, 1),
        "directory: method": flipped(entry, 10, 8),
        "directory: stored size": flipped(entry, 20, 64),
        "directory: size": flipped(entry, 24, 64),
        "directory: length of the name": flipped(entry, 28, 1),
        "directory: length of the extra field": flipped(entry, 30, 16),
        "directory: place": flipped(entry, 42, 64),
        "directory: place, far": flipped(entry, 45, 64),
        "directory: name": flipped(entry, 46, 1),
        "record: mark": flipped(header, 3, 1),
        "record: length of the name": flipped(header, 26, 1),
        "record: length of the extra field": flipped(header, 28, 64),
        "record: length of the extra field, by 16": flipped(header, 28, 16),
        "record: name": flipped(header, 30, 1),
    },
    f"{SHARD} is a web page, not a checkpoint": {"shard a web page": put(SHARD, PAGE)},
    f"{SHARD} is a git-lfs pointer": {"shard a git-lfs pointer": put(SHARD, POINTER)},
    f"{SHARD} is not a file": {
        "shard a folder": folder_for(SHARD),
        "shard a symlink to itself": linked(SHARD, SHARD),
        "shard a pipe": pipe_for(SHARD),
        "shard a device": linked(SHARD, "/dev/zero"),
    },
    "holds consolidated.00.pth, consolidated.1.pth but not consolidated.01.pth": {
        "shard by another name": renamed(SHARD, "consolidated.1.pth")
    },
    "from 3 shards together: take all files": {"shard more": copied(SHARD, "consolidated.02.pth")},
    "but not consolidated.02.pth": {"shard more by number": copied(SHARD, "consolidated.05.pth")},
    r"\(it is one of 2 shards\), but params.json asks for .*: take all files": {
        "shard less": removed(SHARD)
    },
    "holds consolidated.01.pth but not consolidated.00.pth": {
        "shard first gone": removed("consolidated.00.pth")
    },
    r"no consolidated.\*.pth in": {
        "shards all gone": lambda f: [path.unlink() for path in f.glob("*.pth")],
        "folder above": lambda f: f.parent,
    },
    r"\(it holds a\\n\\x1b\[2J, params.json, tokenizer.model\)": {
        "shards gone, strange names": renamed_all("a\n\x1b[2J")
    },
    f"{SHARD} is in torch's format before 1.6, .*: load it with torch, save it again$": {
        "shard in torch's old format": lambda f: torch.save(
            torch.load(f / SHARD), f / SHARD, _use_new_zipfile_serialization=False
        )
    },
    rf"{DAMAGED} \(its record \S+ is not as torch.save writes it\)": {
        "shard zipped again": zipped()
    },
    DAMAGED + r" \(its records are not one folder of files of different names\)": {
        "shard with a record twice": rewrite(more=[("consolidated.01/data/0", b"")]),
        "two lists of tensors": rewrite(more=[("shard/zz/data.pkl", b"\x80\2}.")]),
    },
    DAMAGED + r" \(its numbers are of another byte order\)": {
        "big-endian shard": rewrite(lambda name, old: b"big" if name.endswith("order") else old)
    },
    "bad CRC": {"list of tensors changed": edit(SHARD, lambda c: c.replace(b".wq.", b".wk.", 1))},
    "are too long a list": {"list of tensors of a gigabyte": pickled(bytes(2**21))},
    f"{DAMAGED}|{RUNS}": {
        "shard in TorchScript": lambda f: torch.jit.save(
            torch.jit.script(torch.nn.Linear(2, 2)), f / SHARD
        )
    },
    RUNS: {
        "code: os.system": calls(os.system, f"touch {CANARY}"),
        "code: open": calls(open, CANARY, "w"),
        "code: eval": calls(eval, f"open({CANARY!r}, 'w')"),
        "code: torch.load": calls(torch.load, "consolidated.00.pth"),
        "code: protocol 0": pickled(f"cposix\nsystem\n(S'touch {CANARY}'\ntR.".encode()),
        "code: protocol 4": pickled(b"\x80\4\x8c\5posix\x8c\6system\x93\x8c\x04true\x85R."),
        "code: INST": pickled(f"(S'touch {CANARY}'\niposix\nsystem\n.".encode()),
        "memory: bytearray": calls(bytearray, 2**31),
        "memory: key of nested tuples": pickled(b"\x80\2})" + b"\x85" * 900_000 + b"Ns."),
        "time: key of a tuple of itself": pickled(b"\x80\2" + twins(60, b"}") + b"Ns."),
        "memory: place of a tuple of itself": pickled(
            b"\x80\2" + twins(25) + b"(X\7\0\0\0storagectorch\nHalfStorage\nh\0X\3\0\0\0cpuK\1tQ."
        ),
        "memory: counts that double": pickled(b"\x80\2" + twins(140_000) + b"."),
        "memory: quantized tensor": calls(
            torch._utils._rebuild_qtensor, None, 0, (2**40,), (1,), (), False, None
        ),
        "memory: nested tensor": tensors(
            lambda found: {k: x.to_sparse() for k, x in found.items()}
        ),
        "a list": tensors(lambda found: list(found.values())),
        "a tensor": tensors(lambda found: found["norm.weight"]),
        "a number for a tensor": tensors(lambda found: found | {"norm.weight": 3}),
        "a dict in a dict": tensors(lambda found: {"model": found}),
        "names that are numbers": tensors(lambda found: dict(enumerate(found.values()))),
        "complex": tensor(NORM, lambda x: x.to(torch.complex64)),
        "float8": tensor(NORM, lambda x: x.to(torch.float8_e5m2)),
    },
    "a tensor's shape is not one": {
        "1,000 dimensions": tensor(NORM, lambda x: torch.empty([1] * 1000))
    },
    "or spread over far more than itself": {
        "values a thousand apart": tensor(
            EMBEDDINGS, lambda x: torch.empty_strided(x.shape, (1000, 1))
        )
    },
    UNLIKE: {"no tensors": tensors(lambda found: OrderedDict())},
    f"missing {WQ}.weight, left over": {"a tensor absent": without(f"{WQ}.weight")},
    r"left over \\x1b\[2Jx\\n; take": {
        "a tensor left over": tensors(lambda found: found | {"\x1b[2Jx\n": torch.zeros(2)})
    },
    f"{UNLIKE}: missing tok_embeddings.weight, .* left over model.tok_embeddings.weight": {
        "names of transformers": tensors(lambda f: {f"model.{k}": x for k, x in f.items()})
    },
    f"is torch.float64, {KIND}": {"float64": tensor(f"{WQ}.weight", torch.Tensor.double)},
    f"is torch.int8, {KIND}": {"int8 without scales": tensor(f"{WQ}.weight", torch.Tensor.char)},
    f"norm.weight in {SHARD} is torch.bool": {"bool": tensor(NORM, torch.Tensor.bool)},
    rf"{W2}.weight in {SHARD} is \(": {"transposed": tensor(f"{W2}.weight", lambda x: x.T)},
    r"is \(31, 64\), but": {"a row less": tensor(f"{WQ}.weight", lambda x: x[:-1].clone())},
    r"is \(0, \d+\), but": {"no rows": tensor(EMBEDDINGS, lambda x: x[:0].clone())},
    r"is \(1, 32, 64\), but": {"a dimension more": tensor(f"{WQ}.weight", lambda x: x[None])},
    rf"{EMBEDDINGS} in \S+ is \(\), but": {
        "a number for embeddings": tensor(EMBEDDINGS, lambda x: x[0, 0].clone())
    },
    r"the weights have \d+ tokens, the tokenizer \d+": {
        "embeddings of another tokenizer": tensor(EMBEDDINGS, lambda x: x[:-5].clone()),
        "tokenizer of Llama 3": put("tokenizer.model", BYTES),
    },
    "tokenizer.model, line 14 is b'DQ== 1', expected another token": {
        "tokenizer of Llama 3, cut": put("tokenizer.model", BYTES[:100])
    },
    f"{WQ}.weight in {SHARD} {NOT_FINITE}": {
        "NaN in a matrix": value(torch.nan),
        "infinity in a matrix": value(torch.inf),
    },
    f"{EMBEDDINGS} {EITHER} {NOT_FINITE}": {"NaN in embeddings": value(torch.nan, EMBEDDINGS)},
    f"output.weight in {SHARD} {NOT_FINITE}": {"infinite head": value(-torch.inf, "output.weight")},
    f"{W2}.weight {EITHER} {NOT_FINITE}": {
        "beyond fp16": tensor(f"{W2}.weight", lambda x: x.float() * 1e6)
    },
    "safetensors is safetensors, .* not Meta's consolidated.*.pth: pass the model folder": {
        "safetensors": renamed_all("model-{}.safetensors")
    },
    "is safetensors, .* e.g. --ckpt_dir .*tiny/original$": {
        "safetensors beside Meta's": lambda f: [
            shutil.copytree(f, f / "original"),
            renamed_all("model-{}.safetensors")(f),
        ]
    },
    "gguf is a GGUF file, not Meta's": {"GGUF": renamed_all("model-{}.gguf")},
    "x.gguf is a GGUF file, not Meta's .* e.g. --ckpt_dir /w/13B$": {
        "a GGUF file for a folder": lambda f: renamed(SHARD, "x.gguf")(f) and f / "x.gguf"
    },
    "tokenizer .*tokenizer.model does not exist": {
        "tokenizer absent": removed("tokenizer.model"),
        "tokenizer a symlink to itself": linked("tokenizer.model", "tokenizer.model"),
    },
    "tokenizer.model is a folder": {"tokenizer a folder": folder_for("tokenizer.model")},
    r"tokenizer.model \([\d,]+ bytes\) is not a sentencepiece model": {
        "tokenizer a web page": put("tokenizer.model", PAGE),
        "tokenizer a git-lfs pointer": put("tokenizer.model", POINTER),
        "tokenizer that ends within a piece": edit(
            "tokenizer.model", lambda c: c[: len(c) // 2] + b"\n" + b"\xff" * 9 + b"\1"
        ),
    },
    "tokenizer.model": {
        "tokenizer of a gigabyte": sparse("tokenizer.model", 2**32),
        "tokenizer a pipe": pipe_for("tokenizer.model"),
        "tokenizer without its end": cut("tokenizer.model", 0.5),
    },
    "params.json is a file: pass the model folder": {"folder a file": lambda f: f / "params.json"},
    "nothing does not exist: pass the model folder": {"folder absent": lambda f: f / "nothing"},
}
OUT_OF_RANGE = {  # keys of params.json
    "dim": [-64, 0, "64", 64.5, True, None, [64], 10**9],
    "n_layers": [10**12],
    "n_heads": [-4],
    "n_kv_heads": [0, 8],
    "norm_eps": [float("nan"), -1e-5],
    "rope_theta": [0],
    "multiple_of": [0],
    "ffn_dim_multiplier": [1e999],
    "vocab_size": [-2, "all"],
}
for key, numbers in OUT_OF_RANGE.items():
    for number in numbers:
        name = f"{key} is {number!r}"
        message = f"params.json: {re.escape(name)}, expected a (whole )?number, from"
        SHARDS[message] = {name: params(**{key: number})}
INT8 = {
    "params.json is of int8 format 2, this program reads 1": {"format 2": params(int8_format=2)},
    "the int8 files and params.json .* missing norm.weight, output": {
        "last file gone": removed("consolidated.03.pth")
    },
    f"but not {SHARD}": {"a file between gone": removed(SHARD)},
    "missing layers.1.* left over layers.0.": {"file twice": copied(SHARD, "consolidated.02.pth")},
    "missing nothing, left over layers.0.": {"a file more": copied(SHARD, "consolidated.04.pth")},
    f"missing {WQ}.SCB": {
        "a file of shards": tensors(lambda f: {k: x.half() for k, x in f.items() if "SCB" not in k})
    },
    f"missing {WQ}.SCB, left over nothing": {"scales absent": without(f"{WQ}.SCB")},
    f"{WQ}.SCB in {SHARD} is": {"scales short": tensor(f"{WQ}.SCB", lambda x: x[1:].clone())},
    "SCB in .* torch.float16, expected torch.float32: ": {
        "scales in fp16": tensor(f"{WQ}.SCB", torch.Tensor.half)
    },
    f"{WQ}.SCB in {SHARD} {NOT_OURS}": {
        "scale NaN": value(torch.nan, f"{WQ}.SCB"),
        "scale negative": value(-1e-8, f"{WQ}.SCB"),
        "scale beyond fp16": value(65504.004, f"{WQ}.SCB"),
    },
    f"{W2}.weight in {SHARD} {NOT_OURS}": {"code -128": value(-128, f"{W2}.weight")},
    f"ffn_norm.weight in {SHARD} {NOT_FINITE}": {
        "norm infinite": value(torch.inf, "layers.0.ffn_norm.weight"),
        "norm -infinite": value(-torch.inf, "layers.0.ffn_norm.weight"),
    },
    "expected torch.int8": {
        "codes in fp16": tensor(f"{WQ}.weight", torch.Tensor.half),
        "codes in uint8": tensor(f"{WQ}.weight", torch.Tensor.byte),
    },
    f"{W2}.weight in {SHARD}": {"codes transposed": tensor(f"{W2}.weight", lambda x: x.T)},
    r"is not 0 \(by rows\)": {"layout by columns": tensor(f"{WQ}.weight_format", lambda x: x + 1)},
    f"{WQ}.weight_format": {"layout absent": without(f"{WQ}.weight_format")},
    rf"weight_format in {SHARD} is \(2,\)": {
        "layout twice": tensor(f"{WQ}.weight_format", lambda x: x.repeat(2))
    },
    rf"{SHARD} \([\d,]+ bytes\) is cut short, damaged": {"file cut short": cut(SHARD, 0.7)},
    rf"{SHARD} \(0 bytes\) is cut short, damaged": {"file empty": put(SHARD, "")},
    r"but params.json asks for \(\d+, 128\): take": {"dim of another model": params(dim=128)},
    "missing layers.2.attention.wq.weight": {"layers of another model": params(n_layers=3)},
}
FAULTS = {
    (form, name): (spoil, message)
    for form, by_message in {"shards": SHARDS, "int8": INT8}.items()
    for message, spoils in by_message.items()
    for name, spoil in spoils.items()
}


def digest(named):
    """Of tensors by name, whatever their type."""
    total = hashlib.sha256()
    for name in sorted(named):
        total.update(name.encode() + named[name].float().contiguous().numpy().tobytes())
    return total.hexdigest()


def held(model):
    """Every tensor of a model, by the names of the saved int8 form."""
    named = dict(model.named_parameters())
    for path, module in model.named_modules():
        if hasattr(module, "state"):
            named |= {f"{path}.weight": module.state.CB, f"{path}.SCB": module.state.SCB}
    return named


def try_folder(folder, use_int8):
    from llama import LLaMA

    answer = {"kind": None, "message": "", "digest": ""}
    try:
        llm = LLaMA.build(folder, device="cpu", use_int8=use_int8, max_seq_len=16)
        answer["digest"] = digest(held(llm.model))
        llm.generate(["The king"], 2)
    except Exception as error:
        answer |= {"kind": type(error).__name__, "message": str(error)}
    return answer


def main():
    """Memory is limited to 4 GiB more than the start takes: nothing else must suffer here."""
    import llama  # noqa: F401

    resource.setrlimit(resource.RLIMIT_DATA, (5 * 2**30, 5 * 2**30))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        folder, use_int8 = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
        started = time.perf_counter()
        answer = try_folder(folder, use_int8)
        answer["seconds"] = time.perf_counter() - started
        faulthandler.cancel_dump_traceback_later()
        status = Path("/proc/self/status").read_text()
        answer["MiB"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
