"""What must a loader refuse? A corpus of spoilt model folders, and a process that tries them.

Each fault spoils a copy of a good folder: "shards" has two shards in Meta's format, "int8" is the
saved form. `python tests/faults.py` reads lines of JSON, [path, use_int8], loads each such folder
and answers with one: what came of it, the seconds it took, and the MiB that the process had at its
peak. What crashes or hangs it ends it, and so is seen too.
"""

import faulthandler
import hashlib
import json
import os
import pickle
import resource
import shutil
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

SECONDS, MIB = 5, 1024
LAYER = "consolidated.01.pth"  # of the int8 folder: its layer 0
SHARD = "consolidated.01.pth"  # of two
WQ, W2 = "layers.0.attention.wq", "layers.0.feed_forward.w2"


def put(file, content):
    content = content.encode() if isinstance(content, str) else content

    def spoil(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(content)

    return spoil


def cut(file, share):
    """Keeps that share of a file, or, negative, all but so many bytes."""

    def spoil(folder):
        content = (folder / file).read_bytes()
        put(file, content[: int(share * len(content)) if share > 0 else share])(folder)

    return spoil


def edit(file, function):
    return lambda folder: put(file, function((folder / file).read_bytes()))(folder)


def params(**changes):
    """Values for keys of params.json; one that is ... removes the key."""

    def change(content):
        changed = json.loads(content) | changes
        return json.dumps({k: v for k, v in changed.items() if v is not ...}).encode()

    return edit("params.json", change)


def tensors(function, file=SHARD):
    """The file's dict as function(dict) changes it or what it returns instead."""

    def spoil(folder):
        found = torch.load(folder / file)
        result = function(found)
        torch.save(found if result is None else result, folder / file)

    return spoil


def tensor(name, function, file=SHARD):
    return tensors(lambda found: found.update({name: function(found[name])}), file)


def value(number, name=f"{WQ}.weight", file=SHARD):
    def change(x):
        x.view(-1)[7] = number
        return x

    return tensor(name, change, file)


def entry(offset, bits, which=4):
    """Flips bits at this offset of a record's entry in the directory of a zip file."""

    def change(content):
        content, place = bytearray(content), -1
        for _ in range(which + 1):
            place = content.index(b"PK\1\2", place + 1)
        content[place + offset] ^= bits
        return bytes(content)

    return edit(SHARD, change)


def header(offset, bits):
    """Flips bits of the header that stands before the bytes of the first tensors."""

    def change(content):
        content = bytearray(content)
        place = content.rindex(b"PK\3\4", 0, content.index(b"/data/0"))
        content[place + offset] ^= bits
        return bytes(content)

    return edit(SHARD, change)


def rewrite(
    change=lambda name, content: content,
    compression=zipfile.ZIP_STORED,
    more=(),
    names=lambda name: name,
):
    """Writes a shard's zip again with records as change(name, content) gives them, and more."""

    def spoil(folder):
        with zipfile.ZipFile(folder / SHARD) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(folder / SHARD, "w", compression) as archive:
            for name, content in (*records.items(), *more):
                archive.writestr(names(name), change(name, content))

    return spoil


def pickled(content):
    """A shard whose list of tensors is this pickle."""
    return rewrite(lambda name, old: content if name.endswith("data.pkl") else old)


def twins(times, before=b""):
    """Code for a tuple of two that are each a tuple of two, and so on; in the memo's place 0."""
    return before + b")q\0" + b"h\0\x86q\0" * times


def calls(function, *arguments):
    """A pickle that calls a function when it is read."""

    class Call:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps({"tok_embeddings.weight": Call()}, 2)


# A list of one tensor of 2 TiB whose storage has two numbers.
TERABYTES = (
    b"\x80\2}X\x0b\0\0\0norm.weightctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storage"
    b"ctorch\nHalfStorage\nX\1\0\0\x000X\3\0\0\0cpuK\2tQK\0\x8a\6"
    + (2**40).to_bytes(6, "little")
    + b"\x85K\1\x85\x89ccollections\nOrderedDict\n)RtRs."
)


def renamed(old, new):
    return lambda folder: [(folder / old).rename(folder / new)]


def renamed_all(name):
    return lambda f: [p.rename(f / name.format(i)) for i, p in enumerate(f.glob("*.pth"))]


def linked(file, target):
    def spoil(folder):
        (folder / file).unlink()
        (folder / file).symlink_to(target)

    return spoil


def folder_for(file):
    def spoil(folder):
        (folder / file).unlink()
        (folder / file).mkdir()

    return spoil


def pipe_for(file):
    def spoil(folder):
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return spoil


def directory_of_gigabytes(folder):
    """At least by the zip file's end, and zeros."""
    sparse(SHARD, 2**32)(folder)
    with (folder / SHARD).open("ab") as file:
        file.write(b"PK\5\6" + bytes(8) + (2**31).to_bytes(4, "little") + bytes(6))


def copied(old, new):
    return lambda folder: (folder / new).write_bytes((folder / old).read_bytes())


def sparse(file, size):
    """A file of that size, nearly all of it a hole."""

    def spoil(folder):
        with (folder / file).open("r+b") as f:
            f.truncate(size)

    return spoil


def cut_pieces(content):
    """A tokenizer.model of some hundred pieces more than it has bytes for."""
    return content[: len(content) // 2] + b"\n" + b"\xff" * 9 + b"\1"


def without(*names):
    def change(found):
        for name in names:
            del found[name]

    return change


PAGE = "<!DOCTYPE html><html><body>403 Forbidden</body></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476939516\n"
DAMAGED = rf"{SHARD} \([\d,]+ bytes\) is cut short, damaged or not a checkpoint"
RUNS = DAMAGED + r" \((it holds more than a flat dict of tensors|.+, which was not run)\)"
MOVED = DAMAGED + r" \(its record \S+ is not as torch.save writes it\)"
FOLDER = DAMAGED + r" \(its records are not one folder of files of different names\)"
UNLIKE = rf"{SHARD} and params.json do not belong together"
NOT_JSON = r"params.json is not a JSON object \(.*\): download it again"
NOT_FINITE = "holds values that are not finite in fp16"
KIND = "expected torch.float16 or torch.bfloat16 or torch.float32: pass Meta's original"
TOKENIZER = r"tokenizer.model \([\d,]+ bytes\) is not a sentencepiece model"
CANARY = "/tmp/faults.canary"  # that nothing may make

# What is wrong -> what spoils a folder of shards so, what the message says.
SHARDS = {
    "params cut short": (cut("params.json", 0.5), NOT_JSON),
    "params empty": (put("params.json", ""), NOT_JSON),
    "params a web page": (put("params.json", PAGE), NOT_JSON),
    "params a git-lfs pointer": (put("params.json", POINTER), NOT_JSON),
    "params in UTF-16": (edit("params.json", lambda c: c.decode().encode("utf-16")), NOT_JSON),
    "params in zeros": (put("params.json", bytes(200)), NOT_JSON),
    "params a number of 10,000 digits": (put("params.json", '{"dim": ' + "9" * 10**4), NOT_JSON),
    "params nested 100,000 deep": (put("params.json", '{"a":' * 10**5), NOT_JSON),
    "params a list": (put("params.json", "[4096]"), NOT_JSON),
    "params null": (put("params.json", "null"), NOT_JSON),
    "params nested, no object": (put("params.json", '{"model": 7}'), NOT_JSON),
    "params nested twice": (
        put("params.json", '{"model": {"model": {"dim": 64}}}'),
        "params.json lacks dim, n_layers, n_heads, norm_eps",
    ),
    "params of a gigabyte": (sparse("params.json", 2**30), NOT_JSON),
    "params a folder": (folder_for("params.json"), "no params.json in"),
    "params a symlink to itself": (linked("params.json", "params.json"), "no params.json in"),
    "params a pipe": (pipe_for("params.json"), "no params.json in"),
    "params absent": (lambda f: (f / "params.json").unlink(), "no params.json in"),
    "keys of escape codes": (params(**{"\x1b[2J\n": 1}, dim=...), "params.json lacks dim"),
    "dim absent": (params(dim=...), "params.json lacks dim: download it again"),
    "dim negative": (params(dim=-64), "params.json: dim is -64, expected a whole number, from 1"),
    "dim zero": (params(dim=0), "params.json: dim is 0, expected a whole number"),
    "dim text": (params(dim="64"), "params.json: dim is '64', expected a whole number"),
    "dim a fraction": (params(dim=64.5), "params.json: dim is 64.5, expected a whole number"),
    "dim true": (params(dim=True), "params.json: dim is True, expected a whole number"),
    "dim null": (params(dim=None), "params.json: dim is None, expected a whole number"),
    "dim a list": (params(dim=[64]), r"params.json: dim is \[64\], expected a whole number"),
    "dim of terabytes": (params(dim=10**9), "dim is 1000000000, expected a whole number, from"),
    "dim the largest": (
        params(dim=2**17),
        r"but params.json asks for \(4096, 131072\) from 2 shards together",
    ),
    "dim odd": (params(dim=66, n_heads=22), "expected heads of one even width"),
    "feed forward of terabytes": (
        params(ffn_dim_multiplier=100),
        r"asks for \(17024, 64\) from 2 shards",
    ),
    "feed forward infinite": (params(ffn_dim_multiplier=1e999), "ffn_dim_multiplier is inf"),
    "layers of terabytes": (params(n_layers=10**12), "params.json: n_layers is 1000000000000"),
    "1,000 layers": (params(n_layers=1000), "belong together: missing layers.2.* and 8979 more"),
    "one layer less": (params(n_layers=1), "missing nothing, left over layers.1."),
    "heads negative": (params(n_heads=-4), "params.json: n_heads is -4"),
    "heads of keys none": (params(n_kv_heads=0), "params.json: n_kv_heads is 0"),
    "heads of keys too many": (params(n_kv_heads=8), "params.json: n_kv_heads is 8"),
    "heads of keys 3 of 4": (params(n_kv_heads=3), "n_kv_heads to divide n_heads"),
    "norm_eps NaN": (params(norm_eps=float("nan")), "params.json: norm_eps is nan"),
    "norm_eps negative": (params(norm_eps=-1e-5), "params.json: norm_eps is -1e-05"),
    "rope_theta zero": (params(rope_theta=0), "params.json: rope_theta is 0"),
    "multiple_of zero": (params(multiple_of=0), "params.json: multiple_of is 0"),
    "rope scaled by a number": (
        params(use_scaled_rope=1),
        "use_scaled_rope is 1, expected true or",
    ),
    "a key unknown": (
        params(moe_args={}),
        "params.json has moe_args, as another model has: pass the",
    ),
    "a model of images": (
        params(vision_chunk_size=448, vision_max_num_chunks=4),
        "has vision_chunk_size, vision_max_num_chunks, as a model that sees images has: pass the",
    ),
    "a model with adapters": (
        params(lora_args={"rank": 16}),
        r"model with adapters \(LoRA\)",
    ),
    "a model that was quantized": (
        params(quantization_args={"group_size": 32}, lora_args={"rank": 16}),
        "has lora_args, quantization_args, as a model that Meta quantized has",
    ),
    "vocabulary of Llama 3": (
        params(vocab_size=128256),
        r"the tokenizer has 4096 pieces, params.json asks for 128256: pass the tokenizer.model",
    ),
    "vocabulary another": (params(vocab_size=32000), "params.json asks for 32000"),
    "vocabulary negative": (params(vocab_size=-2), "params.json: vocab_size is -2"),
    "vocabulary text": (params(vocab_size="all"), "params.json: vocab_size is 'all'"),
    "format of int8 unknown": (params(int8_format="x" * 10**4), "is of int8 format 'x+'?, this"),
    "shard empty": (put(SHARD, ""), DAMAGED),
    "shard a web page": (put(SHARD, PAGE), f"{SHARD} is a web page, not a checkpoint"),
    "shard a git-lfs pointer": (put(SHARD, POINTER), f"{SHARD} is a git-lfs pointer"),
    "shard of zeros": (put(SHARD, bytes(10**5)), DAMAGED),
    "shard of 64 GiB of hole": (sparse(SHARD, 2**36), DAMAGED),
    "shard a folder": (folder_for(SHARD), f"{SHARD} is not a file"),
    "shard a symlink to itself": (linked(SHARD, SHARD), f"{SHARD} is not a file"),
    "shard a pipe": (pipe_for(SHARD), f"{SHARD} is not a file"),
    "shard a device": (linked(SHARD, "/dev/zero"), f"{SHARD} is not a file"),
    "shard by another name": (
        renamed(SHARD, "consolidated.1.pth"),
        "holds consolidated.00.pth, consolidated.1.pth but not consolidated.01.pth",
    ),
    "shard more": (copied(SHARD, "consolidated.02.pth"), "from 3 shards together: take all files"),
    "shard more by number": (copied(SHARD, "consolidated.05.pth"), "but not consolidated.02.pth"),
    "shard less": (
        lambda f: (f / SHARD).unlink(),
        r"\(it is one of 2 shards\), but params.json asks for .*: take all files",
    ),
    "shard first gone": (
        lambda f: (f / "consolidated.00.pth").unlink(),
        "holds consolidated.01.pth but not consolidated.00.pth",
    ),
    "shards all gone": (
        lambda f: [path.unlink() for path in f.glob("*.pth")],
        r"no consolidated.\*.pth in",
    ),
    "shards gone, strange names": (
        lambda f: [path.rename(f / "a\n\x1b[2J") for path in sorted(f.glob("*.pth"))],
        r"\(it holds a\\n\\x1b\[2J, params.json, tokenizer.model\)",
    ),
    "shard in torch's old format": (
        lambda f: torch.save(
            torch.load(f / SHARD), f / SHARD, _use_new_zipfile_serialization=False
        ),
        f"{SHARD} is in torch's format before 1.6",
    ),
    "shard in TorchScript": (
        lambda f: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), f / SHARD),
        DAMAGED + "|" + RUNS,
    ),
    "shard a plain zip": (
        lambda f: zipfile.ZipFile(f / SHARD, "w").writestr("a.txt", "text"),
        DAMAGED,
    ),
    "shard zipped again": (rewrite(compression=zipfile.ZIP_DEFLATED), MOVED),
    "shard that unzips to 1 GB": (
        rewrite(compression=zipfile.ZIP_DEFLATED, more=[("archive/version", bytes(2**30))]),
        DAMAGED,
    ),
    "shard with something before it": (edit(SHARD, lambda c: b"\r\n" + c), DAMAGED),
    "shard as text": (edit(SHARD, lambda c: c.replace(b"\n", b"\r\n")), DAMAGED),
    "shard with a record twice": (rewrite(more=[("consolidated.01/data/0", b"")]), FOLDER),
    "shard without tensors' bytes": (
        edit(SHARD, lambda c: c.replace(b"/data/1", b"/data/a")),
        DAMAGED,
    ),
    "big-endian shard": (
        rewrite(lambda name, old: b"big" if name.endswith("byteorder") else old),
        DAMAGED + r" \(its numbers are of another byte order\)",
    ),
    "list of tensors changed": (edit(SHARD, lambda c: c.replace(b".wq.", b".wk.", 1)), "bad CRC"),
    "list of tensors of a gigabyte": (pickled(bytes(2**21)), "are too long a list"),
    "list of tensors absent": (
        rewrite(lambda name, old: old, names=lambda name: name.replace("data.pkl", "x.pkl")),
        DAMAGED,
    ),
    "list of tensors empty": (pickled(b""), DAMAGED),
    "list of tensors cut short": (pickled(b"\x80\2}q\0(X"), DAMAGED),
    "code: os.system": (pickled(calls(os.system, f"touch {CANARY}")), RUNS),
    "code: open": (pickled(calls(open, CANARY, "w")), RUNS),
    "code: eval": (pickled(calls(eval, f"open({CANARY!r}, 'w')")), RUNS),
    "code: exec": (pickled(calls(exec, f"open({CANARY!r}, 'w')")), RUNS),
    "code: torch.load": (pickled(calls(torch.load, "consolidated.00.pth")), RUNS),
    "code: protocol 0": (pickled(f"cposix\nsystem\n(S'touch {CANARY}'\ntR.".encode()), RUNS),
    "code: protocol 4": (pickled(b"\x80\4\x8c\5posix\x8c\6system\x93\x8c\x04true\x85R."), RUNS),
    "code: INST": (pickled(f"(S'touch {CANARY}'\niposix\nsystem\n.".encode()), RUNS),
    "memory: bytearray": (pickled(calls(bytearray, 2**31)), RUNS),
    "memory: key of nested tuples": (pickled(b"\x80\2})" + b"\x85" * 900_000 + b"Ns."), RUNS),
    "time: key of a tuple of itself": (pickled(b"\x80\2" + twins(60, b"}") + b"Ns."), RUNS),
    "memory: place of a tuple of itself": (
        pickled(
            b"\x80\2" + twins(25) + b"(X\7\0\0\0storagectorch\nHalfStorage\nh\0X\3\0\0\0cpuK\1tQ."
        ),
        RUNS,
    ),
    "two lists of tensors": (rewrite(more=[("shard/zz/data.pkl", b"\x80\2}.")]), FOLDER),
    "a directory of 2 GB": (directory_of_gigabytes, DAMAGED),
    "memory: counts that double": (
        pickled(b"\x80\2)q\0" + b"h\0h\0\x86q\0" * 140_000 + b"."),
        RUNS,
    ),
    "a shape of 1,000 dimensions": (
        tensor("norm.weight", lambda x: torch.empty([1] * 1000)),
        "a tensor's shape is not one",
    ),
    "a tensor spread over a thousand times its size": (
        tensor("tok_embeddings.weight", lambda x: torch.empty_strided(x.shape, (1000, 1))),
        "or spread over far more than itself",
    ),
    "memory: quantized tensor": (
        pickled(calls(torch._utils._rebuild_qtensor, None, 0, (2**40,), (1,), (), False, None)),
        RUNS,
    ),
    "memory: nested tensor": (
        tensors(lambda found: {k: x.to_sparse() for k, x in found.items()}),
        RUNS,
    ),
    "more than its storage": (pickled(TERABYTES), DAMAGED),
    "a list": (tensors(lambda found: list(found.values())), RUNS),
    "a tensor": (tensors(lambda found: found["norm.weight"]), RUNS),
    "a number for a tensor": (tensors(lambda found: found | {"norm.weight": 3}), RUNS),
    "a dict in a dict": (tensors(lambda found: {"model": found}), RUNS),
    "names that are numbers": (tensors(lambda found: dict(enumerate(found.values()))), RUNS),
    "no tensors": (tensors(lambda found: OrderedDict()), UNLIKE),
    "a tensor absent": (tensors(without(f"{WQ}.weight")), f"missing {WQ}.weight, left over"),
    "a tensor left over": (
        tensors(lambda found: found | {"\x1b[2Jx\n": torch.zeros(2)}),
        r"left over \\x1b\[2Jx\\n; take",
    ),
    "names of transformers": (
        tensors(lambda found: {f"model.{k}": x for k, x in found.items()}),
        UNLIKE + ": missing tok_embeddings.weight, .* left over model.tok_embeddings.weight",
    ),
    "float64": (tensor(f"{WQ}.weight", torch.Tensor.double), f"is torch.float64, {KIND}"),
    "int8 without scales": (tensor(f"{WQ}.weight", torch.Tensor.char), f"is torch.int8, {KIND}"),
    "bool": (tensor("norm.weight", torch.Tensor.bool), f"norm.weight in {SHARD} is torch.bool"),
    "complex": (tensor("norm.weight", lambda x: x.to(torch.complex64)), RUNS),
    "float8": (tensor("norm.weight", lambda x: x.to(torch.float8_e5m2)), RUNS),
    "transposed": (tensor(f"{W2}.weight", lambda x: x.T), rf"{W2}.weight in {SHARD} is \("),
    "a row less": (tensor(f"{WQ}.weight", lambda x: x[:-1].clone()), r"is \(31, 64\), but"),
    "no rows": (tensor(f"{WQ}.weight", lambda x: x[:0].clone()), r"is \(0, 64\), but"),
    "a dimension more": (tensor(f"{WQ}.weight", lambda x: x[None]), r"is \(1, 32, 64\), but"),
    "a number for embeddings": (
        tensor("tok_embeddings.weight", lambda x: x[0, 0].clone()),
        r"tok_embeddings.weight in \S+ is \(\), but",
    ),
    "embeddings of another tokenizer": (
        tensor("tok_embeddings.weight", lambda x: x[:-5].clone()),
        r"the weights have \d+ tokens, the tokenizer \d+",
    ),
    "NaN in a matrix": (value(torch.nan), rf"{WQ}.weight in {SHARD} {NOT_FINITE}"),
    "infinity in a matrix": (value(torch.inf), rf"{WQ}.weight in {SHARD} {NOT_FINITE}"),
    "NaN in embeddings": (
        value(torch.nan, "tok_embeddings.weight"),
        rf"tok_embeddings.weight in consolidated.00.pth or {SHARD} {NOT_FINITE}",
    ),
    "infinity in the head": (
        value(-torch.inf, "output.weight"),
        rf"output.weight in {SHARD} {NOT_FINITE}",
    ),
    "beyond fp16": (
        tensor(f"{W2}.weight", lambda x: x.float() * 1e6),
        rf"{W2}.weight in consolidated.00.pth or {SHARD} {NOT_FINITE}",
    ),
    "safetensors": (
        renamed_all("model-{}.safetensors"),
        r"safetensors is safetensors, .* not Meta's consolidated.*.pth: pass the model folder",
    ),
    "safetensors beside Meta's": (
        lambda f: [shutil.copytree(f, f / "original"), renamed_all("model-{}.safetensors")(f)],
        "is safetensors, .* e.g. --ckpt_dir .*tiny/original$",
    ),
    "GGUF": (renamed_all("model-{}.gguf"), "gguf is a GGUF file, not Meta's"),
    "a GGUF file for a folder": (
        lambda f: renamed(SHARD, "x.gguf")(f) and f / "x.gguf",
        "x.gguf is a GGUF file, not Meta's .* e.g. --ckpt_dir /w/13B$",
    ),
    "tokenizer absent": (
        lambda f: (f / "tokenizer.model").unlink(),
        "tokenizer .*tokenizer.model does not exist",
    ),
    "tokenizer a folder": (folder_for("tokenizer.model"), "tokenizer.model is a folder"),
    "tokenizer empty": (put("tokenizer.model", ""), TOKENIZER),
    "tokenizer a web page": (put("tokenizer.model", PAGE), TOKENIZER),
    "tokenizer a git-lfs pointer": (put("tokenizer.model", POINTER), TOKENIZER),
    "tokenizer of a gigabyte": (sparse("tokenizer.model", 2**32), "tokenizer.model"),
    "tokenizer a symlink to itself": (
        linked("tokenizer.model", "tokenizer.model"),
        "tokenizer.model does not exist",
    ),
    "tokenizer a pipe": (pipe_for("tokenizer.model"), "tokenizer.model"),
    "tokenizer of Llama 3": (put("tokenizer.model", b"IQ== 0\nIg== 1\n"), "is a tiktoken file"),
    "tokenizer broken within": (edit("tokenizer.model", cut_pieces), TOKENIZER),
    "tokenizer without its end": (cut("tokenizer.model", 0.5), "tokenizer"),
    "folder a file": (lambda f: f / "params.json", "params.json is a file: pass the model folder"),
    "folder absent": (lambda f: f / "nothing", "nothing does not exist: pass the model folder"),
    "folder above": (lambda f: f.parent, r"no consolidated.\*.pth in"),
}
SHARDS |= {
    f"shard cut to {share:g}": (cut(SHARD, share), DAMAGED)
    for share in (0.0001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
}
SHARDS |= {f"shard less {-n} bytes": (cut(SHARD, n), DAMAGED) for n in (-1, -22, -100, -1000)}
SHARDS |= {
    f"directory: {what}": (entry(offset, bits), DAMAGED)
    for what, (offset, bits) in {
        "mark": (0, 1),
        "method": (10, 8),
        "stored size": (20, 64),
        "size": (24, 64),
        "length of the name": (28, 1),
        "length of the extra field": (30, 16),
        "place": (42, 64),
        "place, far": (45, 64),
        "name": (46, 1),
    }.items()
}
SHARDS |= {
    f"record: {what}": (header(offset, bits), DAMAGED)
    for what, (offset, bits) in {
        "mark": (3, 1),
        "length of the name": (26, 1),
        "length of the extra field": (28, 64),
        "length of the extra field, by 16": (28, 16),
        "name": (30, 1),
    }.items()
}
INT8 = {
    "format 2": (params(int8_format=2), "params.json is of int8 format 2, this program reads 1"),
    "format text": (params(int8_format="1"), "params.json is of int8 format '1', this program"),
    "last file gone": (
        lambda f: (f / "consolidated.03.pth").unlink(),
        "the int8 files and params.json .* missing norm.weight, output",
    ),
    "a file between gone": (lambda f: (f / LAYER).unlink(), f"but not {LAYER}"),
    "a file twice": (
        copied(LAYER, "consolidated.02.pth"),
        "missing layers.1.* left over layers.0.",
    ),
    "a file more": (copied(LAYER, "consolidated.04.pth"), "missing nothing, left over layers.0."),
    "a file of shards": (
        tensors(lambda found: {k: x.half() for k, x in found.items() if "SCB" not in k}, LAYER),
        f"missing {WQ}.SCB",
    ),
    "scales absent": (tensors(without(f"{WQ}.SCB"), LAYER), f"missing {WQ}.SCB, left over nothing"),
    "scales short": (
        tensor(f"{WQ}.SCB", lambda x: x[1:].clone(), LAYER),
        rf"{WQ}.SCB in {LAYER} is",
    ),
    "scales in fp64": (tensor(f"{WQ}.SCB", torch.Tensor.double, LAYER), "SCB in .* torch.float64"),
    "scale NaN": (value(torch.nan, f"{WQ}.SCB", LAYER), f"{WQ}.SCB in {LAYER} {NOT_FINITE}"),
    "scale infinite": (value(torch.inf, f"{W2}.SCB", LAYER), f"{W2}.SCB in {LAYER} {NOT_FINITE}"),
    "norm NaN": (
        value(torch.nan, "layers.0.ffn_norm.weight", LAYER),
        f"ffn_norm.weight in {LAYER} {NOT_FINITE}",
    ),
    "codes in fp16": (tensor(f"{WQ}.weight", torch.Tensor.half, LAYER), "expected torch.int8"),
    "codes in uint8": (tensor(f"{WQ}.weight", torch.Tensor.byte, LAYER), "expected torch.int8"),
    "codes transposed": (tensor(f"{W2}.weight", lambda x: x.T, LAYER), rf"{W2}.weight in {LAYER}"),
    "layout by columns": (
        tensor(f"{WQ}.weight_format", lambda x: x + 1, LAYER),
        r"weight_format is not 0 \(by rows\)",
    ),
    "layout absent": (tensors(without(f"{WQ}.weight_format"), LAYER), f"{WQ}.weight_format"),
    "layout twice": (
        tensor(f"{WQ}.weight_format", lambda x: x.repeat(2), LAYER),
        rf"weight_format in {LAYER} is \(2,\)",
    ),
    "file cut short": (cut(LAYER, 0.7), rf"{LAYER} \([\d,]+ bytes\) is cut short, damaged"),
    "file empty": (put(LAYER, ""), rf"{LAYER} \(0 bytes\) is cut short, damaged"),
    "dim of another model": (params(dim=128), r"but params.json asks for \(\d+, 128\): take"),
    "layers of another model": (params(n_layers=3), "missing layers.2.attention.wq.weight"),
}
FAULTS = {("shards", name): fault for name, fault in SHARDS.items()}
FAULTS |= {("int8", name): fault for name, fault in INT8.items()}


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
