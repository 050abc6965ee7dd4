"""Conversations in the format that Llama 2 Chat or Llama 3 Instruct was trained with (the tokenizer
tells which). Messages are dicts of role and content: one by the system may come first, then user
and assistant take turns, and the last is by the user.
"""

from collections.abc import Iterator
from functools import partial

from llama.request import Request
from llama.settings import Settings
from llama.tokenizer import Tokenizer, check_text

LLAMA_2_TAGS = "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"
FEWEST_WORDS = 32_000  # in Meta's vocabularies; the demo's has 4,096


class Chat:
    """A conversation that goes on with a LLaMA. `messages` is what was said so far, `request` has
    the newest answer and its finish_reason. A decoder keeps keys and values, so that only what is
    new is prefilled. Errors as those of `LLaMA.chat`."""

    def __init__(self, llm, settings: Settings, system: str | None = None):
        self.llm, self.settings, self.system = llm, settings, system
        self.request: Request | None = None
        self.restart()
        conversation([*self.messages, {"role": "user", "content": ""}], llm)  # does it chat?
        self.decoder = llm.decoder(1, llm.model.args.max_seq_len, settings)

    def restart(self) -> None:
        """Forgets all messages except the system's."""
        by_system = self.system is not None
        self.messages = [{"role": "system", "content": self.system}] if by_system else []

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer in pieces, as they come. Afterwards `messages` has the text and as much
        of the answer as came; neither if nothing did."""
        messages, said = [*self.messages, {"role": "user", "content": text}], ""
        ids = conversation(messages, self.llm)
        steps = self.llm.steps([ids], self.settings, chat_decoder=self.decoder)
        try:
            for piece in stripped(self.request.read() for [self.request] in steps):
                said += piece
                yield piece
        finally:
            steps.close()
            if said:
                self.messages = [*messages, {"role": "assistant", "content": said}]


def conversation(messages: list[dict[str, str]], llm) -> list[int]:
    """The ids of messages, up to where the answer begins. ValueError for what is no conversation or
    leaves no place for an answer, and for a model that does not chat."""
    if llm.tokenizer.n_words < FEWEST_WORDS and not llm.tokenizer.special:
        raise ValueError(
            "this model does not chat, the demo tells stories: pass a folder of Llama 2 Chat or "
            "Llama 3 Instruct, e.g. --ckpt_dir /w/Llama-3.1-8B-Instruct/original"
        )
    check_messages(messages)
    turns = [(message["role"], message["content"].strip()) for message in messages]
    ids = (llama_3_ids if llm.tokenizer.special else llama_2_ids)(turns, llm.tokenizer)
    if len(ids) >= llm.model.args.max_seq_len:
        raise ValueError(
            f"the conversation has {len(ids)} tokens, max_seq_len is {llm.model.args.max_seq_len}: "
            "raise max_seq_len (--max_seq_len) or begin a new one (/new)"
        )
    return ids


def llama_3_ids(turns: list[tuple[str, str]], tokenizer: Tokenizer) -> list[int]:
    encode, ids = partial(tokenizer.encode, bos=False, eos=False), [tokenizer.bos_id]
    names = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    begin, end, done = (tokenizer.special[name] for name in names)
    for role, content in [*turns, ("assistant", "")]:
        ids += [begin, *encode(role), end, *encode("\n\n"), *encode(content), done]
    return ids[:-1]


def llama_2_ids(turns: list[tuple[str, str]], tokenizer: Tokenizer) -> list[int]:
    for i, (_, content) in enumerate(turns, 1):
        if held := [tag for tag in LLAMA_2_TAGS if tag in content]:
            raise ValueError(
                f"message {i} holds {held[0]}, which Llama 2 takes for a turn: leave it out"
            )
    contents = [content for _, content in turns]
    if turns[0][0] == "system":
        contents[:2] = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}"]
    ids = []
    for user, answer in zip(contents[::2], contents[1::2]):
        ids += tokenizer.encode(f"[INST] {user} [/INST] {answer} ", bos=True, eos=True)
    return ids + tokenizer.encode(f"[INST] {contents[-1]} [/INST]", bos=True, eos=False)


def check_messages(messages: list[dict[str, str]]) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages is {messages!r:.60}, expected a list of them")
    for i, message in enumerate(messages, 1):
        keyed = isinstance(message, dict) and message.keys() == {"role", "content"}
        if not keyed or not isinstance(message["content"], str):
            expected = {"role": "user", "content": "some text"}
            raise ValueError(f"message {i} is {message!r:.80}, expected e.g. {expected}")
        check_text(message["content"], f"message {i}")
    by_system = messages[0]["role"] == "system"
    roles = ["system"] * by_system + ["user", "assistant"] * len(messages)
    for i, (message, role) in enumerate(zip(messages, roles), 1):
        if message["role"] != role:
            raise ValueError(
                f"message {i} is by {message['role']!r:.60}, expected {role!r}: user and assistant "
                "take turns, after one by the system or none"
            )
    if role != "user":
        raise ValueError(f"the last message is by {role!r}, expected 'user', who gets an answer")


def stripped(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces of a text without the white space around it."""
    begun, held = False, ""
    for piece in pieces:
        held = held + piece if begun else piece.lstrip()
        if text := held.rstrip():
            yield text
            begun, held = True, held[len(text) :]
