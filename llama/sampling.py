"""Logits (B, V) -> next token (B,): repetition penalty, temperature, top-p, top-k, min-p.

Everything stays on the device of the logits and nothing waits for the host. The randomness comes in
as one uniform number a row, so a row's draw does not depend on its company.
"""

import torch
from torch import Tensor

from llama.settings import Settings

NOT_FINITE = -1  # the token of a row whose logits are not all finite
SMALLEST = 1e-30  # divisor: float32 takes 1e-46 for 0, and 0 / 0 is no number


def next_token(
    logits: Tensor, tokens: Tensor, lengths: Tensor, uniform: Tensor, settings: Settings
) -> Tensor:
    """The next token (B,) of sequences tokens[b, :lengths[b]], or NOT_FINITE."""
    if settings.repetition_penalty != 1:
        penalty, window = settings.repetition_penalty, settings.repetition_penalty_range
        slope = settings.repetition_penalty_slope
        logits = penalize(logits, tokens, lengths, penalty, window, slope)
    temperature, top_p, top_k = settings.temperature, settings.top_p, settings.top_k
    return sample(logits, temperature, top_p, uniform, top_k, settings.min_p)


def sample(
    logits: Tensor,
    temperature: float,
    top_p: float,
    uniform: Tensor,
    top_k: int = 0,
    min_p: float = 0.0,
) -> Tensor:
    """Temperature 0 takes the most likely token. Otherwise the draw is from softmax(logits /
    temperature), among the tokens that pass all of these:

    - top_p: the nucleus, the smallest set of most likely tokens whose probabilities add up to top_p
      or more (Holtzman et al. 2020, arXiv 1904.09751, section 3.1)
    - top_k, unless 0: the k most likely (Fan et al. 2018, arXiv 1805.04833, section 5.4)
    - min_p: p >= min_p max(p) (Nguyen et al. 2024, arXiv 2407.01082, section 3)

    uniform (B,) in [0, 1) picks the token by inverting the cumulated probabilities, most likely
    first.
    """
    finite = logits.isfinite().all(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        below_top = logits - logits.amax(-1, keepdim=True)  # a tiny temperature must not overflow
        probability = torch.softmax(below_top / max(temperature, SMALLEST), -1)
        probability, order = probability.sort(-1, descending=True)
        before = probability.cumsum(-1) - probability
        kept = before < top_p
        if top_k:
            kept[:, top_k:] = False
        if min_p:
            kept &= probability >= min_p * probability[:, :1]
        probability = probability.where(kept, 0)
        cumulated = probability.cumsum(-1)
        picked = (cumulated < uniform[:, None] * cumulated[:, -1:]).sum(-1, keepdim=True)
        token = order.gather(-1, picked)[:, 0]
    return token.where(finite, NOT_FINITE)


def penalize(
    logits: Tensor, tokens: Tensor, lengths: Tensor, penalty: float, window: int, slope: float
) -> Tensor:
    """Logits with the tokens already there made less likely: a logit above 0 is divided by the
    token's penalty (Keskar et al. 2019, arXiv 1909.05858, section 4.1), one below is multiplied by
    it, as transformers and KoboldAI do.

    Of row b the last `window` of tokens[b, :lengths[b]] count. With slope 0 all have the full
    penalty. Otherwise it rises along the window (KoboldAI's slope): for the token i places before
    the newest, x = 1 - 2 i / (window - 1) and y = slope x / (1 + |x| (slope - 1)) run from 1 to -1,
    and the penalty is 1 + (penalty - 1) (1 + y) / 2: all of it for the newest, none at the
    window's far end. A token that stands there twice has its newest one's.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    first = (lengths - window).clamp(min=0)[:, None]
    counts = (position >= first) & (position < lengths[:, None])
    share = counts.float()
    if slope != 0:
        before = (lengths[:, None] - 1 - position).float()
        x = (1 - 2 * before / max(window - 1, 1)).clamp(-1, 1)
        slope = max(slope, SMALLEST)
        y = slope * x / (1 - x.abs() + slope * x.abs())
        share = share * (1 + y) / 2
    strength = torch.zeros_like(logits).scatter_reduce(-1, tokens, share, "amax")
    factor = 1 + (penalty - 1) * strength
    return torch.where(logits > 0, logits / factor, logits * factor)
