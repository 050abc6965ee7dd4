"""How does it talk?

`LLaMA` joins a model and its tokenizer: `build` is the one place where the parts are wired,
`generate` and `stream` continue prompts, `score` says how likely a text is. Prompts of different
lengths share a batch without padding: each is prefilled alone and whole, then all rows decode
together, each from its own position. What belongs to a call is its own, so that calls may be
abandoned or overlap; threads take turns, a step at a time.
"""

import functools
import os
import re
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from llama import checkpoint, params, room
from llama.continuation import Continuation
from llama.graph import captured
from llama.int8 import Int8Linear
from llama.model import KVCache, Transformer
from llama.sampling import NOT_FINITE, penalize, sample
from llama.settings import Settings, takes
from llama.tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"
ENGINES = ("triton", "bnb")
MOST_FUSED_ROWS = 32  # of `kernels.linear`; a step of more reads the weights several times
POSITIONS = 256  # whose logits are in memory at once when a text is scored: 33 MB of LLaMA's
NO_BUGS = MemoryError, torch.OutOfMemoryError, FloatingPointError, KeyboardInterrupt
TURN = threading.RLock()  # a model's first call may move weights, and its GPU has one stream
if hasattr(os, "register_at_fork"):  # a child has none of the threads that may have held it
    os.register_at_fork(after_in_child=lambda: globals().update(TURN=threading.RLock()))


def in_turn(steps: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """A method of LLaMA that works step by step, one thread's step at a time, on its own device."""

    @functools.wraps(steps)
    def call(self, *args, **kwargs):
        # Torch and Triton by themselves would work on cuda:0. Does nothing on the CPU.
        on = self.model.tok_embeddings.weight.device
        device = torch.accelerator.device_index(on.index)
        exactly = torch.autocast(on.type, enabled=False)  # though the caller may be in one
        with closing(steps(self, *args, **kwargs)) as running:
            while True:
                with TURN, device, exactly:
                    try:
                        result = next(running)
                    except StopIteration:
                        return
                    except NO_BUGS as error:
                        # A notebook keeps it until the next one, and frames would keep the cache.
                        error.__context__ = None
                        raise error.with_traceback(None) from None
                yield result

    return call


class LLaMA:
    """A model and its tokenizer; `build` makes one from files. engine is one of ENGINES."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, engine: str = "triton"):
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine

    @staticmethod
    def build(
        ckpt_dir: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 32,
        use_int8: bool = True,
        device: str | torch.device | None = None,
        engine: str = "triton",
        prompts: list[str] = (),
    ) -> "LLaMA":
        """Loads a model folder in Meta's format; without a folder, the small demo model.

        Prompts given here are checked before the weights are loaded, not kept. Progress goes to
        stderr. OSError, ValueError, MemoryError or ImportError say in one sentence what is wrong,
        before anything long starts where that can be.

        Args:
            ckpt_dir: model folder in Meta's format (the demo model if not given)
            tokenizer_path: its tokenizer.model (looked for in the folder and beside it)
            max_seq_len: longest sequence, prompt and continuation, in tokens
            max_batch_size: most prompts continued at once
            use_int8: False keeps the weights in fp16 (float32 on the CPU)
            device: cuda, cuda:1 or cpu (CUDA if there is any)
            engine: on CUDA in int8: triton, or bnb for bitsandbytes' product, the reference
        """
        if not isinstance(use_int8, bool):
            raise ValueError(f"use_int8 is {use_int8!r}, expected True or False")
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}, expected {' or '.join(ENGINES)}")
        if ckpt_dir is not None and not (ckpt_dir and isinstance(ckpt_dir, str | Path)):
            raise ValueError(
                f"ckpt_dir is {ckpt_dir!r:.60}, expected the model folder, e.g. --ckpt_dir /w/13B"
            )
        folder = DEMO if ckpt_dir is None else Path(os.path.expanduser(ckpt_dir))
        target = pick_device(device, use_int8)
        limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        args, tokenizer = params.read_model(folder, tokenizer_path, **limits)
        encode(prompts, tokenizer, args.max_seq_len)
        if engine == "triton" and target.type == "cuda" and use_int8:
            engine = engine_for(target, args.head_dim)
        before = sys.exc_info()[1]  # where we are called while an error is handled
        try:
            model = checkpoint.load(folder, args, target, use_int8)
        except BaseException as error:
            forget(error, before)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise MemoryError(
                f"{target} ran out of memory while the model was loaded: something else took what "
                "was free before (nvidia-smi shows it)"
            ) from None
        return LLaMA(model, tokenizer, engine)

    @takes(Settings)
    def generate(self, prompts: list[str], settings: Settings) -> list[str]:
        """Each prompt with its continuation, in order.

        A row ends at the model's end-of-text token, before a stop string, after max_gen_len tokens
        or when prompt and continuation fill max_seq_len. A seed gives the same text again for the
        same prompt in the same place of the list, whatever else is in it.

        ValueError for a setting out of range, a prompt longer than max_seq_len or more prompts than
        max_batch_size; MemoryError if the sequences do not fit; FloatingPointError if the model
        computes logits that are not finite.
        """
        *_, rows = self.steps(prompts, settings)
        return [prompt + row.text for prompt, row in zip(prompts, rows)]

    @takes(Settings)
    def stream(self, prompt: str, settings: Settings) -> Iterator[str]:
        """The continuation of one prompt in pieces, as they come. Joined they are what `generate`
        adds to the prompt; none is part of a character or taken back. Errors as there."""
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {prompt!r:.60}, expected a string")
        return pieces(self.steps([prompt], settings))

    def steps(
        self, prompts: list[str], settings: Settings, logprobs: bool = False
    ) -> Iterator[list[Continuation]]:
        """The rows of the prompts, the same list after each step and once more when all have
        finished; logprobs: with those of the generated tokens, in the end. Errors as `generate`,
        those of settings and prompts at once."""
        prompt_ids = encode(prompts, self.tokenizer, self.model.args.max_seq_len)
        if len(prompts) > self.model.args.max_batch_size:
            raise ValueError(
                f"{len(prompts)} prompts, max_batch_size is {self.model.args.max_batch_size}: "
                "pass fewer at once or raise max_batch_size"
            )
        return self._steps(prompt_ids, settings, logprobs)

    def _steps(
        self, prompt_ids: list[list[int]], settings: Settings, logprobs: bool
    ) -> Iterator[list[Continuation]]:
        args, device = self.model.args, self.model.tok_embeddings.weight.device
        limits = [min(settings.max_gen_len, args.max_seq_len - len(ids)) for ids in prompt_ids]
        rows = [Continuation(self.tokenizer, *of, settings.stop) for of in zip(prompt_ids, limits)]
        chosen = None
        # Of the token at each position (B, S); rows that have ended fill a last column.
        if logprobs:
            shape = len(rows), args.max_seq_len + 1
            chosen = torch.zeros(shape, dtype=torch.float32, device=device)

        penalty = (
            settings.repetition_penalty,
            settings.repetition_penalty_range,
            settings.repetition_penalty_slope,
        )
        draw = {"top_k": settings.top_k, "min_p": settings.min_p}

        def choose(logits: Tensor, tokens: Tensor, lengths: Tensor, uniform: Tensor) -> Tensor:
            likely = penalize(logits, tokens, lengths, *penalty) if penalty[0] != 1 else logits
            token = sample(likely, settings.temperature, settings.top_p, uniform, **draw)
            if chosen is not None:
                every = logits.log_softmax(-1)
                place = lengths.clamp(max=args.max_seq_len)
                picked = every.gather(-1, token.clamp(min=0)[:, None])
                chosen.scatter_(1, place[:, None], picked)
            return token

        stopped: set[int] = set()
        try:
            for step in self._decode(
                prompt_ids, settings.max_gen_len, choose, settings.seed, stopped
            ):
                for i, token in step.items():
                    rows[i].ids.append(token)
                    if settings.stop:
                        rows[i].listen()
                        if rows[i].finish_reason:
                            stopped.add(i)
                yield rows
        except torch.OutOfMemoryError:
            raise MemoryError(self._too_big(prompt_ids, settings.max_gen_len)) from None
        for i, row in enumerate(rows):
            row.finish()
            if chosen is not None:
                first = len(row.prompt_ids)
                row.logprobs = chosen[i, first : first + len(row.ids)].tolist()
        yield rows

    def score(self, texts: list[str]) -> list[list[float]]:
        """The log-probability of each token of each text: one for each of
        `tokenizer.encode(text, bos=False, eos=False)`, given the tokens before it, in nats.

        Each text takes one prefill. ValueError for one longer than max_seq_len, FloatingPointError
        and MemoryError as `generate`.
        """
        scores = []
        for ids in encode(texts, self.tokenizer, self.model.args.max_seq_len, "text"):
            scores.append([])
            following = torch.tensor(ids[1:], device="cpu").split(POSITIONS)
            for tokens, logits in zip(following, self.logits(ids[:-1])):
                every = logits.log_softmax(-1)
                scores[-1] += every.gather(-1, tokens.to(every.device)[:, None])[:, 0].tolist()
        return scores

    @in_turn
    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Iterator[Tensor]:
        """Float32 logits of what follows each of ids, in order: (n, V), at most POSITIONS at once,
        from one prefill."""
        if not ids:
            return
        weight = self.model.tok_embeddings.weight
        tokens = torch.tensor(ids, device=weight.device)
        try:
            fused = self._fused(KVCache(self.model.args, 1, len(ids), weight))
            features = fused.features(tokens, 0) if fused else self.model.features(tokens[None])[0]
            head = fused.head if fused else self.model.output
            for part in features.split(POSITIONS):
                logits = head(part).float()
                if not logits.isfinite().all():
                    raise FloatingPointError(
                        "the model computed logits that are not finite: the weights are damaged or "
                        "overflow fp16"
                    )
                yield logits
        except torch.OutOfMemoryError:
            raise MemoryError(
                f"{weight.device} ran out of memory over a text of {len(ids)} tokens: shorten it"
            ) from None

    @in_turn
    @torch.inference_mode()
    def _decode(
        self,
        prompt_ids: list[list[int]],
        max_gen_len: int,
        choose: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        seed: int | None,
        stopped: Set[int] = frozenset(),
    ) -> Iterator[dict[int, int]]:
        """Yields for each step the new token of every row that is still going. The caller may put
        a row in stopped to end it."""
        model, eos_id = self.model, self.tokenizer.eos_id
        weight = model.tok_embeddings.weight
        lengths = [len(ids) for ids in prompt_ids]
        ends = [min(n + max_gen_len, model.args.max_seq_len) for n in lengths]
        going = {row for row, (n, end) in enumerate(zip(lengths, ends)) if n < end}
        if not going:
            return
        B, S = len(lengths), max(ends)
        need = room.cache_bytes(model.args, B, S, weight.dtype)
        if need > room.free_bytes(weight.device):
            raise MemoryError(self._too_big(prompt_ids, max_gen_len))

        steps = max(end - n for n, end in zip(lengths, ends))
        uniform = uniform_numbers(seed, B, steps).to(weight.device)
        tokens = torch.zeros(B, S, dtype=torch.long, device=weight.device)
        cache = KVCache(model.args, B, S, weight)
        prefill, forward, capture = self._engine(cache)
        logits = []
        for row, ids in enumerate(prompt_ids):
            tokens[row, : len(ids)] = torch.tensor(ids, device="cpu")
            logits.append(prefill(tokens[row, : len(ids)], row))
        logits = torch.cat(logits)
        length = torch.tensor(lengths, device=weight.device)
        last = torch.tensor([end - 1 for end in ends], device=weight.device)
        count = torch.zeros(1, dtype=torch.long, device=weight.device)
        chosen = torch.zeros(B, dtype=torch.long, device=weight.device)

        def choose_next() -> None:
            chosen.copy_(choose(logits, tokens, length, uniform.index_select(1, count)[:, 0]))
            # A row that has ended goes on, at the end of its room in the same place: nobody looks.
            place = torch.minimum(length, last)[:, None]
            tokens.scatter_(1, place, chosen.clamp(min=0)[:, None])
            length.add_(1)
            count.add_(1)

        def advance() -> None:
            place = torch.minimum(length - 1, last)
            logits.copy_(forward(tokens.gather(1, place[:, None])[:, 0], place))
            choose_next()

        choose_next()
        if capture and steps > 1:
            advance = captured(advance, [tokens, length, count, chosen, logits])
        reads = deque()
        behind = 1 if capture else 0  # a graph's next step runs while the host reads its last
        for step in range(-behind, steps):
            if step + behind < steps:
                if step + behind > 0:
                    advance()
                reads.append(fetch(chosen))
            if step < 0:
                continue
            ids = reads.popleft()()
            if any(ids[row] == NOT_FINITE for row in going):
                raise FloatingPointError(
                    f"the model computed logits that are not finite at token {step + 1} of the "
                    "continuation: the weights are damaged or overflow fp16"
                )
            going = {row for row in going if ids[row] != eos_id and lengths[row] + step < ends[row]}
            yield {row: ids[row] for row in going}
            going -= stopped
            if not going:
                return

    def _engine(self, cache: KVCache) -> tuple[Callable, Callable, bool]:
        """What computes logits (1, V) from the tokens (T,) of a prompt and its row, what computes
        logits (B, V) from tokens (B,) at positions (B,), and whether a CUDA graph can hold that:
        bitsandbytes' product cannot, it asks the host for the outliers."""
        model = self.model
        parts = [self._fused(part) for part in cache.split(MOST_FUSED_ROWS)]

        if parts[0] is None:
            rows = cache.split(1)

            def prefill(tokens: Tensor, row: int) -> Tensor:
                return model(tokens[None], 0, rows[row])

            def step(tokens: Tensor, positions: Tensor) -> Tensor:
                return model(tokens[:, None], positions, cache)

            return prefill, step, cache.k.is_cuda and not isinstance(model.output, Int8Linear)

        def prefill(tokens: Tensor, row: int) -> Tensor:
            return parts[row // MOST_FUSED_ROWS].prefill(tokens, row % MOST_FUSED_ROWS)

        def step(tokens: Tensor, positions: Tensor) -> Tensor:
            each = zip(parts, tokens.split(MOST_FUSED_ROWS), positions.split(MOST_FUSED_ROWS))
            return torch.cat([part.step(*of) for part, *of in each])

        return prefill, step if len(parts) > 1 else parts[0].step, True

    def _fused(self, cache: KVCache):
        """A `fused.Fused` where our kernels run, else None."""
        int8 = isinstance(self.model.output, Int8Linear)
        if not (int8 and cache.k.is_cuda and self.engine == "triton"):
            return None
        from llama.fused import Fused  # Triton comes with torch's CUDA build alone

        return Fused(self.model, cache)

    def _too_big(self, prompt_ids: list[list[int]], max_gen_len: int) -> str:
        args, weight = self.model.args, self.model.tok_embeddings.weight
        longest = min(max(map(len, prompt_ids)) + max_gen_len, args.max_seq_len)
        need = room.cache_bytes(args, len(prompt_ids), longest, weight.dtype)
        return (
            f"{len(prompt_ids)} sequences of {longest} tokens need {need / room.GIB:.1f} GiB "
            f"for keys and values and some for work, {weight.device} has "
            f"{room.free_bytes(weight.device) / room.GIB:.1f} GiB free: pass fewer "
            "prompts at once (--max_batch_size) or lower --max_gen_len"
        )


def pieces(steps: Iterator[list[Continuation]]) -> Iterator[str]:
    with closing(steps):
        for [row] in steps:
            if piece := row.read():
                yield piece


def fetch(values: Tensor) -> Callable[[], list[int]]:
    """Starts to copy values (B,) to the host; the function it returns waits until they arrive."""
    if not values.is_cuda:
        ids = values.tolist()
        return lambda: ids
    there = torch.empty_like(values, device="cpu", pin_memory=True)
    there.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return there.tolist()

    return wait


def forget(error: BaseException | None, before: BaseException | None) -> None:
    """Lets go of what the frames of an error hold, a model half loaded: a notebook keeps the error
    until the next one. Frames of the error `before` it are not ours. What torch's pool then has
    free goes back to the driver."""
    while error and error is not before:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    torch.cuda.empty_cache()  # does nothing where CUDA was not started


def encode(
    texts: list[str], tokenizer: Tokenizer, max_seq_len: int, called: str = "prompt"
) -> list[list[int]]:
    """Ids of each text, the beginning's included; ValueError for what is no text or too long."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{called}s is {texts!r:.60}, expected a list of strings")
    text_ids = []
    for i, text in enumerate(texts):
        if re.search(r"[\ud800-\udfff]", text):
            raise ValueError(f"{called} {i + 1} holds half a character (a lone surrogate): mend it")
        ids = tokenizer.encode(text, bos=True, eos=False)
        if len(ids) > max_seq_len:
            raise ValueError(
                f"{called} {i + 1} has {len(ids)} tokens, max_seq_len is {max_seq_len}: "
                "shorten it or raise max_seq_len"
            )
        text_ids.append(ids)
    return text_ids


def row_seed(seed: int, row: int) -> int:
    """The seed with which a batch that begins at this row of a list draws what the whole list
    would. Those of neighbouring rows are far apart."""
    return (int(seed) + row * 0x9E3779B97F4A7C15) % 2**63


def uniform_numbers(seed: int | None, rows: int, steps: int) -> Tensor:
    """(rows, steps) in [0, 1), from a generator a row: a row's numbers depend on the seed and its
    place alone."""
    generator = torch.Generator("cpu")
    seed = generator.seed() if seed is None else seed
    numbers = []
    for row in range(rows):
        generator.manual_seed(row_seed(seed, row))
        numbers.append(torch.rand(steps, generator=generator, dtype=torch.float32, device="cpu"))
    return torch.stack(numbers)


def pick_device(device: str | torch.device | None, use_int8: bool) -> torch.device:
    """CUDA if there is any, unless told otherwise; ValueError or ImportError if it cannot work."""
    try:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        target = torch.device(automatic if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}, expected cuda, cuda:1 or cpu") from None
    if target.type not in ("cuda", "cpu"):
        raise ValueError(f"device is {target}, expected cuda, cuda:1 or cpu")
    if target.type == "cpu":
        return target
    if not torch.cuda.is_available():
        raise ValueError(
            f"device is {target}, but torch {torch.__version__} sees no CUDA GPU: install a CUDA "
            "build of torch and the driver, or pass --device=cpu"
        )
    if (target.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"device is {target}, expected one of cuda:0 to cuda:{count - 1}: those are all that "
            "torch sees"
        )
    from bitsandbytes.cextension import lib

    if use_int8 and getattr(lib, "compiled_with_cuda", False) is not True:
        raise ImportError(
            f"bitsandbytes has no library for CUDA {torch.version.cuda}: reinstall it (pip install "
            "-r requirements.txt), see python -m bitsandbytes, or pass --use_int8=False"
        )
    return target


def engine_for(device: torch.device, head_dim: int) -> str:
    """The engine triton where our kernels run; elsewhere bnb, and a warning says why."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        reason = f"{device} has compute capability {major}.{minor}, our kernels need 8.0"
    elif head_dim < 16 or head_dim & (head_dim - 1):
        reason = f"attention heads are {head_dim} wide, our kernels need a power of 2, at least 16"
    else:
        return "triton"
    warnings.warn(f"{reason}: bitsandbytes multiplies instead, slower", stacklevel=3)
    return "bnb"
