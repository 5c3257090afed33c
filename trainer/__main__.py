"""One run from the command line, under python or torchrun: `torchrun -m trainer --recipe tiny ...`.

Writes config.json, metrics.jsonl, train.log, artifact.bin and, last, result.json into --out. Exits
1 when the run failed, 2 when it was asked wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from trainer.compile_cache import use_compile_cache
from trainer.config import TrainConfig, parse_overrides
from trainer.errors import ConfigError, TrainerError
from trainer.recipes import RECIPES
from trainer.report import FileReporter, NullReporter


def main() -> int:
    """Parse, train, write the result."""
    arguments = _parser().parse_args()
    try:
        config = _config(arguments)
        use_compile_cache(config.runtime.compile_cache)
    except (ConfigError, OSError, json.JSONDecodeError) as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 2
    from trainer.loop import train  # torch takes seconds to import: refuse bad settings first

    is_main = os.environ.get("RANK", "0") == "0"
    out = Path(arguments.out)
    reporter = FileReporter(out, echo=not arguments.quiet) if is_main else NullReporter()
    if is_main:
        (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    try:
        result = train(config, reporter, out)
    except TrainerError as error:
        if is_main:
            reporter.emit("log", line=f"error: {error}")
        print(f"trainer: {error}", file=sys.stderr)
        return 1
    if is_main:
        partial = out / "result.json.partial"
        partial.write_text(result.model_dump_json(indent=2) + "\n")
        partial.replace(out / "result.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="a config.json as a run writes it")
    source.add_argument("--recipe", choices=sorted(RECIPES), help="a published configuration")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="replace one setting"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run's files")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser


def _config(arguments: argparse.Namespace) -> TrainConfig:
    if arguments.config:
        config = TrainConfig.from_dict(json.loads(Path(arguments.config).read_text()))
    else:
        config = RECIPES[arguments.recipe].build()
    return config.with_overrides(parse_overrides(arguments.set))


if __name__ == "__main__":
    sys.exit(main())
