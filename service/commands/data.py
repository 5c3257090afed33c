"""`caddie data demo|prepare|fetch`, and how other commands find a data set for a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from service.commands.progress import StageProgress
from service.commands.terminal import JsonFlag, output, print_json, warn
from service.errors import UsageError
from trainer.config import TrainConfig

DEMO_DIR = Path("caddie-data/demo")
"""Where the embedded corpus is built when a command needs it and no --data is given."""
DEMO_VOCAB = 512

OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the data set.")]


def demo(out: OutOption = DEMO_DIR, as_json: JsonFlag = False) -> None:
    """Build the embedded corpus from the Python standard library: tokenizer and shards."""
    from trainer.data.demo_corpus import build_demo

    with StageProgress() as progress:
        made = build_demo(out, vocab_size=DEMO_VOCAB, progress=progress)
    _show(made, as_json)


def prepare(
    texts: Annotated[
        list[Path],
        typer.Argument(
            metavar="TEXT...",
            help="Plain text with NUL between documents, .jsonl with a text field, or either .xz.",
        ),
    ],
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=1, help="Tokenizer pieces.")],
    out: OutOption,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="MODEL", help="Use this SentencePiece model."),
    ] = None,
    val_texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--val-text", metavar="TEXT", help="Validation text; default: 5 % of the documents."
        ),
    ] = None,
    val_docs: Annotated[
        int,
        typer.Option(
            "--val-docs", min=0, help="Hold out the first N documents; the challenge's 50000."
        ),
    ] = 0,
    name: Annotated[str, typer.Option("--name", help="First part of the files' names.")] = "corpus",
    case_ops: Annotated[
        bool,
        typer.Option("--caseops", help="Spell capitals as marks before lower-case words (#1729)."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn text into a tokenizer and shards in the challenge's format."""
    from trainer.data.prepare import prepare as prepare_texts

    given = [*texts, *(val_texts or []), *([tokenizer] if tokenizer is not None else [])]
    missing = [f"{path}: no such file; check the path" for path in given if not path.is_file()]
    if missing:
        raise UsageError("\n".join(missing))
    with StageProgress() as progress:
        made = prepare_texts(
            texts,
            vocab_size,
            out,
            tokenizer=tokenizer,
            progress=progress,
            val_texts=val_texts or (),
            name=name,
            val_docs=val_docs,
            case_ops=case_ops,
        )
    _warn_of_overlap(out)
    _show(made, as_json)


def fetch(
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="Such as sp1024.")],
    out: OutOption,
    train_shards: Annotated[
        int, typer.Option("--train-shards", min=0, help="Of 100 M tokens each; 0 = all.")
    ] = 1,
    repository: Annotated[
        str | None, typer.Option("--repository", help="Hugging Face data set repository.")
    ] = None,
    root: Annotated[str | None, typer.Option("--root", help="Its folder with manifest.json.")] = (
        None
    ),
    as_json: JsonFlag = False,
) -> None:
    """Download published shards and their tokenizer, and check every count."""
    from trainer.data import fetch as published

    with StageProgress() as progress:
        made = published.fetch(
            variant,
            out,
            train_shards or None,
            repository or published.REPOSITORY,
            root if root is not None else published.ROOT,
            progress,
        )
    _warn_of_overlap(out)
    _show(made, as_json)


def data_for(config: TrainConfig, data: Path | None, recipe: str) -> Path:
    """The absolute folder of a data set that fits the recipe's vocabulary, checked.

    Without --data it is the embedded corpus, built on first use, when the vocabulary matches.

    Raises: UsageError naming the command that makes a fitting data set.
    """
    vocab_size = config.model.vocab_size
    if data is None:
        if vocab_size != DEMO_VOCAB:
            raise UsageError(
                f"{recipe} has model.vocab_size = {vocab_size} and no --data was given; the "
                f"embedded corpus has {DEMO_VOCAB} pieces. Make a data set with `caddie data "
                f"prepare TEXT... --vocab-size {vocab_size} --out DIR` or `caddie data fetch "
                f"sp{vocab_size} --out DIR`, then pass --data DIR"
            )
        from trainer.data.demo_corpus import build_demo

        with StageProgress() as progress:
            build_demo(DEMO_DIR, vocab_size=DEMO_VOCAB, progress=progress)
        return DEMO_DIR.resolve()
    if not data.is_dir():
        raise UsageError(f"--data {data}: no such folder; make it with `caddie data prepare`")
    _check_vocabulary(data, vocab_size, recipe)
    return data.resolve()


def _check_vocabulary(data: Path, vocab_size: int, recipe: str) -> None:
    from trainer.data.dataset import Dataset

    found = Dataset.open(data).vocab_size
    if found != vocab_size:
        raise UsageError(
            f"--data {data} has a tokenizer of {found} pieces, but {recipe} has "
            f"model.vocab_size = {vocab_size}; pass a data set of {vocab_size} pieces, or "
            f"--set model.vocab_size={found}"
        )


def _warn_of_overlap(folder: Path) -> None:
    from trainer.data.dataset import Dataset
    from trainer.data.overlap import WORTH_A_WARNING, measure_overlap

    overlap = measure_overlap(Dataset.open(folder))
    if overlap.share > WORTH_A_WARNING:
        warn(f"{folder}: {overlap}; scores on it mean nothing unless that is meant")


def _show(made: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(made)
    output().print(
        f"{made['dir']}: {made['vocab_size']} pieces, {made['train_tokens']:,} training and "
        f"{made['val_tokens']:,} validation tokens, digest {made['digest']}"
    )
