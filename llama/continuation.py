"""What has a row said so far? New ids become text as they come.

What was said never changes: the bytes of a character whose others are still to come are held back,
and so is whatever may turn out to begin a stop string. Only new ids are decoded, after the few
before them, so that reading at each token costs some microseconds however long the text.
"""

from llama.tokenizer import Tokenizer


class Continuation:
    """What continues one prompt, at most `limit` tokens. `ids` are all that were generated, a stop
    string's included; `logprobs`, where asked for, has one for each of them."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], limit: int, stop: list[str]):
        self.tokenizer, self.prompt_ids, self.limit, self.stop = tokenizer, prompt_ids, limit, stop
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None  # "stop", "length" or "eos"; None: it goes on
        self._said: list[str] = []
        self._held = ""  # text that may begin a stop string
        # Ids that make the next ones' text right (a leading space, say), and how long theirs is.
        self._before, self._skip = prompt_ids, len(tokenizer.decode(prompt_ids))
        self._decoded = self._read = 0  # how many of ids, of _said

    @property
    def text(self) -> str:
        """All that may be said, without the prompt."""
        self.listen()
        return "".join(self._said)

    def read(self) -> str:
        """What has been added to `text` since the last call."""
        self.listen()
        new, self._read = self._said[self._read :], len(self._said)
        return "".join(new)

    def finish(self) -> None:
        if self.finish_reason is None:
            self.finish_reason = "length" if len(self.ids) >= self.limit else "eos"

    def listen(self) -> None:
        """Decodes the new ids; sets finish_reason if a stop string is in their text."""
        if self.finish_reason == "stop":
            return
        new = self.ids[self._decoded :]
        if self.finish_reason is None:
            new = new[: len(new) - self.tokenizer.unfinished(new)]
        if new:
            self._decoded += len(new)
            text, alone = (self.tokenizer.decode(ids) for ids in (self._before + new, new))
            self._held += text[self._skip :]
            if alone:
                self._before, self._skip = new, len(alone)
            else:  # what has no text of its own does not keep the next one's leading space
                self._before, self._skip = self._before + new, len(text)

        end = len(self._held)
        if found := [place for stop in self.stop if (place := self._held.find(stop)) >= 0]:
            self.finish_reason, end = "stop", min(found)
        elif self.finish_reason is None:
            end -= self._may_begin_a_stop()
        if end:
            self._said.append(self._held[:end])
            self._held = self._held[end:]

    def _may_begin_a_stop(self) -> int:
        """How many of the last characters held are the beginning of a stop string."""
        most = len(self._held) + 1
        begins = (stop[:n] for stop in self.stop for n in range(1, min(len(stop), most)))
        return max((len(text) for text in begins if self._held.endswith(text)), default=0)
