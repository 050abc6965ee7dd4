"""Text <-> token ids, with the `tokenizer.model` that comes with the weights.

The file itself says which of two kinds it is: the sentencepiece model of LLaMA 1, Llama 2 and Code
Llama, or Llama 3's list of byte pairs, which the package tiktoken applies.
"""

import base64
import codecs
import os
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama.shards import read_bytes

LARGEST = 2**23  # bytes read of a file: Meta's have 2**19 and 2**21
RANKS = rb"^(?:[A-Za-z0-9+/]+=* \d+\r?\n){2}"  # two lines of Llama 3's file
SPECIAL_TOKENS = 256  # whose ids follow those of the byte pairs, most of them reserved
SPECIAL = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1}  # place among them
SPECIAL |= {"<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9}
PATTERN = (  # what Llama 3 takes for a word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken panics on long texts. A cut changes the ids, so these are Meta's numbers.
MOST_AT_ONCE = 400_000  # characters that it gets at once
LONGEST_RUN = 25_000  # characters of these in a row that all are white space, or that none is


class Tokenizer:
    """`encode` and `decode` as Meta has them. No text becomes a special token, though it may look
    like one, and special tokens become no text.

    There are n_words ids. A text begins with bos_id and ends at any of end_ids, eos_id among them.
    special has those of Llama 3's special tokens that this program uses, by name."""

    def __init__(self, model_path: str | Path):
        """FileNotFoundError, ValueError or ImportError, each with what to do instead."""
        if not isinstance(model_path, str | Path):
            raise ValueError(
                f"tokenizer_path is {model_path!r:.60}, expected a path: pass the tokenizer.model "
                "that came with the weights"
            )
        self.path = path = Path(os.path.expanduser(model_path))
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(
                f"tokenizer {path} {found}: pass the tokenizer.model that came with the weights, "
                "e.g. --tokenizer_path /w/tokenizer.model"
            )
        content = read_bytes(path, LARGEST)
        kind = BytePairs if re.search(RANKS, content[:1000], re.M) else SentencePiece
        self._kind = kind(path, content)
        self.n_words, self.special = self._kind.n_words, self._kind.special
        self.bos_id, self.pad_id = self._kind.bos_id, self._kind.pad_id
        self.end_ids: tuple[int, ...] = self._kind.end_ids
        self.eos_id = self.end_ids[0]

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return [self.bos_id] * bos + self._kind.encode(s) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return self._kind.decode(ids)

    def unfinished(self, ids: list[int]) -> int:
        """How many characters at the end of decode(ids) stand for one that still lacks bytes."""
        return self._kind.unfinished(ids)


class SentencePiece:
    """What the model does not know becomes bytes, and the space before a text's first word is not a
    part of it."""

    special: dict[str, int] = {}

    def __init__(self, path: Path, content: bytes):
        self._sp = SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(content)
            self._sp.id_to_piece(list(range(self._sp.vocab_size())))  # all of them are text
        except (RuntimeError, UnicodeDecodeError):
            raise ValueError(
                f"{path} ({len(content):,} bytes) is not a sentencepiece model: download it "
                "again and compare its md5 sum with tokenizer_checklist.chk"
            ) from None
        self.n_words: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.end_ids = (self._sp.eos_id(),)
        if self.bos_id < 0 or self.end_ids[0] < 0:
            raise ValueError(
                f"{path} has no token for the beginning or the end of a text: pass the "
                "tokenizer.model that came with the weights"
            )
        self.pad_id: int = self._sp.pad_id()  # -1 in Meta's file: it has none
        self.encode, self.decode = self._sp.encode, self._sp.decode

    def unfinished(self, ids: list[int]) -> int:
        for n, id in enumerate(reversed(ids[-3:]), 1):  # decode has a character for each
            if not self._sp.is_byte(id):
                return 0
            byte = int(self._sp.id_to_piece(id)[1:-1], 16)  # <0xF0>
            if byte < 0x80:
                return 0
            if byte >= 0xC0:  # begins a character of 2 bytes, from 0xE0 on 3, from 0xF0 on 4
                return n if n < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        return 0


class BytePairs:
    """A token is one or more bytes, which need not be whole characters. Line n of the file has the
    token n in base64, then n, its rank: the pair with the lowest is merged first."""

    pad_id = -1  # it has none

    def __init__(self, path: Path, content: bytes):
        try:
            import tiktoken
        except ImportError:
            raise ImportError(
                f"{path} is Llama 3's tokenizer, which needs tiktoken: pip install tiktoken"
            ) from None
        ranks = {}
        for n, line in enumerate(content.splitlines()):
            try:
                token, rank = line.split(b" ")
                token = base64.b64decode(token, validate=True)
                if int(rank) != n or not token or token in ranks:
                    raise ValueError
            except ValueError:
                raise ValueError(
                    f"{path}, line {n + 1} is {line[:60]!r}, expected another token in base64 and "
                    f"its rank {n}: download it again"
                ) from None
            ranks[token] = n
        if lost := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"{path} has no token for the byte {lost[0]}: download it again")
        self.special = {name: len(ranks) + place for name, place in SPECIAL.items()}
        self.n_words = len(ranks) + SPECIAL_TOKENS
        self.bos_id = self.special["<|begin_of_text|>"]
        ends = "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
        self.end_ids = tuple(self.special[name] for name in ends)
        self._bytes = [*ranks] + [b""] * SPECIAL_TOKENS
        self._tiktoken = tiktoken.Encoding(
            "llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, s: str) -> list[int]:
        ids = []
        for start in range(0, len(s), MOST_AT_ONCE):
            part, begin = s[start : start + MOST_AT_ONCE], 0
            for run in re.finditer(r"\s+|\S+", part):
                for end in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                    ids += self._tiktoken.encode_ordinary(part[begin:end])
                    begin = end
            ids += self._tiktoken.encode_ordinary(part[begin:])
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self._bytes[id] for id in ids).decode(errors="replace")

    def unfinished(self, ids: list[int]) -> int:
        end = b"".join(self._bytes[id] for id in ids)[-3:]
        _, whole = codecs.utf_8_decode(end, "replace")
        return len(end[whole:].decode(errors="replace"))


def encode_all(
    texts: list[str | list[int]], tokenizer: Tokenizer, max_seq_len: int, called: str = "prompt"
) -> list[list[int]]:
    """BOS and token ids of each text; a list of ids is taken as it is. ValueError if one is neither
    or is too long."""
    if not isinstance(texts, list | tuple) or not all(isinstance(x, str | list) for x in texts):
        messages = isinstance(texts, list) and any(isinstance(x, dict) for x in texts)
        instead = "; messages are for LLaMA.chat" if messages else ""
        raise ValueError(f"{called}s is {texts!r:.60}, expected a list of strings{instead}")
    all_ids = []
    for i, text in enumerate(texts, 1):
        if isinstance(text, str):
            check_text(text, f"{called} {i}")
            ids = tokenizer.encode(text, bos=True, eos=False)
        elif text and all(isinstance(id, int) and 0 <= id < tokenizer.n_words for id in text):
            ids = list(text)
        else:
            raise ValueError(
                f"{called} {i} is {text!r:.60}, expected a string or token ids from 0 to "
                f"{tokenizer.n_words - 1}"
            )
        if len(ids) > max_seq_len:
            raise ValueError(
                f"{called} {i} has {len(ids)} tokens, max_seq_len is {max_seq_len}: "
                "shorten it or raise max_seq_len"
            )
        all_ids.append(ids)
    return all_ids


def check_text(text: str, called: str) -> None:
    if re.search(r"[\ud800-\udfff]", text):
        raise ValueError(f"{called} holds half a character (a lone surrogate): fix it")
