"""Settings of the score."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Fraction, PositiveFloat, PositiveInt, Settings, raise_together

LORA_TARGETS = ("q", "k", "v", "out", "mlp", "head")
"""Where adapters of documents may stand: on the matrices q, k, v and the head, and beside the
attention and the MLP of a block, reading the same input."""
NonNegativeFloat = Annotated[float, Field(ge=0)]


class EvaluateConfig(Settings):
    """How bits per byte are measured at the end."""

    seq_len: PositiveInt = 1024
    """Tokens per evaluation row; the number of scored tokens depends on it."""
    batch_tokens: PositiveInt = 524_288
    """Tokens per forward pass of one worker."""
    prequant: bool = True
    """Also score the weights before quantisation; a diagnostic outside every budget."""
    stride: Annotated[int, Field(ge=0)] = 0
    """Step of sliding windows of seq_len tokens: every window but the first scores only its last
    `stride` targets, so that each has at least seq_len - stride tokens before it. Time grows by
    seq_len / stride. 0 = off: rows side by side, as stride = seq_len."""
    stages: bool = False
    """Also score the artifact in plain rows when the score is made otherwise; a diagnostic outside
    every budget."""
    ensemble: Literal["off", "equal", "weighted", "both"] = "off"
    """Also score the last checkpoints of the run by the mean of their probabilities, all alike or
    in proportion to 1 .. K, newest heaviest; a diagnostic outside every budget, since the artifact
    holds one set of weights."""
    ensemble_size: PositiveInt = 3
    """Checkpoints in the ensemble, K: the last ones (slowrun: 3 in its hour, 11 in two)."""
    ensemble_every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints of the ensemble; 0 = by ensemble_at. The weights at the end of
    training are always the last one."""
    ensemble_at: Literal["epochs", "cycles"] = "epochs"
    """Ends of what a checkpoint of the ensemble is taken at: of every pass over the text, or of
    every one of schedule.cycles, which a run by the clock has whatever the size of its text."""
    naive_ttt_epochs: Annotated[int, Field(ge=0)] = 0
    """Passes of SGD over the validation text before it is scored, as #675 did; 0 = off. Illegal on
    the golf tracks."""
    naive_ttt_lr: PositiveFloat = 0.002
    """Learning rate of that SGD."""
    naive_ttt_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of that SGD."""
    ngram_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a hashed n-gram cache in the target's probability (#659 0.15, #675 0.3); 0 = off.
    Illegal on the golf tracks."""
    ngram_order: Annotated[int, Field(ge=2)] = 5
    """Tokens of an n-gram: ngram_order - 1 of context and the target."""
    ngram_min_count: PositiveInt = 3
    """Times that a context must have been seen for the cache to speak."""
    ngram_min_confidence: Fraction = 0.5
    """Share of the target among the context's continuations for the cache to speak."""
    ngram_buckets: PositiveInt = 4_194_304
    """Counters of the cache; n-grams that fall into one are taken for one."""
    ngram_never_lower: bool = False
    """Take the cache only where it helps, max(p, p'), as #675 did."""
    ttt: Literal["off", "chunks", "documents"] = "off"
    """Test-time training on what is scored already: "chunks" of the text, all weights; or low-rank
    adapters for each of the "documents", which are then independent texts."""
    ttt_chunk_tokens: PositiveInt = 32_768
    """Targets that are scored before SGD goes over their text."""
    ttt_epochs: PositiveInt = 3
    """Passes of SGD over each chunk."""
    ttt_batch_rows: PositiveInt = 32
    """Rows of evaluate.seq_len tokens in one step of SGD, over all workers."""
    ttt_lr: NonNegativeFloat = 0.005
    """Learning rate of SGD at the first chunk; a cosine takes it to 0 at the last."""
    ttt_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; lasts over chunks."""
    ttt_clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the gradient of SGD; 0 = off."""
    ttt_freeze_blocks: Annotated[int, Field(ge=0)] = 0
    """First blocks that SGD leaves alone (#549: 2)."""
    ttt_part: Literal["all", "mlp"] = "all"
    """What SGD changes: everything, or only the MLPs of the last blocks (E2E-TTT)."""
    ttt_last_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the blocks, from the last, whose MLPs ttt_part = "mlp" changes."""
    ttt_doc_chunk_tokens: PositiveInt = 48
    """Targets of a document that are scored before its adapters take a step."""
    ttt_doc_batch: PositiveInt = 64
    """Documents that one worker adapts to side by side."""
    ttt_doc_lanes: PositiveInt = 8
    """Independent queues of batches of documents, spread over the workers; at least as many as
    workers, or some idle. The score depends on it, on the number of workers it does not."""
    ttt_doc_lengths: PositiveInt = 6
    """Most lengths to which rows are filled up: seq_len, its half and so on while they hold a
    chunk. Each is compiled; fewer waste more on short documents. The score stays the same."""
    ttt_doc_shapes: Literal["fixed", "dynamic"] = "fixed"
    """How those lengths are compiled: a graph for each, or one for rows of any length, which are
    then filled up to a multiple of 128 tokens, and ttt_doc_lengths has no say. The score stays the
    same, to rounding."""
    ttt_lora_rank: Annotated[int, Field(ge=0)] = 96
    """Rank of the adapters; 0 = none, documents are scored one by one as they are."""
    ttt_lora_alpha: PositiveFloat = 144.0
    """Adapters are scaled by this over their rank."""
    ttt_lora_targets: str = "q,k,v,out,mlp,head"
    """Where adapters stand: a list of q, k, v, out, mlp, head (#2135: no k; #2014: no q, v)."""
    ttt_lora_lr: NonNegativeFloat = 1e-4
    """Learning rate of the adapters' AdamW."""
    ttt_lora_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of its first moment."""
    ttt_lora_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of its second moment (#1855: 0.99)."""
    ttt_lora_weight_decay: NonNegativeFloat = 0.5
    """Its decoupled weight decay (0.5 to 2.0 were published)."""
    ttt_lora_warm_start: bool = False
    """The next batch of documents begins with the first factors that the last one ended with;
    second factors always begin at zero."""
    ttt_phases: Annotated[int, Field(ge=0)] = 0
    """Times that SGD goes over all documents scored so far, after equal parts of ttt_prefix_docs;
    0 = off."""
    ttt_prefix_docs: PositiveInt = 2000
    """Documents, longest first, after which the last phase comes."""
    ttt_global_lr: NonNegativeFloat = 0.001
    """Learning rate of SGD in phases, in the place of ttt_lr; momentum, clip, chunks and rows are
    those above, in one pass."""
    ttt_asym_logit: bool = False
    """SGD in phases also learns a softcap for positive logits and one for negative ones."""

    tilt_beta: Annotated[float, Field(ge=0)] = 0.0
    """Nats by which the logit of an n-gram's hint is raised, before the distribution is normalised
    again (#2135 2.625, #1514 2.0); 0 = off."""
    tilt_order: Annotated[int, Field(ge=2)] = 16
    """Tokens of that n-gram: tilt_order - 1 of context, and the hint."""
    tilt_threshold: Fraction = 0.8
    """Least share of the hint among what followed the context before."""

    @model_validator(mode="after")
    def _every_target_is_scored(self) -> Self:
        faults = []
        if self.stride > self.seq_len:
            faults.append(
                f"evaluate.stride = {self.stride} is above evaluate.seq_len = {self.seq_len}: "
                "targets between windows would not be scored; lower it, or 0 for plain rows"
            )
        if self.ttt != "off":
            faults += self._faults_of_chunks() + self._faults_of_documents()
        if self.ttt != "off" and (self.naive_ttt_epochs or self.ngram_weight):
            faults.append(
                f'evaluate.ttt = "{self.ttt}" is not defined with evaluate.naive_ttt_epochs or '
                "evaluate.ngram_weight; set both to 0"
            )
        if self.tilt_beta > 0 and self.ngram_weight > 0:
            faults.append(
                f"evaluate.tilt_beta = {self.tilt_beta:g} and evaluate.ngram_weight = "
                f"{self.ngram_weight:g} are two ways to use n-grams; set one of them to 0"
            )
        return raise_together(self, faults)

    def _faults_of_chunks(self) -> list[str]:
        faults = []
        uses_sgd = self.ttt == "chunks" or self.ttt_phases > 0
        if uses_sgd and self.ttt_chunk_tokens < self.seq_len:
            faults.append(
                f"evaluate.ttt_chunk_tokens = {self.ttt_chunk_tokens} holds no whole row of "
                f"evaluate.seq_len = {self.seq_len} to train on; raise it"
            )
        if self.ttt == "chunks" and (self.ttt_phases or self.ttt_asym_logit):
            faults.append(
                f"evaluate.ttt_phases = {self.ttt_phases} and evaluate.ttt_asym_logit = "
                f'{self.ttt_asym_logit} belong to evaluate.ttt = "documents"; set 0 and false'
            )
        return faults

    def _faults_of_documents(self) -> list[str]:
        if self.ttt != "documents":
            return []
        faults = []
        if self.stride:
            faults.append(
                f"evaluate.stride = {self.stride} has no meaning where documents are scored in "
                "chunks; set 0, and evaluate.ttt_doc_chunk_tokens instead"
            )
        if self.ttt_doc_chunk_tokens > self.seq_len:
            faults.append(
                f"evaluate.ttt_doc_chunk_tokens = {self.ttt_doc_chunk_tokens} is above "
                f"evaluate.seq_len = {self.seq_len}, the longest row; lower it"
            )
        if self.ttt_asym_logit and not self.ttt_phases:
            faults.append(
                "evaluate.ttt_asym_logit = true learns only where evaluate.ttt_phases > 0; set it"
            )
        unknown = [name for name in self.lora_targets if name not in LORA_TARGETS]
        if unknown or len(set(self.lora_targets)) < len(self.lora_targets):
            faults.append(
                f"evaluate.ttt_lora_targets = {self.ttt_lora_targets!r} is no list of different "
                f"names out of {', '.join(LORA_TARGETS)}; correct it"
            )
        return faults

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The names in ttt_lora_targets."""
        return tuple(name.strip() for name in self.ttt_lora_targets.split(","))

    @property
    def method(self) -> str:
        """What the score is made with, in the words of TrainResult.stages."""
        parts = {
            "sliding": self.stride > 0,
            "ttt": self.ttt == "chunks",
            "lora_ttt": self.ttt == "documents" and self.ttt_lora_rank > 0,
            "documents": self.ttt == "documents" and self.ttt_lora_rank == 0,
            "phases": self.ttt == "documents" and self.ttt_phases > 0,
            "naive_ttt": self.naive_ttt_epochs > 0,
            "ngram": self.ngram_weight > 0,
            "tilt": self.tilt_beta > 0,
        }
        return "+".join(name for name, is_on in parts.items() if is_on) or "quantized"

    def plain(self) -> EvaluateConfig:
        """The same rows without anything that adds to a plain forward pass: for diagnostics."""
        off = {"stride": 0, "naive_ttt_epochs": 0, "ngram_weight": 0.0}
        return self.model_copy(update={**off, "ttt": "off", "tilt_beta": 0.0})

    @property
    def is_plain(self) -> bool:
        """Whether the score is made with a plain forward pass."""
        return self.method == "quantized"
