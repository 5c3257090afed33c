"""The command line of `python -m trainer`, with a function of stand_in_train in place of training.

runtime.seed says which one: see FUNCTIONS. Run by torchrun, as the trainer is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.service_tests import stand_in_train
from trainer.config import TrainConfig
from trainer.errors import TrainerError
from trainer.report import FileReporter, NullReporter

FUNCTIONS = {1: "steps", 2: "bad_setting", 3: "no_device_memory", 4: "killed", 5: "hangs_once"}
"""runtime.seed -> function."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    config = TrainConfig.from_dict(json.loads(Path(arguments.config).read_text()))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    is_main = os.environ.get("RANK", "0") == "0"
    out = Path(arguments.out)
    reporter = FileReporter(out) if is_main else NullReporter()
    try:
        train = getattr(stand_in_train, FUNCTIONS[config.runtime.seed])
        result = train(config, reporter, out if is_main else None)
    except TrainerError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 1
    if is_main:
        (out / "result.json").write_text(result.model_dump_json())
    if dist.is_initialized():
        dist.destroy_process_group()  # gloo aborts a process that leaves its group at exit
    return 0


if __name__ == "__main__":
    sys.exit(main())
