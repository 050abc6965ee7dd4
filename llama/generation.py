"""How does it talk?

`LLaMA` joins a model and its tokenizer: `build` is the one place where the parts are wired,
`generate` continues prompts. Prompts of different lengths share a batch without padding: each is
prefilled alone and whole, then all rows decode together, each from its own position.
"""

import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama import checkpoint, room
from llama.graph import captured
from llama.int8 import Int8Linear
from llama.model import KVCache, Transformer, check
from llama.sampling import NOT_FINITE, penalize, sample
from llama.tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"
ENGINES = ("triton", "bnb")
MOST_FUSED_ROWS = 32  # more are a matter of arithmetic, not of reading weights


class LLaMA:
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

        A tokenizer not given is looked for in the folder and beside it. use_int8=False keeps the
        weights in fp16 (float32 on the CPU). The device is CUDA if there is any. engine="bnb" takes
        bitsandbytes' product for decoding too. Prompts given here are checked before the weights
        are loaded, not kept. Progress goes to stderr. OSError, ValueError, MemoryError or
        ImportError say in one sentence what is wrong, before anything long starts where that can
        be.
        """
        if not isinstance(use_int8, bool):
            raise ValueError(f"use_int8 is {use_int8!r}, expected True or False")
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}, expected {' or '.join(ENGINES)}")
        if ckpt_dir == "":
            raise ValueError("ckpt_dir is empty: pass the model folder, e.g. --ckpt_dir /w/13B")
        folder = DEMO if ckpt_dir is None else Path(ckpt_dir).expanduser()
        target = pick_device(device, use_int8)
        params = checkpoint.read_params(folder)
        tokenizer = Tokenizer(tokenizer_path or checkpoint.tokenizer_of(folder))
        limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        args = checkpoint.model_args(params, tokenizer.n_words, **limits)
        encode(prompts, tokenizer, args.max_seq_len)
        if engine == "triton" and target.type == "cuda" and use_int8:
            engine = engine_for(target)
        try:
            model = checkpoint.load(folder, args, target, use_int8)
        except BaseException as error:
            forget(error)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise MemoryError(
                f"{target} ran out of memory while the model was loaded: something else took what "
                "was free before (nvidia-smi shows it)"
            ) from None
        return LLaMA(model, tokenizer, engine)

    def generate(
        self,
        prompts: list[str],
        max_gen_len: int,
        temperature: float = 0.8,
        top_p: float = 0.95,
        repetition_penalty: float = 1.0,
        repetition_penalty_range: int = 1024,
        repetition_penalty_slope: float = 0.0,
        seed: int | None = None,
    ) -> list[str]:
        """Each prompt with its continuation of at most max_gen_len tokens, in order.

        A row ends at the model's end-of-text token or when prompt and continuation fill
        max_seq_len. Temperature 0 is greedy; `sampling` has the formulas. A seed gives the same
        text again for the same prompt in the same place of the list, whatever else is in it.

        ValueError for a setting out of range, a prompt longer than max_seq_len or more prompts than
        max_batch_size; MemoryError if the sequences do not fit; FloatingPointError if the model
        computes logits that are not finite.
        """
        check_settings(
            max_gen_len,
            temperature,
            top_p,
            repetition_penalty,
            repetition_penalty_range,
            repetition_penalty_slope,
            seed,
        )
        prompt_ids = encode(prompts, self.tokenizer, self.model.args.max_seq_len)
        if len(prompts) > self.model.args.max_batch_size:
            raise ValueError(
                f"{len(prompts)} prompts, max_batch_size is {self.model.args.max_batch_size}: "
                "pass fewer at once or raise max_batch_size"
            )

        def choose(logits: Tensor, tokens: Tensor, lengths: Tensor, uniform: Tensor) -> Tensor:
            if repetition_penalty != 1:
                logits = penalize(
                    logits,
                    tokens,
                    lengths,
                    repetition_penalty,
                    repetition_penalty_range,
                    repetition_penalty_slope,
                )
            return sample(logits, temperature, top_p, uniform)

        new_ids: list[list[int]] = [[] for _ in prompts]
        try:
            for step in self._decode(prompt_ids, max_gen_len, choose, seed):
                for row, token in step.items():
                    new_ids[row].append(token)
        except torch.OutOfMemoryError:
            raise MemoryError(self._too_big(prompt_ids, max_gen_len)) from None
        return [p + self._continuation(*ids) for p, *ids in zip(prompts, prompt_ids, new_ids)]

    def _continuation(self, prompt_ids: list[int], new_ids: list[int]) -> str:
        """Text of new_ids where they stand: a first piece's leading space is part of it."""
        before = self.tokenizer.decode(prompt_ids)
        return self.tokenizer.decode(prompt_ids + new_ids)[len(before) :]

    @torch.inference_mode()
    def _decode(
        self,
        prompt_ids: list[list[int]],
        max_gen_len: int,
        choose: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        seed: int | None,
    ) -> Iterator[dict[int, int]]:
        """Yields for each step the new token of every row that is still going."""
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
        for step in range(steps):
            if step > 0:
                advance()
            ids = chosen.tolist()
            if any(ids[row] == NOT_FINITE for row in going):
                raise FloatingPointError(
                    f"the model computed logits that are not finite at token {step + 1} of the "
                    "continuation: the weights are damaged or overflow fp16"
                )
            going = {row for row in going if ids[row] != eos_id and lengths[row] + step < ends[row]}
            yield {row: ids[row] for row in going}
            if not going:
                return

    def _engine(self, cache: KVCache) -> tuple[Callable, Callable, bool]:
        """What computes logits (1, V) from the tokens (T,) of a prompt and its row, what computes
        logits (B, V) from tokens (B,) at positions (B,), and whether a CUDA graph can hold that:
        bitsandbytes' product cannot, it asks the host for the outliers."""
        model, cuda = self.model, cache.k.is_cuda
        int8 = isinstance(model.output, Int8Linear)
        head_dim = model.args.head_dim
        power_of_2 = head_dim >= 16 and head_dim & (head_dim - 1) == 0

        def prefill(tokens: Tensor, row: int) -> Tensor:
            return model(tokens[None], 0, cache.row(row))

        def step(tokens: Tensor, positions: Tensor) -> Tensor:
            return model(tokens[:, None], positions, cache)

        if not (int8 and cuda and self.engine == "triton" and power_of_2):
            return prefill, step, cuda and not int8
        from llama.fused import Fused  # Triton comes with torch's CUDA build alone

        fused = Fused(model, cache)
        if cache.batch > MOST_FUSED_ROWS:
            return fused.prefill, step, False
        return fused.prefill, fused.step, True

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


def forget(error: BaseException | None) -> None:
    """Lets go of what the frames of an error hold, a model half loaded: a notebook keeps the error
    until the next one. What torch's pool then has free goes back to the driver."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    torch.cuda.empty_cache()  # does nothing where CUDA was not started


def check_settings(
    max_gen_len: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    repetition_penalty_range: int,
    repetition_penalty_slope: float,
    seed: int | None,
) -> None:
    """ValueError for a setting of `generate` that is out of range."""
    check("max_gen_len", max_gen_len, int, 1, 2**31)
    check("temperature", temperature, float, 0, 1e6)
    check("top_p", top_p, float, 0, 1)
    check("repetition_penalty", repetition_penalty, float, 0.01, 100)
    check("repetition_penalty_range", repetition_penalty_range, int, 1, 2**31)
    check("repetition_penalty_slope", repetition_penalty_slope, float, 0, 1e6)
    if seed is not None:
        check("seed", seed, int, 0, 2**63 - 1)


def encode(prompts: list[str], tokenizer: Tokenizer, max_seq_len: int) -> list[list[int]]:
    """Ids of each prompt; ValueError for what is no text or too long."""
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts is {prompts!r:.60}, expected a list of strings")
    prompt_ids = []
    for i, prompt in enumerate(prompts):
        if re.search(r"[\ud800-\udfff]", prompt):
            raise ValueError(f"prompt {i + 1} holds half a character (a lone surrogate): mend it")
        ids = tokenizer.encode(prompt, bos=True, eos=False)
        if len(ids) > max_seq_len:
            raise ValueError(
                f"prompt {i + 1} has {len(ids)} tokens, max_seq_len is {max_seq_len}: "
                "shorten it or raise max_seq_len"
            )
        prompt_ids.append(ids)
    return prompt_ids


def uniform_numbers(seed: int | None, rows: int, steps: int) -> Tensor:
    """(rows, steps) in [0, 1), from a generator a row: a row's numbers depend on the seed and its
    place alone."""
    generator = torch.Generator("cpu")
    seed = generator.seed() if seed is None else seed
    numbers = []
    for row in range(rows):
        generator.manual_seed((int(seed) + row * 0x9E3779B97F4A7C15) % 2**63)  # far apart
        numbers.append(torch.rand(steps, generator=generator, device="cpu"))
    return torch.stack(numbers)


def pick_device(device: str | torch.device | None, use_int8: bool) -> torch.device:
    """CUDA if there is any, unless told otherwise; ValueError or ImportError if it cannot work."""
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}, expected cuda, cuda:1 or cpu") from None
    if target.type not in ("cuda", "cpu"):
        raise ValueError(f"device is {target}, expected cuda, cuda:1 or cpu")
    if target.type == "cpu":
        return target
    if not torch.cuda.is_available() or (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {target}, but torch {torch.__version__} sees {torch.cuda.device_count()} "
            "CUDA devices: install a CUDA build of torch and the driver, or pass --device=cpu"
        )
    from bitsandbytes.cextension import lib

    if use_int8 and getattr(lib, "compiled_with_cuda", False) is not True:
        raise ImportError(
            f"bitsandbytes has no library for CUDA {torch.version.cuda}: reinstall it (pip install "
            "-r requirements.txt), see python -m bitsandbytes, or pass --use_int8=False"
        )
    return target


def engine_for(device: torch.device) -> str:
    """Whose product decodes: ours, or with a warning bitsandbytes' where ours does not run."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        warnings.warn(
            f"{device} has compute capability {capability[0]}.{capability[1]}, our kernels need "
            "8.0: bitsandbytes decodes instead, slower",
            stacklevel=3,
        )
        return "bnb"
    return "triton"
