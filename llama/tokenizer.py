"""Text <-> token ids, with the sentencepiece model that comes with the weights.

Llama 2's and Code Llama's `tokenizer.model` work too; Llama 3's is of another kind (tiktoken) and
is refused.
"""

import os
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

LARGEST = 2**23  # bytes read of a file: Meta's has 2**19


class Tokenizer:
    """`encode` and `decode` as sentencepiece has them: what the model does not know becomes bytes,
    and the space before a text's first word is not a part of it."""

    def __init__(self, model_path: str | Path):
        """FileNotFoundError or ValueError, each with what to pass instead."""
        self.path = path = Path(os.path.expanduser(model_path))
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(
                f"tokenizer {path} {found}: pass the tokenizer.model that came with the weights, "
                "e.g. --tokenizer_path /w/tokenizer.model"
            )
        content = read_bytes(path, LARGEST)
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
            raise ValueError(
                f"{path} is a tiktoken file, as Llama 3 has it: this program reads the "
                "sentencepiece tokenizer.model of LLaMA 1, Llama 2 and Code Llama"
            )
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
        self.eos_id: int = self._sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{path} has no token for the beginning or the end of a text: pass the "
                "tokenizer.model that came with the weights"
            )
        self.pad_id: int = self._sp.pad_id()  # -1 in Meta's file: it has none

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return [self.bos_id] * bos + self._sp.encode(s) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)

    def unfinished(self, ids: list[int]) -> int:
        """How many of the last ids are bytes of a character that lacks others."""
        for n, id in enumerate(reversed(ids[-3:]), 1):
            if not self._sp.is_byte(id):
                return 0
            byte = int(self._sp.id_to_piece(id)[1:-1], 16)  # <0xF0>
            if byte < 0x80:
                return 0
            if byte >= 0xC0:  # begins a character of 2 bytes, from 0xE0 on 3, from 0xF0 on 4
                return n if n < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        return 0


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
