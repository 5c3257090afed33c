"""The language model: embedding, U-Net of blocks, softcapped head, cross-entropy.

It is the challenge baseline's model (openai/parameter-golf, train_gpt.py) with one deliberate
difference: the embedding is an fp32 master like every other weight, where the published script
keeps it in bf16 and loses small Adam updates.

Legend: B rows, T tokens, C model width, V vocabulary, F half of the head width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Attend
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.loss import Objective
from trainer.model.block import Block
from trainer.model.linear import Linear
from trainer.model.norm import rms_norm
from trainer.model.rotary import rotary_tables

MAX_SEQ_LEN = 8192
"""Rows of the rotary tables; `GPT(..., max_seq_len=)` raises it."""


class GPT(nn.Module):
    """Parameters are fp32; activations run in `compute_dtype`, which the builder sets, as it does
    `objective`, what training minimises (None = the mean cross-entropy).

    Initial weights come from torch's global generator of the device that is current: seed it
    before. Traces as one graph (`torch.compile(model, fullgraph=True, dynamic=False)`); the first
    half of the blocks feeds the second half in reverse order through `skip_weights`.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: ModelConfig, attend: Attend, max_seq_len: int = MAX_SEQ_LEN) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.objective: Objective | None = None
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        if config.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.num_layers))
        self.num_skips = config.num_layers // 2
        if self.num_skips:
            self.skip_weights = nn.Parameter(torch.ones(self.num_skips, config.model_dim))
        if not config.tie_embeddings:
            self.head = Linear(config.model_dim, config.vocab_size, zero_init=True)
        cos_TF, sin_TF = rotary_tables(max_seq_len, config.head_dim, config.rope_base)
        self.register_buffer("rotary_cos", cos_TF, persistent=False)
        self.register_buffer("rotary_sin", sin_TF, persistent=False)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        reduction: Literal["mean", "none", "objective"] = "mean",
    ) -> Tensor:
        """Cross-entropy of the targets in nats, fp32: the mean, or one value per token [B, T].

        Args:
            tokens_BT: int64 inputs, at most max_seq_len in a row.
            targets_BT: int64 tokens to predict, the inputs moved on by one.
            reduction: "objective" is the scalar that training minimises; the other two never have
                an objective's weights on the tokens.
        """
        logits_BTV = self.logits(tokens_BT)
        if reduction == "objective":
            if self.objective is not None:
                objective: Tensor = self.objective(logits_BTV, targets_BT)
                return objective
            reduction = "mean"
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction=reduction)
        return loss if reduction == "mean" else loss.view_as(targets_BT)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the next token, squashed to +-softcap, [B, T, V], fp32."""
        hidden_BTC = rms_norm(self._hidden(tokens_BT))
        weight = self.tok_emb.weight if self.config.tie_embeddings else self.head.weight
        raw_BTV = F.linear(hidden_BTC, weight.to(hidden_BTC.dtype))
        cap = self.config.logit_softcap
        return cap * torch.tanh(_at_least_fp32(raw_BTV) / cap)

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        """Residual stream after the last block, [B, T, C], in compute_dtype. ConfigError when T is
        above max_seq_len."""
        num_tokens = tokens_BT.size(1)
        if num_tokens > self.rotary_cos.size(0):
            raise ConfigError(
                f"rows of {num_tokens} tokens, but the model was built for at most "
                f"{self.rotary_cos.size(0)}; lower data.seq_len or evaluate.seq_len, or build "
                "GPT(..., max_seq_len=)"
            )
        cos_TF, sin_TF = self.rotary_cos[:num_tokens], self.rotary_sin[:num_tokens]
        # Cast after the lookup, not before: the backward pass then adds up rows in fp32.
        x_BTC = rms_norm(self.tok_emb(tokens_BT)).to(self.compute_dtype)
        x0_BTC = x_BTC
        waiting: list[Tensor] = []
        first_decoder = self.num_skips
        for index, block in enumerate(self.blocks):
            if index >= first_decoder and waiting:
                weight_C = self.skip_weights[index - first_decoder].to(x_BTC.dtype)
                x_BTC = x_BTC + weight_C * waiting.pop()
            x_BTC = block(x_BTC, x0_BTC, cos_TF, sin_TF)
            if index < first_decoder:
                waiting.append(x_BTC)
        return x_BTC


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
