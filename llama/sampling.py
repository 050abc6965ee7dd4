"""Logits (B, V) -> next token (B,): repetition penalty, temperature, top-p, top-k, min-p.

Everything stays on the device of the logits and nothing waits for the host. The randomness comes in
as one uniform number a row, so that a row's token does not depend on the other rows.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from llama.settings import Settings

NOT_FINITE = -1  # the token of a row whose logits are not all finite
NOT_FINITE_LOGITS = (
    "the model computed logits that are not finite: the weights are damaged or overflow fp16"
)
SMALLEST = 1e-30  # divisor: float32 takes 1e-46 for 0, and 0 / 0 is no number


def next_token(
    logits: Tensor, tokens: Tensor, lengths: Tensor, uniform: Tensor, settings: Settings
) -> Tensor:
    """The next token (B,) of sequences tokens[b, :lengths[b]], or NOT_FINITE.

    Temperature 0 takes the most likely token. Otherwise the draw is from softmax(logits /
    temperature), among the tokens that pass all of these:

    - top_p: the nucleus, the smallest set of most likely tokens whose probabilities add up to top_p
      or more (Holtzman et al. 2020, arXiv 1904.09751, section 3.1)
    - top_k, unless 0: the k most likely (Fan et al. 2018, arXiv 1805.04833, section 5.4)
    - min_p: p >= min_p max(p) (Nguyen et al. 2024, arXiv 2407.01082, section 3)

    uniform (B,) in [0, 1) picks the token by inverting the cumulated probabilities, most likely
    first.
    """
    if settings.repetition_penalty != 1:
        logits = penalize(logits, tokens, lengths, settings)
    if settings.temperature == 0:
        token = logits.argmax(-1)
    elif has_kernel(logits.device):
        from llama.kernels import sampling  # only here: importing triton takes a while

        return sampling.draw(logits, uniform, settings)
    else:
        token = draw(logits, uniform, settings)
    return token.where(logits.isfinite().all(-1), NOT_FINITE)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """(n,), in nats, of tokens (n,) that follow logits (n, V)."""
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def uniform_numbers(seed: int, place: int, count: int) -> Tensor:
    """(count,) in [0, 1) for the prompt at this place of a list: seed and place alone decide."""
    generator = torch.Generator("cpu")
    generator.manual_seed((seed + place * 0x9E3779B97F4A7C15) % 2**63)  # neighbours far apart
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")


def has_kernel(device: torch.device) -> bool:
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def draw(logits: Tensor, uniform: Tensor, settings: Settings) -> Tensor:
    """The formula of `next_token` for a temperature above 0, with a sort of all logits; tokens
    of one probability in the order of their ids."""
    below_top = logits - logits.amax(-1, keepdim=True)  # a tiny temperature must not overflow
    probability = torch.softmax(below_top / max(settings.temperature, SMALLEST), -1)
    probability, order = probability.sort(dim=-1, descending=True, stable=True)
    kept = probability.cumsum(-1) - probability < settings.top_p
    if settings.top_k:
        kept[:, settings.top_k :] = False
    if settings.min_p:
        kept &= probability >= settings.min_p * probability[:, :1]
    cumulated = probability.where(kept, 0).cumsum(-1)
    picked = (cumulated < uniform[:, None] * cumulated[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, picked)[:, 0]


def penalize(logits: Tensor, tokens: Tensor, lengths: Tensor, settings: Settings) -> Tensor:
    """Logits with the tokens already there made less likely: a logit above 0 is divided by the
    token's penalty (Keskar et al. 2019, arXiv 1909.05858, section 4.1), one below is multiplied by
    it, as transformers and KoboldAI do.

    Of row b the last `window` of tokens[b, :lengths[b]] count. With slope 0 all have the full
    penalty. Otherwise it rises along the window (KoboldAI's slope): for the token i places before
    the newest, x = 1 - 2 i / (window - 1) and y = slope x / (1 + |x| (slope - 1)) run from 1 to -1,
    and the penalty is 1 + (penalty - 1) (1 + y) / 2. Of a token that stands there
    twice the newest counts.
    """
    window = settings.repetition_penalty_range
    place = torch.arange(tokens.shape[1], device=tokens.device)
    before = (lengths[:, None] - 1 - place).float()  # the i of the formula, below 0 past the end
    share = ((before >= 0) & (before < window)).float()
    if settings.repetition_penalty_slope != 0:
        slope = max(settings.repetition_penalty_slope, SMALLEST)
        x = (1 - 2 * before / max(window - 1, 1)).clamp(-1, 1)
        y = slope * x / (1 - x.abs() + slope * x.abs())
        share = share * (1 + y) / 2
    strength = torch.zeros_like(logits).scatter_reduce(-1, tokens, share, "amax")
    factor = 1 + (settings.repetition_penalty - 1) * strength
    return torch.where(logits > 0, logits / factor, logits * factor)
