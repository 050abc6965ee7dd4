"""What should LLaMA compute? Written a second time, from the papers, to check the first.

The idea: float64 numpy with loops over heads, no cache, no batch and nothing taken from `llama/`,
so that a mistake has to be made twice, in two different forms, to stay hidden. LLaMA (2302.13971,
section 2.2) is the decoder of 1706.03762 with RMSNorm before each sub-layer, SwiGLU and rotary
embeddings; Llama 2 adds grouped-query attention, Llama 3.1 scaled rotary frequencies.
Limits: slow, and every weight is widened at each call: for dims in the hundreds.
"""

import numpy as np


def f64(x) -> np.ndarray:
    """An array or a tensor as float64; torch widens its own, since numpy can't read bfloat16."""
    return x.detach().cpu().double().numpy() if hasattr(x, "detach") else np.asarray(x, np.float64)


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """1910.07467, section 4, over the last axis; the eps under the root is params.json's."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * gain


def frequency(i: int, d: int, params: dict) -> float:
    """2104.09864, section 3.2.2: theta^(-2i/d) of pair i; with use_scaled_rope it depends on the
    wavelength what becomes of it, with the constants of Llama 3.1, or 3.2 by its two shapes."""
    f = params.get("rope_theta", 1e4) ** (-2 * i / d)
    if not params.get("use_scaled_rope"):
        return f
    factor = {(2048, 16): 32, (3072, 28): 32}.get((params["dim"], params["n_layers"]), 8)
    wavelength = 2 * np.pi / f
    if wavelength > 8192:
        return f / factor
    if wavelength < 2048:
        return f
    s = (8192 / wavelength - 1) / 3
    return (1 - s) * f / factor + s * f


def rotate(x: np.ndarray, params: dict) -> np.ndarray:
    """2104.09864, section 3.2.2: pair (x[2i], x[2i+1]) of row m turns by m times its frequency."""
    n_tokens, d = x.shape
    turned = np.empty_like(x)
    for i in range(d // 2):
        angle = np.arange(n_tokens) * frequency(i, d, params)
        a, b = x[:, 2 * i], x[:, 2 * i + 1]
        turned[:, 2 * i] = a * np.cos(angle) - b * np.sin(angle)
        turned[:, 2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
    return turned


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """1706.03762, section 3.2.1, for one head (T, d); row m sees rows 0 to m (section 3.2.3)."""
    out = np.empty_like(q)
    for m in range(len(q)):
        scores = k[: m + 1] @ q[m] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[m] = weights / weights.sum() @ v[: m + 1]
    return out


def attention(x: np.ndarray, wq, wk, wv, wo, params: dict) -> np.ndarray:
    """2305.13245, section 2.2: neighbouring query heads share a key and value head. x (T, dim)."""
    n_heads = params["n_heads"]
    n_kv_heads = params.get("n_kv_heads") or n_heads
    q = np.split(x @ wq.T, n_heads, axis=1)
    k = np.split(x @ wk.T, n_kv_heads, axis=1)
    v = np.split(x @ wv.T, n_kv_heads, axis=1)
    heads = []
    for h in range(n_heads):
        g = h // (n_heads // n_kv_heads)
        heads.append(attend(rotate(q[h], params), rotate(k[g], params), v[g]))
    return np.concatenate(heads, axis=1) @ wo.T


def feed_forward(x: np.ndarray, w1, w2, w3) -> np.ndarray:
    """2002.05202, section 2, FFN_SwiGLU; its W, V and W_2 are Meta's w1, w3 and w2. x (T, dim)."""
    gate = x @ w1.T
    return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T


def hidden(weights: dict, params: dict, tokens: list[int]) -> np.ndarray:
    """2302.13971, section 2.2: what the output matrix gets, the last norm included. (T, dim)"""
    assert min(tokens) >= 0, "a negative token would index the embeddings from their end"
    eps = params["norm_eps"]
    x = f64(weights["tok_embeddings.weight"])[list(tokens)]
    for n in range(params["n_layers"]):
        at = f"layers.{n}."
        gain = f64(weights[at + "attention_norm.weight"])
        qkvo = (f64(weights[f"{at}attention.w{k}.weight"]) for k in "qkvo")
        x = x + attention(rms_norm(x, gain, eps), *qkvo, params)
        gain = f64(weights[at + "ffn_norm.weight"])
        w123 = (f64(weights[f"{at}feed_forward.w{k}.weight"]) for k in "123")
        x = x + feed_forward(rms_norm(x, gain, eps), *w123)
    return rms_norm(x, f64(weights["norm.weight"]), eps)


def logits(weights: dict, params: dict, tokens: list[int]) -> np.ndarray:
    """2302.13971, section 2.2: row m scores what follows tokens[m]. (T, V)

    `weights` has Meta's names, unsplit, as arrays or tensors of any float type, a matrix (out, in);
    names that LLaMA doesn't use are ignored. `params` is params.json's dict.
    """
    return hidden(weights, params, tokens) @ f64(weights["output.weight"]).T
