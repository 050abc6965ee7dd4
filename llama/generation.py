"""`LLaMA`: a model and its tokenizer. `build` loads them, `generate` and `stream` continue prompts,
`chat` answers in a conversation, `score` says how likely a text is.

A prompt becomes ids, which go into a slot of a `Decoder` as soon as one is free; once they are
prefilled, each step gives every slot its next id, and a `Request` turns them into text. Each
call has its own state, so that calls may be abandoned or interleaved. Threads may share a model:
they take turns, a step at a time.
"""

import os
import threading
import warnings
from collections import deque
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from llama import checkpoint, room
from llama.buffers import PACK, PACK_ALONE
from llama.chat import conversation, stripped
from llama.decode import ENGINES, Decoder, in_passes, make_engine
from llama.device import ONE_CORE, at_work, forgetting, pick_device, pick_engine
from llama.model import Transformer
from llama.params import model_folder, read_model
from llama.request import Completion, Request, completions, pieces
from llama.sampling import NOT_FINITE_LOGITS, log_probabilities, next_token, uniform_numbers
from llama.settings import Settings, check_bool
from llama.tokenizer import Tokenizer, encode_all

SHARED = 32  # fewest tokens at the beginning of all prompts that get a prefill of their own


class LLaMA:
    """A model and its tokenizer; `build` makes one from files. engine is one of ENGINES."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, engine: str = "triton"):
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine
        small = sum(weight.numel() for weight in model.parameters()) < ONE_CORE
        self._cores = 1 if small else None
        self._lock = threading.Lock()

    @staticmethod
    def build(
        ckpt_dir: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 32,
        use_int8: bool = True,
        device: str | torch.device | None = None,
        engine: str = "triton",
        verify: bool = False,
    ) -> "LLaMA":
        """Loads a model folder in Meta's format, or the small demo model.

        Progress goes to stderr. OSError, ValueError, MemoryError or ImportError say in one sentence
        what is wrong, before loading starts where possible.

        Args:
            ckpt_dir: model folder in Meta's format (the demo model if not given)
            tokenizer_path: its tokenizer.model (looked for in the folder and beside it)
            max_seq_len: longest sequence, prompt and continuation, in tokens (512; --chat: 4096)
            max_batch_size: most prompts continued at once
            use_int8: False keeps the weights in fp16 (float32 on the CPU)
            device: cuda, cuda:1 or cpu (CUDA if there is any)
            engine: int8 on CUDA: triton (our kernels) or bnb (bitsandbytes, the reference)
            verify: compares the shards' md5 sums with checklist.chk first
        """
        check_bool("use_int8", use_int8)
        check_bool("verify", verify)
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}, expected {' or '.join(ENGINES)}")
        folder, target = model_folder(ckpt_dir), pick_device(device, use_int8)
        limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        args, tokenizer = read_model(folder, tokenizer_path, **limits)
        if verify:
            checkpoint.verify(folder)
        if engine == "triton" and target.type == "cuda" and use_int8:
            engine = pick_engine(target, args.head_dim)
        try:
            with forgetting():
                model = checkpoint.load(folder, args, target, use_int8)
        except BaseException as error:
            torch.cuda.empty_cache()  # does nothing where CUDA was not started
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise MemoryError(
                f"{target} ran out of memory while the model was loaded: something else took what "
                "was free before (nvidia-smi shows it)"
            ) from None
        return LLaMA(model, tokenizer, engine)

    def generate(
        self,
        prompts: list[str | list[int]],
        max_gen_len: int = 256,
        temperature: float = 0.8,
        top_p: float = 0.95,
        repetition_penalty: float = 1.0,
        repetition_penalty_range: int = 1024,
        repetition_penalty_slope: float = 0.0,
        seed: int | None = None,
        stop: list[str] | str = (),
        top_k: int = 0,
        min_p: float = 0.0,
        lookup: bool = False,
    ) -> list[str]:
        """Returns each prompt followed by its continuation, in order.

        Up to max_batch_size are continued at a time, fewer where memory is short; when one ends,
        the next takes its place. Between two tokens of those that run, at most 512 tokens of new
        prompts are prefilled. A beginning of 32 tokens or more that all share is prefilled once:
        `[prompt] * n` gives n continuations of one prefill. (On a CPU and with bnb that may round a
        little differently.)

        A continuation ends at the model's end-of-text token, before a stop string, after
        max_gen_len tokens, or when prompt and continuation fill max_seq_len. ValueError for a
        setting out of range or a prompt longer than max_seq_len; MemoryError if not even one
        sequence fits; FloatingPointError if the model computes logits that are not finite.

        Args:
            prompts: a list of any length, of texts or of lists of token ids, which should begin
                with tokenizer.bos_id as texts do
            max_gen_len: longest continuation, in tokens (256; --chat and messages: as long as fits)
            temperature: 0 takes the most likely token, 1 samples from the model's distribution
            top_p: samples from the fewest most likely tokens whose probabilities reach this sum
            repetition_penalty: above 1 makes tokens that are already in the text less likely
            repetition_penalty_range: how many of the last tokens count for that
            repetition_penalty_slope: 0 penalizes them equally; above 0 older tokens less
            seed: the same seed, prompt and place in the list give the same text again (on a CPU,
                in fp16 and with bnb only in the same list)
            stop: ends a continuation before this text, or before any of a list
            top_k: samples from this many of the most likely tokens; 0 from all
            min_p: samples from tokens at least this fraction as likely as the most likely one
            lookup: finishes earlier where the text repeats itself, with the same result (int8 on
                CUDA, up to 16 prompts at once)
        """
        penalty = repetition_penalty, repetition_penalty_range, repetition_penalty_slope
        cuts = top_k, min_p
        settings = Settings(max_gen_len, temperature, top_p, *penalty, seed, stop, *cuts, lookup)
        results = sorted(completions(self.steps(prompts, settings)), key=attrgetter("index"))
        texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts]
        return [text + result.text for text, result in zip(texts, results)]

    def complete(
        self, prompts: list[str | list[int]], settings: Settings, logprobs: bool = False
    ) -> list[Completion]:
        """The result of each prompt, in order: text, token ids, why it ended and how long it took;
        with logprobs also the log-probability of each token, as the model gave it, before
        temperature and penalty. Settings and errors are those of `generate`."""
        results = completions(self.steps(prompts, settings, logprobs))
        return sorted(results, key=attrgetter("index"))

    def completions(
        self, prompts: list[str | list[int]], settings: Settings, logprobs: bool = False
    ) -> Iterator[Completion]:
        """Yields what `complete` returns, each result as soon as its prompt has ended; `index` says
        which prompt that is. Errors of settings and prompts come at once."""
        return completions(self.steps(prompts, settings, logprobs))

    def chat(
        self,
        messages: list[dict[str, str]],
        max_gen_len: int | None = None,
        temperature: float = 0.8,
        top_p: float = 0.95,
        repetition_penalty: float = 1.0,
        repetition_penalty_range: int = 1024,
        repetition_penalty_slope: float = 0.0,
        seed: int | None = None,
        stop: list[str] | str = (),
        top_k: int = 0,
        min_p: float = 0.0,
        lookup: bool = False,
    ) -> str:
        """The answer of a Llama 2 Chat or Llama 3 Instruct model to messages, dicts of role and
        content: one by the system may come first, then user and assistant take turns, and the last
        is by the user. max_gen_len, if not given, is as long as fits in max_seq_len. Settings and
        errors are those of `generate`; ValueError for other models."""
        if max_gen_len is None:
            max_gen_len = self.model.args.max_seq_len
        penalty = repetition_penalty, repetition_penalty_range, repetition_penalty_slope
        cuts = top_k, min_p
        settings = Settings(max_gen_len, temperature, top_p, *penalty, seed, stop, *cuts, lookup)
        [answer] = completions(self.steps([conversation(messages, self)], settings))
        return answer.text.strip()

    def stream(
        self,
        prompt: str | list[int] | list[dict[str, str]],
        max_gen_len: int | None = None,
        temperature: float = 0.8,
        top_p: float = 0.95,
        repetition_penalty: float = 1.0,
        repetition_penalty_range: int = 1024,
        repetition_penalty_slope: float = 0.0,
        seed: int | None = None,
        stop: list[str] | str = (),
        top_k: int = 0,
        min_p: float = 0.0,
        lookup: bool = False,
    ) -> Iterator[str]:
        """Yields the continuation of a prompt in pieces, as they come; joined they are what
        `generate` adds to it, or, for messages, the answer that `chat` returns. No piece is part of
        a character or taken back. max_gen_len, if not given, is 256 for a prompt and for messages
        as long as fits in max_seq_len. Settings and errors are those of `generate`; a wrong setting
        or prompt raises at once."""
        is_chat = isinstance(prompt, list) and any(isinstance(item, dict) for item in prompt)
        if max_gen_len is None:
            max_gen_len = self.model.args.max_seq_len if is_chat else Settings.max_gen_len
        penalty = repetition_penalty, repetition_penalty_range, repetition_penalty_slope
        cuts = top_k, min_p
        settings = Settings(max_gen_len, temperature, top_p, *penalty, seed, stop, *cuts, lookup)
        if is_chat:
            return stripped(pieces(self.steps([conversation(prompt, self)], settings)))
        return pieces(self.steps([prompt], settings))

    def steps(
        self,
        prompts: list[str | list[int]],
        settings: Settings,
        logprobs: bool = False,
        chat_decoder: Decoder | None = None,
        skip: Container[int] = (),
    ) -> Iterator[list[Request]]:
        """Yields after every step the requests that it gave tokens, in the order of their
        prompts; each comes for the last time when it has ended. Prompts at places of the list that
        are in `skip` are not continued, which changes nothing for the others. The decoder of a chat
        goes on from what its cache holds of the one prompt, and stays open. Errors of settings and
        prompts come at once."""
        max_gen_len, max_seq_len = settings.max_gen_len, self.model.args.max_seq_len
        all_ids = encode_all(prompts, self.tokenizer, max_seq_len)
        if max_gen_len > max_seq_len:
            warnings.warn(
                f"max_gen_len is {max_gen_len}, but prompt and continuation end at max_seq_len, "
                f"{max_seq_len} tokens: raise max_seq_len for longer ones",
                stacklevel=3,
            )
        requests = []
        for index, (prompt, ids) in enumerate(zip(prompts, all_ids)):
            limit = min(max_gen_len, max_seq_len - len(ids))
            requests.append(Request(self.tokenizer, ids, limit, settings.stop, prompt, index))
        return self._steps(requests, settings, logprobs, chat_decoder, skip)

    def _steps(
        self,
        requests: list[Request],
        settings: Settings,
        logprobs: bool,
        chat_decoder: Decoder | None,
        skip: Container[int],
    ) -> Iterator[list[Request]]:
        seed = torch.Generator().seed() if settings.seed is None else settings.seed
        wanted = [request for request in requests if request.index not in skip]
        if full := [request for request in wanted if not request.limit]:
            yield full
        waiting = deque(request for request in wanted if request.limit)
        if not waiting:
            return
        # The whole list decides these, so that what is skipped changes no number.
        requests = [request for request in requests if request.limit]
        length = max(len(request.prompt_ids) + request.limit for request in requests)
        shared = common_beginning([request.prompt_ids for request in requests])
        running: dict[int, Request] = {}  # by slot
        decoder = chat_decoder
        try:
            decoder = chat_decoder or self.decoder(len(requests), length, settings, logprobs)
            slots = len(decoder.slots)
            if shared:
                with forgetting(), self._turn():
                    decoder.share(shared)
            while waiting or running:
                free = [slot for slot in range(slots) if slot not in running]
                with forgetting(), self._turn():
                    for slot in free[: len(waiting)]:
                        request = running[slot] = waiting.popleft()
                        request.begin()
                        uniform = uniform_numbers(seed, request.index, request.limit)
                        ids = request.prompt_ids
                        start = chat_decoder.cached(slot, ids) if chat_decoder else len(shared)
                        decoder.begin(slot, ids, uniform, start)
                    drawn = decoder.step()
                prefilled = [slot for slot in running if slot not in decoder.queue]
                for slot in prefilled:
                    request = running[slot]
                    request.extend(*(values[slot] for values in drawn))
                    if request.finish_reason:
                        decoder.end(slot, len(request.prompt_ids) + len(request.ids))
                if prefilled:
                    yield [running[slot] for slot in prefilled]
                running = {slot: r for slot, r in running.items() if not r.finish_reason}
        except torch.OutOfMemoryError:
            raise room.too_big(self.model, slots, length) from None
        finally:
            if decoder is not chat_decoder:
                decoder.close()

    def decoder(
        self, sequences: int, length: int, settings: Settings, logprobs: bool = False
    ) -> Decoder:
        """A decoder for sequences of at most `length` tokens, as many at once as fit; MemoryError
        if none does."""
        pick = partial(next_token, settings=settings)
        try:
            with forgetting(), self._turn():
                slots = room.slots_that_fit(self.model, sequences, length, settings.lookup)
                return Decoder(
                    self.model, self.engine, slots, length, pick, logprobs, settings.lookup
                )
        except torch.OutOfMemoryError:
            raise room.too_big(self.model, slots, length) from None

    def score(self, texts: list[str]) -> list[list[float]]:
        """The log-probability of each token of each text: one for each of
        `tokenizer.encode(text, bos=False, eos=False)`, given the tokens before it, in nats.

        Each text is prefilled. ValueError for one longer than max_seq_len, FloatingPointError
        and MemoryError as `generate`.
        """
        scores = []
        for ids in encode_all(texts, self.tokenizer, self.model.args.max_seq_len, "text"):
            scores.append([])
            following = torch.tensor(ids[1:], device="cpu")
            for logits in self.logits(ids[:-1]):
                tokens, following = following[: len(logits)], following[len(logits) :]
                scores[-1] += log_probabilities(logits, tokens.to(logits.device)).tolist()
        return scores

    def logits(self, ids: list[int]) -> Iterator[Tensor]:
        """Float32 logits of what follows each of ids, in order, up to PACK at once: (n, V)."""
        if not ids:
            return
        engine = passes = parts = None
        try:
            with forgetting(), self._turn():
                engine = make_engine(self.model, self.engine, 1, len(ids))
                passes = in_passes(engine, ids, PACK_ALONE)
                parts = (part for features in passes for part in features.split(PACK))
            while True:
                with forgetting(), self._turn():
                    if (part := next(parts, None)) is None:
                        return
                    logits = engine.head(part)
                    finite = bool(logits.isfinite().all())
                if not finite:
                    raise FloatingPointError(NOT_FINITE_LOGITS)
                yield logits
        except torch.OutOfMemoryError:
            raise MemoryError(
                f"{self.device} ran out of memory over a text of {len(ids)} tokens: shorten it"
            ) from None
        finally:
            del engine, passes, parts

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread's turn at the model.

        `forgetting` stands around it, not inside: after Ctrl-C between its steps, the kept
        traceback would hold this generator, the lock and inference mode; cleared, it ends."""
        with self._lock, at_work(self.device, self._cores):
            yield


def check_prompts(
    prompts: list[str],
    ckpt_dir: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    max_seq_len: int = 512,
) -> None:
    """Raises what `generate` would raise for these prompts, without loading any weights."""
    args, tokenizer = read_model(model_folder(ckpt_dir), tokenizer_path, max_seq_len=max_seq_len)
    encode_all(prompts, tokenizer, args.max_seq_len)


def common_beginning(prompts: list[list[int]]) -> list[int]:
    """The ids that all of several prompts begin with, but not a prompt's last id, whose logits are
    needed; none if they are too few to be worth a prefill of their own."""
    shared = os.path.commonprefix([ids[:-1] for ids in prompts])
    return shared if len(prompts) > 1 and len(shared) >= SHARED else []
