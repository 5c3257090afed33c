"""The parts of adapters of documents by themselves: dealing, rows, formulas. CPU."""

from __future__ import annotations

import itertools

import torch

from tests.trainer_tests.adaptive import small_gpt
from tests.trainer_tests.test_document_training import Reference, settings
from trainer.evaluate.document_training import (
    DocumentLora,
    chunk_rows,
    cut_batches,
    deal,
    phase_bounds,
    row_shapes,
)
from trainer.model.adapters import Adapters


def test_batches_are_dealt_out_once_and_evenly() -> None:
    documents = [(0, length) for length in range(100, 0, -1)]
    batches = cut_batches(documents, 3)
    dealt = [deal(batches, lane, 4) for lane in range(4)]
    assert sorted(itertools.chain(*dealt)) == sorted(batches)
    work = [sum(batch[0][1] for batch in lane) for lane in dealt]
    assert max(work) - min(work) <= 2 * 3 * 4
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_rows_hold_a_document_up_to_the_chunk_and_no_more() -> None:
    config = settings(seq_len=48, ttt_doc_chunk_tokens=10, ttt_doc_batch=16)
    shapes = row_shapes(config)
    assert shapes == [(2, 48), (16, 12), (16, 24), (16, 48)]
    assert row_shapes(config.model_copy(update={"ttt_doc_lengths": 2})) == [
        (2, 48),
        (16, 24),
        (16, 48),
    ]
    three = [(100, 160), (7, 39), (50, 75)]
    rows, num_rows, learning = chunk_rows(three, 2, 10, shapes)
    assert (list(rows.starts), list(rows.firsts)) == ([100, 7, 50], [120, 27, 70])
    assert (list(rows.ends), rows.seq_len, num_rows, learning) == ([130, 37, 75], 48, 16, 2)
    rows, num_rows, learning = chunk_rows(three, 1, 10, shapes)
    assert (list(rows.starts), rows.seq_len, num_rows, learning) == ([100, 7, 50], 24, 16, 3)
    rows, num_rows, learning = chunk_rows(three, 5, 10, shapes)
    assert (list(rows.starts), list(rows.ends)) == ([112], [160])
    assert (rows.seq_len, num_rows, learning) == (48, 2, 0)


def test_documents_between_passes_of_sgd() -> None:
    assert phase_bounds(10, settings()) == [10]
    assert phase_bounds(100, settings(ttt_phases=3, ttt_prefix_docs=50)) == [16, 33, 50, 100]
    assert phase_bounds(40, settings(ttt_phases=3, ttt_prefix_docs=50)) == [16, 33, 40]


def test_adapters_and_softcaps_by_their_formulas_forward_and_backward() -> None:
    """Each row by itself in the reference; a batch of rows with factors of their own here."""
    torch.manual_seed(0)
    config = settings()
    reference = Reference(config)
    reference.caps = torch.tensor([7.0, 19.0], dtype=torch.float64, requires_grad=True)
    lora = DocumentLora(config, reference.model.config, 0, torch.device("cpu"))
    stacked = {
        name: (a.detach().double().requires_grad_(), torch.randn_like(b).double().requires_grad_())
        for name, (a, b) in lora.adapters(3, None).stacked.items()
    }
    x = torch.randint(4, 300, (3, 9))
    y = torch.randint(4, 300, (3, 9))
    weights = torch.randn(3, 9, dtype=torch.float64)
    adapters = Adapters(stacked, reference.scale, reference.caps)
    found = reference.model(x, y, reduction="none", adapters=adapters)
    leaves = [*(side for pair in stacked.values() for side in pair), reference.caps]
    gradients = torch.autograd.grad((found * weights).sum(), leaves)
    expected = torch.stack(
        [
            reference.losses(
                {
                    name: tuple(s[row] if name == "head" else s[:, row] for s in pair)
                    for name, pair in stacked.items()
                },
                x[row],
                y[row],
            )
            for row in range(3)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_adapters_that_begin_leave_the_model_as_it_is_to_the_bit() -> None:
    model, config = small_gpt(), settings()
    lora = DocumentLora(config, model.config, 0, torch.device("cpu"))
    x = torch.randint(4, 300, (3, 9))
    plain = model(x, x, reduction="none")
    assert torch.equal(model(x, x, reduction="none", adapters=lora.adapters(3, None)), plain)
    caps = torch.full((2,), 30.0)
    assert torch.equal(model(x, x, reduction="none", adapters=Adapters({}, softcaps=caps)), plain)
