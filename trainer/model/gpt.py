"""The language model: embedding, stack of blocks, softcapped head, cross-entropy.

With every switch off it is the challenge baseline's model (openai/parameter-golf, train_gpt.py)
with one deliberate difference: the embedding is an fp32 master like every other weight, where the
published script keeps it in bf16 and loses small Adam updates.

Legend: B rows, T tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Attend, Documents
from trainer.config import ModelConfig
from trainer.config.window_stages import score_scale
from trainer.kernels.cross_entropy import softcapped_cross_entropy
from trainer.kernels.precision import at_least_fp32
from trainer.loss import Objective, nats_of
from trainer.model.adapters import Adapters
from trainer.model.attention import Context
from trainer.model.block import Block
from trainer.model.embedding import BigramHash, ChannelSmear, TokenSmear, ValueTable
from trainer.model.gate import HeadGate
from trainer.model.lanes import LaneMerge
from trainer.model.linear import Linear
from trainer.model.mlp import MLP
from trainer.model.mtp import NextTokenBlock
from trainer.model.norm import rms_norm
from trainer.model.recurrence import build_repeats
from trainer.model.rotary import Rotary
from trainer.model.shared import SharedBlock, Visit
from trainer.model.values import ValueProjection

MAX_SEQ_LEN = 8192
"""Rows of the rotary tables; `GPT(..., max_seq_len=)` raises it."""


class GPT(nn.Module):
    """Parameters are fp32; activations run in `compute_dtype`, which the builder sets, as it does
    `objective`, what training minimises (None = the mean cross-entropy), and `fuses_loss`, whether
    that mean is one operator (trainer/kernels/cross_entropy.py) in training. `visits_now` is how
    often recurring blocks are visited; change it through `visiting`.

    Initial weights come from torch's global generator of the device that is current: seed it
    before. Traces as one graph (`torch.compile(model, fullgraph=True, dynamic=False)`).

    Args:
        max_seq_len: longest row that will be asked for.
        row_lengths: lengths whose rotary tables are made in advance where rope_ntk_len makes them
            differ; tables of other lengths are made in the graph.
    """

    def __init__(
        self,
        config: ModelConfig,
        attend: Attend,
        max_seq_len: int = MAX_SEQ_LEN,
        row_lengths: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.objective: Objective | None = None
        self.visits_now = config.most_visits
        stages = config.stages
        self.stage_now = max(0, len(stages) - 1)
        self._score_scales = [score_scale(stages[: place + 1]) for place in range(len(stages))]
        self.fuses_loss = False
        self.tok_emb = nn.Embedding(config.table_rows, config.model_dim)
        if config.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        if config.num_loops == 1:
            self._build_unet(config, attend)
        else:
            self._build_loops(config, attend)
        if not config.tie_embeddings:
            self.head = Linear(config.model_dim, config.table_rows, init="zeros")
        # Last, so that one seed gives the other weights the same start with and without them.
        self.bigram = BigramHash(config) if config.bigram_buckets else None
        self.token_smear = TokenSmear(config) if config.smear == "token" else None
        self.channel_smear = ChannelSmear(config) if config.smear == "channel" else None
        self.value_embed = ValueTable(config) if config.value_embed_dim else None
        if config.num_loops == 1:
            self._add_gates_and_repeats(config)
        self.mtp: NextTokenBlock | None = None
        if config.mtp_weight:
            self.mtp = NextTokenBlock(config, attend)
            if config.attn_gate != "off" and self.mtp.block.attn is not None:
                self.mtp.block.attn.gate = HeadGate(config)
            add_late_parts(self.mtp.block, config, config.num_layers)
        if config.head_init_std:
            nn.init.normal_(self.head.weight, std=config.head_init_std)
        self.rotary = Rotary(config, max_seq_len, row_lengths)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        reduction: Literal["mean", "none", "objective"] = "mean",
        adapters: Adapters | None = None,
    ) -> Tensor:
        """Cross-entropy of the targets in nats, fp32: the mean, or one value per token [B, T].

        Args:
            tokens_BT: int64 inputs, at most max_seq_len in a row.
            targets_BT: int64 tokens to predict, the inputs moved on by one; or with reduction
                "none" several for each place, [B, T, K], for which nats of that shape come back.
            reduction: "objective" is the scalar that training minimises; the other two never have
                an objective's weights on the tokens.
            adapters: what test-time training adds to this pass; None = the model as it is.
        """
        if reduction == "objective" and torch.is_grad_enabled():
            return self._training_loss(tokens_BT, targets_BT)
        logits_BTV = self.logits(tokens_BT, adapters)
        if reduction == "objective":
            return self._objective(logits_BTV, targets_BT)
        if targets_BT.dim() == 3:
            return nats_of(logits_BTV, targets_BT)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction=reduction)
        return loss if reduction == "mean" else loss.view_as(targets_BT)

    def logits(self, tokens_BT: Tensor, adapters: Adapters | None = None) -> Tensor:
        """Logits of the next token, squashed to +-softcap, [B, T, V], fp32."""
        hidden_BTC = self._normed(tokens_BT, adapters)
        if adapters is not None:
            cap = self.config.logit_softcap
            return adapters.logits(hidden_BTC, self._raw_logits(hidden_BTC), cap)
        return self._capped_logits(hidden_BTC)

    def _capped_logits(self, hidden_BTC: Tensor) -> Tensor:
        cap, raw_BTV = self.config.logit_softcap, self._raw_logits(hidden_BTC)
        return cap * torch.tanh(raw_BTV.to(at_least_fp32(raw_BTV)) / cap)

    def _normed(self, tokens_BT: Tensor, adapters: Adapters | None = None) -> Tensor:
        """What the head multiplies, [B, T, C]."""
        return rms_norm(self._hidden(tokens_BT, adapters))

    def _raw_logits(self, hidden_BTC: Tensor) -> Tensor:
        """Logits before the cap, [B, T, V], in compute_dtype."""
        weight = self.tok_emb.weight if self.config.tie_embeddings else self.head.weight
        raw_BTV = F.linear(hidden_BTC, weight.to(hidden_BTC.dtype))
        return raw_BTV[..., : self.config.vocab_size] if self.config.padded_vocab else raw_BTV

    def _training_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """What training minimises, with dropout, stochastic depth and the extra block's part."""
        context = self._context(tokens_BT, is_noisy=True)
        hidden_BTC = rms_norm(self._run_blocks(context.x0_BTC, context))
        if self.fuses_loss:
            loss = self._fused_loss(hidden_BTC, targets_BT)
        else:
            loss = self._objective(self._capped_logits(hidden_BTC), targets_BT)
        if self.mtp is None:
            return loss
        next_BTC = rms_norm(self.tok_emb(targets_BT)).to(self.compute_dtype)
        ahead_BTC = self.mtp(hidden_BTC, next_BTC, context)[:, :-1]
        ahead_BT = targets_BT[:, 1:]
        if self.fuses_loss:
            ahead_loss = self._fused_loss(ahead_BTC, ahead_BT)
        else:
            ahead_loss = F.cross_entropy(
                self._capped_logits(ahead_BTC).flatten(0, 1), ahead_BT.flatten()
            )
        return loss + self.config.mtp_weight * ahead_loss

    def _objective(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        if self.objective is None:
            return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        objective: Tensor = self.objective(logits_BTV, targets_BT)
        return objective

    def _fused_loss(self, hidden_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        raw_NV = self._raw_logits(hidden_BTC).flatten(0, 1)
        cap = self.config.logit_softcap
        return softcapped_cross_entropy(raw_NV, targets_BT.flatten(), cap).mean()

    def _hidden(self, tokens_BT: Tensor, adapters: Adapters | None = None) -> Tensor:
        """Residual stream before the final norm, [B, T, C], in compute_dtype. ConfigError when T is
        above max_seq_len."""
        context = self._context(tokens_BT, adapters)
        return self._run_blocks(context.x0_BTC, context)

    def _context(
        self, tokens_BT: Tensor, adapters: Adapters | None = None, is_noisy: bool = False
    ) -> Context:
        """What the blocks read; its x0_BTC is where the stream begins."""
        cos_TF, sin_TF = self.rotary(tokens_BT.size(1), self.stage_now)
        x_BTC = self._embed(tokens_BT)
        value_embed_BTK = (
            None if self.value_embed is None else self.value_embed(tokens_BT, self.compute_dtype)
        )
        visits = () if adapters is None else adapters.by_visit()
        context = Context(
            x_BTC, cos_TF, sin_TF, value_embed_BTK, is_noisy=is_noisy, all_adapters=visits
        )
        if self._score_scales:
            scale = self._score_scales[self.stage_now]
            context = context._replace(stage=self.stage_now, score_scale=scale)
        if self.config.positions_per_token > 1:
            cos_SF, sin_SF = self.rotary.of_pseudo_tokens(tokens_BT.size(1))
            context = context._replace(cos_SF=cos_SF, sin_SF=sin_SF)
        if self.config.document_attention:
            documents = Documents(tokens_BT, self.config.bos_id, self.config.max_doc_len)
            context = context._replace(documents=documents)
        return context

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        """The normalised embedding with what joins it, [B, T, C]."""
        x_BTC: Tensor = self.tok_emb(tokens_BT)
        if self.bigram is not None:
            x_BTC = x_BTC + self.bigram(tokens_BT, self.compute_dtype)
        if self.token_smear is not None:
            x_BTC = self.token_smear(x_BTC, tokens_BT)
        # Cast after the lookup, not before: the backward pass then adds up rows in fp32.
        x_BTC = rms_norm(x_BTC).to(self.compute_dtype)
        if self.channel_smear is not None:
            x_BTC = self.channel_smear(x_BTC, tokens_BT)
        return x_BTC

    def _build_unet(self, config: ModelConfig, attend: Attend) -> None:
        self.blocks = nn.ModuleList(Block(config, attend, i) for i in range(config.num_layers))
        skip_width = config.model_dim if config.skip_kind == "channel" else 1
        shape = (config.num_skips, skip_width)
        if config.num_skips:
            self.skip_weights = nn.Parameter(torch.ones(shape))
            if config.gated_skips:
                self.skip_gates = nn.Parameter(torch.zeros(shape))
        # Skips that only recurrence has are tensors of their own: unused, they have no gradient.
        rows = range(config.num_recur_skips)
        if rows:
            ones, zeros = torch.ones(skip_width), torch.zeros(skip_width)
            self.recur_skip_weights = nn.ParameterList(ones.clone() for _ in rows)
            if config.gated_skips:
                self.recur_skip_gates = nn.ParameterList(zeros.clone() for _ in rows)
        if config.backout_layer >= 0:
            self.backout = nn.Parameter(torch.full((1,), config.backout_init))
        if config.parallel == "lanes":
            self.lane_merge = LaneMerge(config.parallel_merge)
        visits = range(1, config.recur_visits + 1)
        self._orders = {number: config.visit_order(number) for number in visits}
        self._first_in_lanes = (
            config.parallel_start if config.parallel == "lanes" else config.num_layers
        )
        self._run_blocks = self._unet if config.num_passes == 1 else self._passes
        self._join = self._interpolate if config.gated_skips else self._add

    def _add_gates_and_repeats(self, config: ModelConfig) -> None:
        for layer in range(config.num_layers):
            block = self._block(layer)
            block.repeats = build_repeats(config, layer)
            add_late_parts(block, config, layer)
            if config.attn_gate != "off" and block.attn is not None:
                block.attn.gate = HeadGate(config)

    def _block(self, layer: int) -> Block:
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block

    @contextmanager
    def visiting(self, visits: int) -> Iterator[None]:
        """Inside, recurring blocks are visited so often, from 1 to recur_visits; outside, always
        recur_visits times. A compiled model has a graph for each number that it has seen."""
        full, self.visits_now = self.visits_now, visits
        try:
            yield
        finally:
            self.visits_now = full

    @contextmanager
    def in_window_stage(self, stage: int) -> Iterator[None]:
        """Inside, windows and positions are those of a stage of model.window_stages; outside,
        always of the last. A compiled model has a graph for each that it has seen."""
        last, self.stage_now = self.stage_now, stage
        try:
            yield
        finally:
            self.stage_now = last

    def _passes(self, x_BTC: Tensor, context: Context) -> Tensor:
        """The whole network several times over, x <- rms(net(x; x0)) (slowrun, its tiny track)."""
        for number in range(self.visits_now):
            if number and self.config.passes_gradient == "last":
                x_BTC = x_BTC.detach()
            is_cut = self.config.passes_gradient == "last" and number < self.visits_now - 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_cut):
                x_BTC = rms_norm(self._unet(x_BTC, context))
        return x_BTC

    def _unet(self, x_BTC: Tensor, context: Context) -> Tensor:
        """The first half of the visits feeds the second half in reverse order."""
        order = self._orders[self.visits_now if self.config.num_passes == 1 else 1]
        by_layer = self.config.recur_skips == "layers"
        num_encoder = (self.config.num_layers if by_layer else len(order)) // 2
        num_skips = self.config.num_skips + self.config.num_recur_skips
        waiting: list[Tensor] = []
        left: dict[int, Tensor] = {}  # the stream after the last visit of each block
        cached_BTC = x_BTC
        second_BTC: Tensor | None = None
        for place, (layer, visit) in enumerate(order):
            block, here = self._block(layer), context.at_visit(place)
            step = (layer if by_layer else place) - num_encoder
            if by_layer and 0 <= step < num_skips:
                x_BTC = self._join(x_BTC, waiting[num_encoder - 1 - step], step)
            elif 0 <= step < num_skips and waiting:
                x_BTC = self._join(x_BTC, waiting.pop(), step)
            if self.config.parallel == "lanes" and layer >= self._first_in_lanes:
                second_BTC = x_BTC if second_BTC is None else second_BTC
                x_BTC, second_BTC, value_BTGD = block.in_lanes(x_BTC, second_BTC, here)
            elif self.config.most_visits > 1 and visit:
                repeat = block.repeat(visit)
                y_BTC, value_BTGD = block(x_BTC, here, repeat)
                x_BTC = repeat.blend(x_BTC, y_BTC, left[layer])
            else:
                x_BTC, value_BTGD = block(x_BTC, here)
            if place == 0:
                context = context._replace(first_value_BTGD=value_BTGD)
            left[layer] = x_BTC
            if step < 0:
                waiting.append(x_BTC)
            if layer == self.config.backout_layer:
                cached_BTC = x_BTC
        if second_BTC is not None:
            x_BTC = self.lane_merge(x_BTC, second_BTC)
        if self.config.backout_layer < 0:
            return x_BTC
        return x_BTC - self.backout.to(x_BTC.dtype) * cached_BTC

    def _add(self, x_BTC: Tensor, skip_BTC: Tensor, index: int) -> Tensor:
        return x_BTC + self._skip_row("weights", index).to(x_BTC.dtype) * skip_BTC

    def _interpolate(self, x_BTC: Tensor, skip_BTC: Tensor, index: int) -> Tensor:
        """g x + (1 - g) w s, g = sigmoid(gate), from 1/2 (parameter-golf #1089). The README of
        #1212 describes x + g s, but its code does this."""
        gate_C = torch.sigmoid(self._skip_row("gates", index)).to(x_BTC.dtype)
        weight_C = self._skip_row("weights", index).to(x_BTC.dtype)
        return gate_C * x_BTC + (1 - gate_C) * (weight_C * skip_BTC)

    def _skip_row(self, kind: Literal["weights", "gates"], index: int) -> Tensor:
        """The factor or the gate's score of a skip, [C]."""
        num_plain = self.config.num_skips
        if index < num_plain:
            row_C: Tensor = getattr(self, f"skip_{kind}")[index]
        else:
            row_C = getattr(self, f"recur_skip_{kind}")[index - num_plain]
        return row_C

    def _build_loops(self, config: ModelConfig, attend: Attend) -> None:
        self.blocks = nn.ModuleList(
            SharedBlock(config, attend, i) for i in range(config.num_layers)
        )
        num_visits = config.num_loops * config.num_layers
        self.visits = nn.ModuleList(Visit(config) for _ in range(num_visits))
        self._run_blocks = self._loops

    def _loops(self, x_BTC: Tensor, context: Context) -> Tensor:
        """The whole stack of blocks, num_loops times."""
        for index, visit in enumerate(self.visits):
            x_BTC = self.blocks[index % len(self.blocks)](visit, x_BTC, context)
        return x_BTC


def add_late_parts(block: Block, config: ModelConfig, layer: int) -> None:
    """What a block draws when all else has its initial weights, or starts otherwise."""
    attn = block.attn
    mlps = [module for module in block.modules() if isinstance(module, MLP)]
    if attn is not None and config.projects_values(layer):
        attn.value_proj = ValueProjection(config)
    for mlp in mlps if config.mlp_kind == "swiglu" else ():
        mlp.swish = Linear(config.model_dim, config.mlp_dim, init=config.matrix_init)
    if config.out_init == "normal":
        writing = [mlp.down for mlp in mlps] + ([attn.out] if attn is not None else [])
        for matrix in writing:
            nn.init.normal_(matrix.weight, std=config.model_dim**-0.5)
