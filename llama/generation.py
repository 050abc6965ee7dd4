"""`LLaMA`: a model and its tokenizer. `build` loads them, `generate` and `stream` continue prompts,
`chat` answers in a conversation, `score` says how likely a text is.

A prompt becomes ids, which go into a slot of a `Decoder` as soon as one is free; once they are
prefilled, each step gives every slot its next id, and a `Continuation` turns them into text. Each
call has its own state, so that calls may be abandoned or interleaved. Threads may share a model:
they take turns, a step at a time.
"""

import os
import sys
import threading
import traceback
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from llama import checkpoint, room
from llama.chat import conversation, stripped
from llama.continuation import Completion, Continuation, completions, pieces
from llama.decode import ENGINES, Decoder, in_passes, make_engine
from llama.device import pick_device, pick_engine, use_cores
from llama.model import Transformer
from llama.params import read_model
from llama.sampling import NOT_FINITE, next_token
from llama.settings import Settings
from llama.tokenizer import Tokenizer, encode

DEMO = Path(__file__).parent / "demo"
SHARED = 32  # tokens that all prompts begin with, from which on they are prefilled apart, once
# Weights below which one core of a CPU is as fast as several, and several are slowed down by any
# other program: the demo, 180 tokens/s, had 6 on two cores beside a busy process, 147 on one.
ONE_CORE = 2**24
NOT_FINITE_LOGITS = (
    "the model computed logits that are not finite: the weights are damaged or overflow fp16"
)


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
        """Loads a model folder in Meta's format; without a folder, the small demo model.

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
        for name, value in (("use_int8", use_int8), ("verify", verify)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r:.60}, expected True or False")
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}, expected {' or '.join(ENGINES)}")
        folder, target = model_folder(ckpt_dir), pick_device(device, use_int8)
        limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        args, tokenizer = read_model(folder, tokenizer_path, **limits)
        if verify:
            checkpoint.verify(folder)
        if engine == "triton" and target.type == "cuda" and use_int8:
            engine = pick_engine(target, args.head_dim)
        before = sys.exc_info()[1]
        try:
            model = checkpoint.load(folder, args, target, use_int8)
        except BaseException as error:
            forget(error, before)
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

        max_batch_size of them go on at a time, or fewer where memory is short; when one ends, the
        next takes its place. Between two tokens of those that go on, at most 512 tokens of new
        prompts are read. What all begin with is computed once, and then rounded a little
        differently than in each alone; so `[prompt] * n` reads a prompt once for n continuations.

        A continuation ends at the model's end-of-text token, before a stop string, after
        max_gen_len tokens, or when prompt and continuation fill max_seq_len. ValueError for a
        setting out of range or a prompt longer than max_seq_len; MemoryError if not even one
        sequence fits; FloatingPointError if the model computes logits that are not finite.

        Args:
            prompts: a list of any length, of texts or of lists of token ids
            max_gen_len: longest continuation, in tokens (256; --chat: as long as fits)
            temperature: 0 takes the most likely token, 1 samples from the model's distribution
            top_p: samples from the fewest most likely tokens whose probabilities reach this sum
            repetition_penalty: above 1 makes tokens that are already in the text less likely
            repetition_penalty_range: how many of the last tokens count for that
            repetition_penalty_slope: 0 penalizes them equally; above 0 older tokens less
            seed: the same seed, prompt and place in the list give the same text again
            stop: ends a continuation before this text, or before any of a list
            top_k: samples from this many of the most likely tokens; 0 from all
            min_p: samples from tokens at least this fraction as likely as the most likely one
            lookup: guesses tokens from what is already in the text, which does not change it
        """
        penalty = repetition_penalty, repetition_penalty_range, repetition_penalty_slope
        cuts = top_k, min_p
        settings = Settings(max_gen_len, temperature, top_p, *penalty, seed, stop, *cuts, lookup)
        results = in_order(completions(self.steps(prompts, settings)))
        texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts]
        return [text + result.text for text, result in zip(texts, results)]

    def complete(
        self, prompts: list[str | list[int]], settings: Settings, logprobs: bool = False
    ) -> list[Completion]:
        """What came of each prompt, in order: texts, token ids, why they ended and how long they
        took. Settings has the arguments of `generate`, whose errors these are. With logprobs they
        have those of their tokens, as the model gave them, before temperature and penalty."""
        return in_order(completions(self.steps(prompts, settings, logprobs)))

    def completions(
        self, prompts: list[str | list[int]], settings: Settings, logprobs: bool = False
    ) -> Iterator[Completion]:
        """Yields what `complete` returns, each as soon as it has ended; its `index` is the place
        of its prompt. Errors of settings and prompts come at once."""
        return completions(self.steps(prompts, settings, logprobs))

    def chat(
        self,
        messages: list[dict[str, str]],
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
    ) -> str:
        """The answer of a Llama 2 Chat or Llama 3 Instruct model to messages, each a dict of role
        and content: a system's may come first, then user and assistant take turns, the user last.
        Settings and errors are those of `generate`; ValueError too for a model without chat."""
        penalty = repetition_penalty, repetition_penalty_range, repetition_penalty_slope
        cuts = top_k, min_p
        settings = Settings(max_gen_len, temperature, top_p, *penalty, seed, stop, *cuts, lookup)
        [answer] = completions(self.steps([conversation(messages, self)], settings))
        return answer.text.strip()

    def stream(
        self,
        prompt: str | list[int] | list[dict[str, str]],
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
    ) -> Iterator[str]:
        """The continuation of one prompt in pieces, as they come. Joined they are what `generate`
        adds to the prompt; none is part of a character or taken back. Of messages, as `chat` takes
        them, they are the answer. Settings and errors are those of `generate`; a wrong setting or
        prompt raises at once."""
        penalty = repetition_penalty, repetition_penalty_range, repetition_penalty_slope
        cuts = top_k, min_p
        settings = Settings(max_gen_len, temperature, top_p, *penalty, seed, stop, *cuts, lookup)
        if isinstance(prompt, list) and any(isinstance(item, dict) for item in prompt):
            ids = conversation(prompt, self)
            return stripped(pieces(self.steps([ids], settings)))
        return pieces(self.steps([prompt], settings))

    def steps(
        self,
        prompts: list[str | list[int]],
        settings: Settings,
        logprobs: bool = False,
        decoder: Decoder | None = None,
        skip: Container[int] = (),
    ) -> Iterator[list[Continuation]]:
        """Yields after every step the Continuations that it gave tokens, in the order of their
        prompts; each comes for the last time when it has ended. What is at places to `skip` of the
        list is not continued and changes nothing for the others. A decoder that is passed goes on
        from what its cache holds of the one prompt, and stays open. See `completions`."""
        limit, of_model = settings.max_gen_len, self.model.args.max_seq_len
        all_ids = encode(prompts, self.tokenizer, of_model)
        if limit > of_model:
            warnings.warn(
                f"max_gen_len is {limit}, but prompt and continuation end at max_seq_len, "
                f"{of_model} tokens: raise max_seq_len for longer ones",
                stacklevel=3,
            )
        rows = [
            Continuation(
                self.tokenizer, ids, min(limit, of_model - len(ids)), settings.stop, prompt, index
            )
            for index, (prompt, ids) in enumerate(zip(prompts, all_ids))
        ]
        return self._steps(rows, settings, logprobs, decoder, skip)

    def _steps(
        self,
        rows: list[Continuation],
        settings: Settings,
        logprobs: bool,
        kept: Decoder | None,
        skip: Container[int],
    ) -> Iterator[list[Continuation]]:
        seed = torch.Generator().seed() if settings.seed is None else settings.seed
        if full := [row for row in rows if not row.limit and row.index not in skip]:
            yield full
        rows = [row for row in rows if row.limit]
        waiting = deque(row for row in rows if row.index not in skip)
        if not waiting:
            return
        # The whole list decides these, so that what is skipped changes no number.
        length = max(len(row.prompt_ids) + row.limit for row in rows)
        slots = 1 if kept else self._slots(len(rows), length, settings.lookup)
        shared = common_beginning([row.prompt_ids for row in rows])
        going: dict[int, Continuation] = {}  # by slot
        decoder = kept
        try:
            decoder = kept or self.decoder(slots, length, settings, logprobs)
            if shared:
                with self._turn():
                    decoder.share(shared)
            while waiting or going:
                free = [slot for slot in range(slots) if slot not in going]
                with self._turn():
                    for slot in free[: len(waiting)]:
                        row = going[slot] = waiting.popleft()
                        row.begin()
                        uniform = uniform_numbers(seed, row.index, row.limit)
                        start = kept.cached(slot, row.prompt_ids) if kept else len(shared)
                        decoder.begin(slot, row.prompt_ids, uniform, start)
                    drawn = decoder.step()
                begun = [slot for slot in going if slot not in decoder.queue]
                for slot in begun:
                    row = going[slot]
                    add_tokens(row, *(values[slot] for values in drawn))
                    if row.finish_reason:
                        decoder.end(slot, len(row.prompt_ids) + len(row.ids))
                if begun:
                    yield [going[slot] for slot in begun]
                going = {slot: row for slot, row in going.items() if row.finish_reason is None}
        except torch.OutOfMemoryError:
            raise self._too_big(slots, length) from None
        finally:
            if decoder is not kept:
                decoder.close()

    def _slots(self, sequences: int, length: int, lookup: bool) -> int:
        """How many sequences of this length are continued at once: max_batch_size, or as many as
        fit, with a warning; 1 if none does, which `decoder` refuses."""
        dtype, free = self.model.tok_embeddings.weight.dtype, room.free_bytes(self._device)
        wanted = min(sequences, self.model.args.max_batch_size)

        def taken(slots: int) -> int:
            need = room.need(self.model, slots, length, dtype, lookup)
            return need.cache + need.work

        with self._turn():
            fit = wanted
            if taken(wanted) > free:
                fit = bisect_right(range(1, wanted), free, key=taken)
        if 0 < fit < wanted:
            warnings.warn(
                f"{wanted} sequences of {length} tokens need {taken(wanted) / room.GIB:.1f} GiB, "
                f"{self._device} has {free / room.GIB:.1f} GiB free: {fit} at a time are continued",
                stacklevel=2,
            )
        return max(fit, 1)

    def decoder(
        self, slots: int, length: int, settings: Settings, logprobs: bool = False
    ) -> Decoder:
        """For so many sequences of at most `length` tokens; MemoryError unless they fit."""
        pick = partial(next_token, settings=settings)
        try:
            with self._turn():
                self.check_room(slots, length)
                of = self.model, self.engine, slots, length, pick, logprobs
                return Decoder(*of, settings.lookup)
        except torch.OutOfMemoryError:
            raise self._too_big(slots, length) from None

    def score(self, texts: list[str]) -> list[list[float]]:
        """The log-probability of each token of each text: one for each of
        `tokenizer.encode(text, bos=False, eos=False)`, given the tokens before it, in nats.

        Each text is prefilled. ValueError for one longer than max_seq_len, FloatingPointError
        and MemoryError as `generate`.
        """
        scores = []
        for ids in encode(texts, self.tokenizer, self.model.args.max_seq_len, "text"):
            scores.append([])
            following = torch.tensor(ids[1:], device="cpu")
            for logits in self.logits(ids[:-1]):
                tokens, following = following[: len(logits)], following[len(logits) :]
                every = logits.log_softmax(-1)
                scores[-1] += every.gather(-1, tokens.to(every.device)[:, None])[:, 0].tolist()
        return scores

    def logits(self, ids: list[int]) -> Iterator[Tensor]:
        """Float32 logits of what follows each of ids, in order: (n, V), those of a pass at once."""
        if not ids:
            return
        engine = passes = None
        try:
            with self._turn():
                engine = make_engine(self.model, self.engine, 1, len(ids))
                passes = in_passes(engine, ids)
            while True:
                with self._turn():
                    if (features := next(passes, None)) is None:
                        return
                    logits = engine.head(features)
                    finite = bool(logits.isfinite().all())
                if not finite:
                    raise FloatingPointError(NOT_FINITE_LOGITS)
                yield logits
        except torch.OutOfMemoryError:
            raise MemoryError(
                f"{self._device} ran out of memory over a text of {len(ids)} tokens: shorten it"
            ) from None
        finally:
            del engine, passes

    @property
    def _device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread's turn at the model: on its device (torch and Triton by themselves would work
        on cuda:0), and exact, though the program around it may be in an autocast."""
        device = self._device
        on_device = torch.accelerator.device_index(device.index)  # does nothing on the CPU
        exact = torch.autocast(device.type, enabled=False)
        before = sys.exc_info()[1]
        with self._lock, on_device, exact, torch.inference_mode():
            cores = use_cores(self._cores or torch.get_num_threads())
            try:
                yield
            except BaseException as error:
                forget(error, before)
                raise
            finally:
                use_cores(cores)

    def check_room(self, sequences: int, length: int) -> None:
        """MemoryError unless keys and values of so many sequences of this length fit."""
        args, weight = self.model.args, self.model.tok_embeddings.weight
        if room.cache_bytes(args, sequences, length, weight.dtype) > room.free_bytes(weight.device):
            raise self._too_big(sequences, length)

    def _too_big(self, sequences: int, length: int) -> MemoryError:
        args, weight = self.model.args, self.model.tok_embeddings.weight
        need = room.cache_bytes(args, sequences, length, weight.dtype) / room.GIB
        free = room.free_bytes(weight.device) / room.GIB
        return MemoryError(
            f"{sequences} x {length} tokens need {need:.1f} GiB for keys and values and some for "
            f"work, {weight.device} has {free:.1f} GiB free: lower --max_batch_size or "
            "--max_gen_len"
        )


def forget(error: BaseException | None, before: BaseException | None) -> None:
    """Clears the variables of the frames that an error came through: IPython keeps the last
    exception, and they would keep the weights or the KV cache in memory. What was already being
    handled `before` stays as it is."""
    while error and error is not before:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def add_tokens(
    row: Continuation, ids: list[int], logprobs: Iterable[float | None] = repeat(None)
) -> None:
    """Adds to a row what a step drew for it, up to where it ends."""
    for id, logprob in zip(ids, logprobs):
        if row.finish_reason:
            return
        if id == NOT_FINITE:
            raise FloatingPointError(NOT_FINITE_LOGITS)
        row.add(id, logprob)


def check_prompts(
    prompts: list[str],
    ckpt_dir: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    max_seq_len: int = 512,
) -> None:
    """Raises what `generate` would raise for these prompts, without loading any weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `build` will give them
        folder = model_folder(ckpt_dir)
        args, tokenizer = read_model(folder, tokenizer_path, max_seq_len=max_seq_len)
    encode(prompts, tokenizer, args.max_seq_len)


def model_folder(ckpt_dir: str | Path | None) -> Path:
    if ckpt_dir is None:
        return DEMO
    if not (ckpt_dir and isinstance(ckpt_dir, str | Path)):
        raise ValueError(
            f"ckpt_dir is {ckpt_dir!r:.60}, expected the model folder, e.g. --ckpt_dir /w/13B"
        )
    return Path(os.path.expanduser(ckpt_dir))


def in_order(results: Iterable[Completion]) -> list[Completion]:
    return sorted(results, key=attrgetter("index"))


def common_beginning(prompts: list[list[int]]) -> list[int]:
    """The ids that all of several prompts begin with, the last id of each left out, whose logits
    are needed; none if they are not worth a prefill of their own."""
    shared = os.path.commonprefix([ids[:-1] for ids in prompts])
    return shared if len(prompts) > 1 and len(shared) >= SHARED else []


def uniform_numbers(seed: int, place: int, count: int) -> Tensor:
    """(count,) in [0, 1) for the prompt at this place of a list: seed and place alone decide."""
    generator = torch.Generator("cpu")
    generator.manual_seed((seed + place * 0x9E3779B97F4A7C15) % 2**63)  # neighbours far apart
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
