"""The model written a second time, straight from its equations, for tests to compare with.

One row at a time, one head at a time, softmax spelled out; weights come by name from a dictionary.
Nothing of trainer.model is used.
"""

import torch
from torch import Tensor

from tests.trainer_tests.plain_attention import plain_attention
from trainer.config import ModelConfig

Weights = dict[str, Tensor]


def plain_logits(config: ModelConfig, w: Weights, tokens: Tensor) -> Tensor:
    """Softcapped logits of every row, [B, T, V], in the weights' dtype."""
    return torch.stack([_row_logits(config, w, row) for row in tokens])


def plain_loss(config: ModelConfig, w: Weights, tokens: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, [B, T]."""
    logits = plain_logits(config, w, tokens)
    log_total = torch.log(torch.exp(logits).sum(-1))
    return log_total - logits.gather(-1, targets[..., None])[..., 0]


def _rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 2.0**-23)


def _row_logits(config: ModelConfig, w: Weights, tokens: Tensor) -> Tensor:
    x = _rms(torch.stack([w["tok_emb.weight"][int(token)] for token in tokens]))
    x0 = x
    half = config.num_layers // 2
    stack = []
    for layer in range(half):
        x = _block(config, w, layer, x, x0)
        stack.append(x)
    for step, layer in enumerate(range(half, config.num_layers)):
        if step < half:
            x = x + w["skip_weights"][step] * stack[half - 1 - step]
        x = _block(config, w, layer, x, x0)
    head = w["tok_emb.weight"] if config.tie_embeddings else w["head.weight"]
    return config.logit_softcap * torch.tanh(_rms(x) @ head.T / config.logit_softcap)


def _block(config: ModelConfig, w: Weights, layer: int, x: Tensor, x0: Tensor) -> Tensor:
    b = f"blocks.{layer}."
    x = w[b + "resid_mix"][0] * x + w[b + "resid_mix"][1] * x0
    x = x + w[b + "attn_scale"] * _attention(config, w, b + "attn.", _rms(x))
    hidden = torch.clamp(_rms(x) @ w[b + "mlp.up.weight"].T, min=0) ** 2
    return x + w[b + "mlp_scale"] * (hidden @ w[b + "mlp.down.weight"].T)


def _attention(config: ModelConfig, w: Weights, a: str, h: Tensor) -> Tensor:
    width = config.head_dim

    def heads(name: str, number: int) -> list[Tensor]:
        values = h @ w[f"{a}{name}.weight"].T
        return [values[:, i * width : (i + 1) * width] for i in range(number)]

    gain = w[a + "q_gain"]
    q = [
        gain[i] * _rotary(config, _rms(head)) for i, head in enumerate(heads("q", config.num_heads))
    ]
    k = [_rotary(config, _rms(head)) for head in heads("k", config.num_kv_heads)]
    v = heads("v", config.num_kv_heads)
    q_THD, k_TGD, v_TGD = (torch.stack(part, 1) for part in (q, k, v))
    out = plain_attention(q_THD[None], k_TGD[None], v_TGD[None])[0]
    return out.reshape(len(h), -1) @ w[a + "out.weight"].T


def _rotary(config: ModelConfig, x: Tensor) -> Tensor:
    """Pair (i, i + D/2) as a complex number, turned by position * base^(-2i/D)."""
    half = x.size(-1) // 2
    pairs = torch.complex(x[:, :half], x[:, half:])
    frequency = config.rope_base ** (-2 * torch.arange(half, dtype=x.dtype) / x.size(-1))
    angle = torch.arange(len(x), dtype=x.dtype)[:, None] * frequency
    turned = pairs * torch.exp(-1j * angle)
    return torch.cat((turned.real, turned.imag), -1)
