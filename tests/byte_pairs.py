"""Where do tests get a Llama 3 tokenizer? From a small byte-pair encoding trained here.

The text is the project's own prose, and lines in scripts whose characters begin with the same
bytes: their tokens end within characters, as Llama 3's do.
"""

import base64
import functools
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MERGES = 400
# Of Llama 3, as Meta publishes it.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
SCRIPTS = """
ទាហានម្នាក់បានដើរទៅផ្ទះ ហើយគាត់បានឃើញឆ្កែមួយ
एक बार की बात है कि एक राजा जंगल में गया और उसने एक लोमड़ी को देखा
从前有一个国王，他住在森林里的一座老房子里。
Жил-был старый король, и было у него три сына
\N{FOX FACE}\N{BEAR FACE}\N{WOLF FACE}\N{LION FACE} \N{FOX FACE}\N{FOX FACE}
"""


def merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    parts = list(word)
    for i in range(len(parts) - 1, 0, -1):
        if (parts[i - 1], parts[i]) == pair and i < len(parts):
            parts[i - 1 : i + 1] = [b"".join(pair)]
    return tuple(parts)


@functools.cache
def tokens() -> list[bytes]:
    """256 bytes and the commonest pairs of a text, in order of rank."""
    import regex  # comes with tiktoken

    text = (ROOT / "llama/demo/SOURCES.md").read_text() + 5 * SCRIPTS
    words = Counter(tuple(bytes([b]) for b in w.encode()) for w in regex.findall(PATTERN, text))
    found = [bytes([byte]) for byte in range(256)]
    for _ in range(MERGES):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append(b"".join(best))
        words = Counter({merged(word, best): count for word, count in words.items()})
    return found


def rank_file() -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % n for n, token in enumerate(tokens()))
