"""A request: one prompt, and what is generated for it. New ids become text as they come.

Text that was read never changes: the bytes of an unfinished character are held back, and so is what
may be the beginning of a stop string. Only new ids are decoded, with the few before them, so that
reading after each token takes microseconds however long the text is.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat

from llama.sampling import NOT_FINITE, NOT_FINITE_LOGITS
from llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """The result of a request that has ended: `text` is what was added to the prompt. `tokens` are
    its ids, with those of a stop string, which is not in the text."""

    index: int  # place of the prompt in its list, from 0
    prompt: str | list[int]
    text: str
    tokens: list[int]
    finish_reason: str  # "stop" (a stop string), "length" or "eos"
    seconds: float  # from when the prompt got its slot to the last token
    seconds_to_first_token: float
    logprobs: list[float]  # of each token; empty unless wanted


class Request:
    """A prompt that gets at most `limit` new tokens, from when it waits for a slot until it has
    ended. `ids` are all that were generated, those of a stop string included; `logprobs`, if
    wanted, has one for each. `prompt` is what the caller passed, at place `index` of a list."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        limit: int,
        stop: list[str],
        prompt: str | list[int] = "",
        index: int = 0,
    ):
        self.tokenizer, self.prompt_ids, self.limit, self.stop = tokenizer, prompt_ids, limit, stop
        self.prompt, self.index = prompt, index
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        # "stop", "length" or "eos"; None while it goes on
        self.finish_reason: str | None = None if limit else "length"
        self.seconds = self.seconds_to_first_token = 0.0  # since begin()
        self._began = time.perf_counter()
        self._text: list[str] = []
        self._held = ""  # text that may begin a stop string
        # Ids to decode before the new ones (for a leading space, say), and how much of their text
        # has been taken.
        self._before = prompt_ids
        self._skip = len(tokenizer.decode(prompt_ids)) - tokenizer.unfinished(prompt_ids)
        self._decoded = self._read = 0  # ids that were decoded, parts of _text that were read

    @property
    def text(self) -> str:
        """All that is certain so far, without the prompt."""
        self._decode()
        return "".join(self._text)

    def read(self) -> str:
        """What has been added to `text` since the last call."""
        self._decode()
        new, self._read = self._text[self._read :], len(self._text)
        return "".join(new)

    def completion(self) -> Completion:
        """The result, once the request has ended."""
        return Completion(
            self.index,
            self.prompt,
            self.text,
            self.ids,
            self.finish_reason,
            round(self.seconds, 4),
            round(self.seconds_to_first_token, 4),
            self.logprobs,
        )

    def begin(self) -> None:
        """Starts the clock: the request has a slot."""
        self._began = time.perf_counter()

    def extend(self, ids: list[int], logprobs: Iterable[float | None] = repeat(None)) -> None:
        """Takes the next tokens, up to the last: the end of the text, the end of a stop string, or
        the token that reaches the limit; it sets finish_reason. FloatingPointError if one is
        NOT_FINITE."""
        for id, logprob in zip(ids, logprobs):
            if id == NOT_FINITE:
                raise FloatingPointError(NOT_FINITE_LOGITS)
            self.seconds = time.perf_counter() - self._began
            self.seconds_to_first_token = self.seconds_to_first_token or self.seconds
            if id in self.tokenizer.end_ids:
                self.finish_reason = "eos"
            else:
                self.ids.append(id)
                if logprob is not None:
                    self.logprobs.append(logprob)
                if len(self.ids) == self.limit:
                    self.finish_reason = "length"
            if self.stop:
                self._decode()
            if self.finish_reason:
                return

    def _decode(self) -> None:
        """Decodes the new ids; sets finish_reason if a stop string is in their text."""
        new = self.ids[self._decoded :]
        if new or self.finish_reason:
            self._decoded += len(new)
            self._before = self._before + new
            text = self.tokenizer.decode(self._before)
            unfinished = 0 if self.finish_reason else self.tokenizer.unfinished(self._before)
            end = len(text) - unfinished
            self._held += text[self._skip : end]
            self._skip = end
            # Ids without text of their own do not keep the next one's leading space.
            if not unfinished and (alone := self.tokenizer.decode(new)):
                self._before, self._skip = new, len(alone)
        end = len(self._held)
        if found := [place for stop in self.stop if (place := self._held.find(stop)) >= 0]:
            self.finish_reason, end = "stop", min(found)
        elif self.finish_reason is None:
            begins = (stop[:n] for stop in self.stop for n in range(1, min(len(stop), end + 1)))
            end -= max((len(text) for text in begins if self._held.endswith(text)), default=0)
        self._text.append(self._held[:end])
        self._held = self._held[end:]


def pieces(steps: Iterator[list[Request]]) -> Iterator[str]:
    """The text that each step adds to a single request."""
    with closing(steps):
        for [request] in steps:
            if piece := request.read():
                yield piece


def completions(steps: Iterator[list[Request]]) -> Iterator[Completion]:
    """The result of each request, as soon as it has ended."""
    with closing(steps):
        for requests in steps:
            yield from (request.completion() for request in requests if request.finish_reason)
