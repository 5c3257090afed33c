"""The main program of a packaged run: `python train_gpt.py --data DIR`, also under torchrun.

Trains, packs and scores the one configuration that it was made from. With --artifact FILE it only
scores a packed model and says the digest of its weights. Written in the package, it is the entry
from which trainer/flatten makes a script of its own; here it cannot run by itself.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from trainer import artifact
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.report import FileReporter, NullReporter


def fixed_config() -> TrainConfig:
    """The configuration that the script was made from; defined when it is made."""
    raise NotImplementedError


def main() -> None:
    """Run it; results go to OUT/result.json."""
    parser = argparse.ArgumentParser()
    config = fixed_config()
    parser.add_argument("--data", required=True, help="folder of shards and their tokenizer")
    parser.add_argument("--out", default=".")
    parser.add_argument("--seed", type=int, default=config.runtime.seed)
    parser.add_argument("--artifact", default="", help="score this file instead of training")
    options = parser.parse_args()
    out = Path(options.out)
    config.data.__dict__["dir"] = options.data
    config.runtime.__dict__["seed"] = options.seed
    config.source.__dict__["artifact"] = options.artifact
    is_main = os.environ.get("RANK", "0") == "0"
    reporter = FileReporter(out, echo=True) if is_main else NullReporter()
    result = train(config, reporter, out)
    if is_main:
        record = result.model_dump()
        if result.artifact_sha256:
            path = Path(options.artifact or out / "artifact.bin")
            record["artifact_digest"] = artifact.weights_digest(
                artifact.decode(artifact.read(path))[1]
            )
        (out / "result.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
