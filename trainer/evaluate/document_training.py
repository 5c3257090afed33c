"""Test-time training of low-rank adapters, document by document (parameter-golf #1530), and in
phases (#1610, #1626).

Each document is scored in chunks, as a text of its own: a row holds what of it lies before the
chunk's end, at most T tokens. When a chunk is scored, the document's adapters take one AdamW step
on its losses; the last chunk of a document teaches nobody. Documents of similar length go side by
side, longest first, each with factors of its own, so they do not learn of one another.

In phases, SGD on the weights themselves goes over all documents that are scored so far, and the
rest continue with what it made.

Batches of documents are dealt to a fixed number of lanes, and lanes to ranks. What passes from one
batch to the next (random numbers, warm first factors) stays in its lane, so the score does not
depend on the number of ranks, as it does where ranks take batches from a common counter.

Legend: S visits of a block, D documents side by side, T tokens of a row, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config import EvaluateConfig, ModelConfig
from trainer.evaluate.row_sgd import RowSgd, cosine, trained_parameters
from trainer.evaluate.scorer import EvalResult, LossModel, Scorer, as_asked
from trainer.evaluate.subject import Subject, gradients_of, random_rows
from trainer.evaluate.windows import Rows
from trainer.model.adapters import Adapters, adapter_widths, num_visits

Document = tuple[int, int]
"""[first, end) targets."""
LENGTH_STEP = 128
"""Where one graph serves all lengths, rows are filled up to a multiple: a block of attention."""
ADAM_EPS = 1e-10
"""As published; second moments of the adapters are that small."""


class DocumentLora:
    """The adapters of D documents and the AdamW that moves them."""

    def __init__(
        self, config: EvaluateConfig, model: ModelConfig, lane: int, device: torch.device
    ) -> None:
        self._warm = config.ttt_lora_warm_start
        self._scale = config.ttt_lora_alpha / config.ttt_lora_rank
        self._generator = torch.Generator(device).manual_seed(lane)
        self._factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name in config.lora_targets:
            num_in, num_out = adapter_widths(model, name)
            visits = () if name == "head" else (num_visits(model),)
            sides = (*visits, config.ttt_doc_batch)
            rank = config.ttt_lora_rank
            first = torch.empty(*sides, rank, num_in, device=device)
            second = torch.zeros(*sides, num_out, rank, device=device)
            self._factors[name] = (nn.Parameter(first), nn.Parameter(second))
            self._draw(name)
        self._optimizer = torch.optim.AdamW(
            [factor for pair in self._factors.values() for factor in pair],
            lr=config.ttt_lora_lr,
            betas=(config.ttt_lora_beta1, config.ttt_lora_beta2),
            eps=ADAM_EPS,
            weight_decay=config.ttt_lora_weight_decay,
            fused=device.type == "cuda",
        )

    def restart(self) -> None:
        """Make ready for other documents."""
        self._optimizer.state.clear()
        for name, (_, second) in self._factors.items():
            second.data.zero_()
            if not self._warm:
                self._draw(name)

    def adapters(self, num_rows: int, softcaps: Tensor | None) -> Adapters:
        """For a forward pass of the first `num_rows` documents."""
        stacked = {
            name: (first[..., :num_rows, :, :], second[..., :num_rows, :, :])
            for name, (first, second) in self._factors.items()
        }
        return Adapters(stacked, self._scale, softcaps)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a scalar."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimizer.step()

    def _draw(self, name: str) -> None:
        first = self._factors[name][0].data
        bound = 1 / math.sqrt(first.size(-1))
        first.uniform_(-bound, bound, generator=self._generator)


@dataclass
class DocumentPass:
    """One evaluation; the weights of the subject change where there are phases."""

    subject: Subject
    config: EvaluateConfig
    softcaps: nn.Parameter | None = None
    loras: dict[int, DocumentLora] = field(default_factory=dict)
    """Lane -> what passes between its batches."""

    @classmethod
    def of(cls, subject: Subject, config: EvaluateConfig) -> DocumentPass:
        """Ready to run, nothing seen yet."""
        if not config.ttt_asym_logit:
            return cls(subject, config)
        cap = subject.model.config.logit_softcap
        return cls(
            subject, config, nn.Parameter(torch.full((2,), cap, device=subject.group.device))
        )

    def run(self) -> EvalResult:
        """Score everything."""
        scorer = self.subject.scorer(self.config)
        queue = scorer.documents(self.subject.model.config.bos_id)
        queue.sort(key=lambda document: document[0] - document[1])
        bounds = phase_bounds(len(queue), self.config)
        done = 0
        for bound in bounds:
            with gradients_of(self.subject.model, ()):
                self._score(scorer, queue[done:bound])
            done = bound
            if done < len(queue):
                scorer.settle(queue[:done])
                self._learn(scorer, queue[:done])
        return scorer.result()

    def prime(self) -> None:
        """Compile every graph on random tokens, check the longest, change nothing."""
        model, device = self._model_config, self._device
        with gradients_of(self.subject.model, ()), self._mode():
            lora = self._lora(0)
            for num_rows, seq_len in primed_shapes(self.config):
                asked = as_asked(self._forward(lora, num_rows), self.config)
                drawn = random_rows(model.vocab_size, num_rows, seq_len, device)
                nats_BT = asked(*drawn, reduction="none")
                if nats_BT.requires_grad:
                    torch.autograd.backward(nats_BT.sum())
            num_rows = self.config.ttt_doc_batch
            self.subject.check(self._forward(lora, num_rows), self.config, num_rows)
        self.loras.clear()
        if self.config.ttt_phases:
            with gradients_of(self.subject.model, self._trained()):
                self._sgd().prime(model.vocab_size)

    @property
    def _device(self) -> torch.device:
        return self.subject.group.device

    @property
    def _model_config(self) -> ModelConfig:
        return self.subject.model.config

    def _mode(self) -> torch.inference_mode:
        """Gradients only where adapters need them: one graph scores and teaches."""
        return torch.inference_mode(self.config.ttt_lora_rank == 0)

    def _lora(self, lane: int) -> DocumentLora | None:
        if self.config.ttt_lora_rank == 0:
            return None
        if lane not in self.loras:
            made = DocumentLora(self.config, self._model_config, lane, self._device)
            self.loras[lane] = made
        return self.loras[lane]

    def _forward(self, lora: DocumentLora | None, num_rows: int) -> LossModel:
        """What scores; the softcaps learn in phases only."""
        softcaps = None if self.softcaps is None else self.softcaps.detach()
        if lora is None:
            forward = self._with_softcaps(softcaps)
        else:
            forward = partial(self.subject.forward, adapters=lora.adapters(num_rows, softcaps))
        is_compiled = self.subject.forward is not self.subject.model
        if self.config.ttt_doc_shapes == "dynamic" and is_compiled:
            return partial(_with_any_length, forward)
        return forward

    def _with_softcaps(self, softcaps: Tensor | None) -> LossModel:
        if softcaps is None:
            return self.subject.forward
        return partial(self.subject.forward, adapters=Adapters({}, softcaps=softcaps))

    def _score(self, scorer: Scorer, documents: list[Document]) -> None:
        """This rank's lanes, one after another."""
        group, config = self.subject.group, self.config
        batches = cut_batches(documents, config.ttt_doc_batch)
        with self._mode():
            for lane in range(group.rank, config.ttt_doc_lanes, group.size):
                for batch in deal(batches, lane, config.ttt_doc_lanes):
                    self._score_batch(scorer, batch, self._lora(lane))
                # Not kept beyond the lane: another has as many, and after a phase all begin anew.
                self.loras.pop(lane, None)

    def _score_batch(
        self, scorer: Scorer, documents: list[Document], lora: DocumentLora | None
    ) -> None:
        """Documents side by side, longest first, chunk after chunk."""
        size, shapes = self.config.ttt_doc_chunk_tokens, row_shapes(self.config)
        if lora is not None:
            lora.restart()
        for chunk in range(math.ceil((documents[0][1] - documents[0][0]) / size)):
            rows, num_rows, num_learning = chunk_rows(documents, chunk, size, shapes)
            nats_DT = scorer.score(self._forward(lora, num_rows), rows, num_rows)
            if lora is not None and num_learning:
                lora.step(nats_DT[:num_learning].sum() / size)

    def _trained(self) -> list[nn.Parameter]:
        return trained_parameters(self.subject.model, self.config)

    def _sgd(self) -> RowSgd:
        caps = [] if self.softcaps is None else [self.softcaps]
        subject = self.subject
        return RowSgd(
            partial(self._with_softcaps(self.softcaps), reduction="none"),
            [*self._trained(), *caps],
            self.config,
            subject.micro_batch_tokens,
            subject.group,
        )

    def _learn(self, scorer: Scorer, documents: list[Document]) -> None:
        """One pass of SGD over the text of documents that are scored."""
        texts = [scorer.text(first, end) for first, end in documents]
        text = torch.cat([*(tokens[:-1] for tokens in texts), texts[-1][-1:]])
        size = self.config.ttt_chunk_tokens
        count = math.ceil((len(text) - 1) / size)
        with gradients_of(self.subject.model, self._trained()):
            sgd = self._sgd()
            for chunk in range(count):
                lr = self.config.ttt_global_lr * cosine(chunk, count)
                sgd.train(text[chunk * size : (chunk + 1) * size + 1], lr, epochs=1)


def phase_bounds(num_documents: int, config: EvaluateConfig) -> list[int]:
    """Documents of the queue that are scored before each pass of SGD, and at the end."""
    parts = range(1, config.ttt_phases + 1)
    bounds = {config.ttt_prefix_docs * part // config.ttt_phases for part in parts}
    return [*sorted(bound for bound in bounds if 0 < bound < num_documents), num_documents]


def cut_batches(documents: list[Document], size: int) -> list[list[Document]]:
    """Neighbours in the queue go side by side."""
    return [documents[first : first + size] for first in range(0, len(documents), size)]


def deal(batches: list[list[Document]], lane: int, num_lanes: int) -> list[list[Document]]:
    """The batches of a lane: there and back over the lanes, so that each has as much to do."""
    turns = np.arange(len(batches)) % (2 * num_lanes)
    lanes = np.minimum(turns, 2 * num_lanes - 1 - turns)
    return [batch for batch, own in zip(batches, lanes, strict=True) if own == lane]


def row_shapes(config: EvaluateConfig) -> list[tuple[int, int]]:
    """(rows, T) of forward passes: all documents at every length, and an eighth of them at the
    longest, for few documents are very long and the others wait for them."""
    few = (max(1, config.ttt_doc_batch // 8), config.seq_len)
    lengths = _halves(config) if config.ttt_doc_shapes == "fixed" else _multiples(config)
    return sorted({few, *((config.ttt_doc_batch, length) for length in lengths)})


def primed_shapes(config: EvaluateConfig) -> list[tuple[int, int]]:
    """Those of `row_shapes` that are a graph of their own. Where one graph serves all lengths, its
    longest and shortest, from the middle: a first length that is special would be taken for one."""
    shapes = row_shapes(config)
    if config.ttt_doc_shapes == "fixed":
        return shapes
    own = [shape for shape in shapes if shape[0] == config.ttt_doc_batch]
    chosen = [own[len(own) // 2], own[0], own[-1], shapes[0]]
    return list(dict.fromkeys(chosen))


def _halves(config: EvaluateConfig) -> list[int]:
    """seq_len, its half and so on, while they hold a chunk."""
    lengths = [config.seq_len]
    while (
        len(lengths) < config.ttt_doc_lengths
        and lengths[-1] % 2 == 0
        and lengths[-1] // 2 >= config.ttt_doc_chunk_tokens
    ):
        lengths.append(lengths[-1] // 2)
    return lengths


def _multiples(config: EvaluateConfig) -> list[int]:
    """Multiples of LENGTH_STEP that hold a chunk, and seq_len."""
    first = math.ceil(config.ttt_doc_chunk_tokens / LENGTH_STEP) * LENGTH_STEP
    return [*range(first, config.seq_len, LENGTH_STEP), config.seq_len]


def _with_any_length(
    forward: LossModel, tokens_BT: Tensor, targets_BT: Tensor, **how: Any
) -> Tensor:
    """Has the compiler take the length of these rows for one of many. Copies, because where a view
    begins in its storage would be part of the graph as well."""
    tokens_BT, targets_BT = tokens_BT.clone(), targets_BT.clone()
    for tensor in (tokens_BT, targets_BT):
        torch._dynamo.mark_dynamic(tensor, 1)
    return forward(tokens_BT, targets_BT, **how)


def chunk_rows(
    documents: list[Document], chunk: int, size: int, shapes: list[tuple[int, int]]
) -> tuple[Rows, int, int]:
    """The rows of the documents that reach this chunk; rows of the forward pass; and how many of
    the documents, from the first, go on after it and may learn from it. Documents come longest
    first."""
    begins, limits = np.array(documents, dtype=np.int64).T
    firsts = begins + chunk * size
    reaching = int((firsts < limits).sum())
    learning = int((firsts + size < limits).sum())
    begins, firsts, limits = begins[:reaching], firsts[:reaching], limits[:reaching]
    ends = np.minimum(firsts + size, limits)
    starts = np.maximum(begins, ends - max(seq_len for _, seq_len in shapes))
    longest = int((ends - starts).max())
    fitting = [shape for shape in shapes if shape[0] >= reaching and shape[1] >= longest]
    num_rows, seq_len = min(fitting, key=lambda shape: shape[0] * shape[1])
    return Rows(starts, firsts, ends, seq_len), num_rows, learning
