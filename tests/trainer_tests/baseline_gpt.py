"""The model with every switch off, operation by operation, for a test of equal bits.

A record of what the model computed before it had switches: change it only to change the results of
golf_baseline on purpose.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention import Attend
from trainer.config import ModelConfig

EPS = 2.0**-23


def parameter_names(config: ModelConfig) -> list[str]:
    """In the model's order."""
    parts = ["attn_scale", "mlp_scale", "resid_mix", "attn.q_gain", "attn.q.weight"]
    parts += ["attn.k.weight", "attn.v.weight", "attn.out.weight", "mlp.up.weight"]
    parts += ["mlp.down.weight"]
    blocks = [f"blocks.{layer}.{part}" for layer in range(config.num_layers) for part in parts]
    head = [] if config.tie_embeddings else ["head.weight"]
    return ["skip_weights", "tok_emb.weight", *blocks, *head]


def baseline_loss(
    config: ModelConfig, w: dict[str, Tensor], attend: Attend, dtype: torch.dtype, rows: Tensor
) -> Tensor:
    """Mean cross-entropy of rows [B, T + 1]."""
    x = _rms(F.embedding(rows[:, :-1], w["tok_emb.weight"])).to(dtype)
    x0, waiting, half = x, list[Tensor](), config.num_layers // 2
    for layer in range(config.num_layers):
        if layer >= half and waiting:
            x = x + w["skip_weights"][layer - half].to(dtype) * waiting.pop()
        b = f"blocks.{layer}."
        keep, mix = w[b + "resid_mix"].to(dtype)
        x = keep * x + mix * x0
        x = x + w[b + "attn_scale"].to(dtype) * _attention(config, w, b + "attn.", attend, _rms(x))
        hidden = F.relu(F.linear(_rms(x), w[b + "mlp.up.weight"].to(dtype))).square()
        x = x + w[b + "mlp_scale"].to(dtype) * F.linear(hidden, w[b + "mlp.down.weight"].to(dtype))
        if layer < half:
            waiting.append(x)
    head = w["tok_emb.weight" if config.tie_embeddings else "head.weight"].to(dtype)
    raw = F.linear(_rms(x), head).float()
    logits = config.logit_softcap * torch.tanh(raw / config.logit_softcap)
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def _attention(
    config: ModelConfig, w: dict[str, Tensor], a: str, attend: Attend, x: Tensor
) -> Tensor:
    weight = torch.cat([w[f"{a}{name}.weight"] for name in "qkv"]).to(x.dtype)
    kv_width = config.num_kv_heads * config.head_dim
    q, k, v = (
        part.reshape(*part.shape[:2], -1, config.head_dim)
        for part in F.linear(x, weight).split([config.model_dim, kv_width, kv_width], -1)
    )
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angle = torch.outer(torch.arange(x.size(1), dtype=torch.float64), config.rope_base**-exponent)
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]

    def turned(heads: Tensor) -> Tensor:
        first, second = _rms(heads).chunk(2, -1)
        return torch.cat((first * cos + second * sin, second * cos - first * sin), -1)

    q = (turned(q) * w[a + "q_gain"][:, None]).to(x.dtype)
    out = attend(q, turned(k).to(x.dtype), v)
    return F.linear(out.flatten(2), w[a + "out.weight"].to(x.dtype))
