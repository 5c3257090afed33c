"""A small submission folder made of a real run, with a program that scores its own artifact."""

from __future__ import annotations

import base64
import json
import platform
from pathlib import Path
from typing import Any

from service.provenance import describe_hardware
from trainer import artifact
from trainer.code import packed_code
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.report import FileReporter

PROGRAM = """
import base64, brotli, json, lzma, pathlib, sys, tempfile
packed = base64.b85decode({packed!r})
filters = [{{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}}]
text = (brotli.decompress(packed[1:]) if packed[:1] == b"B"
        else lzma.decompress(packed[1:], lzma.FORMAT_RAW, filters=filters)).decode()
with tempfile.TemporaryDirectory() as folder:
    for file in text.split("\\0"):
        name, _, source = file.partition("\\n")
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    pathlib.Path(folder, "code.bin").write_bytes(packed)
    sys.path.insert(0, folder)
    from trainer.config import TrainConfig
    from trainer.loop import train
    from trainer.report import NullReporter
    assert train.__code__.co_filename.startswith(folder), "not the packed code"
    config = TrainConfig.from_dict(json.loads({config!r})).with_overrides(
        {{"data.dir": sys.argv[2], "source.artifact": "artifact.bin"}})
    result = train(config, NullReporter())
    assert sys.argv[3:] == ["--out", ".", "--artifact", "artifact.bin"]
    pathlib.Path("result.json").write_text(json.dumps({{"val_bpb": result.val_bpb}}))
"""
SECONDS = {"train": 5.5, "calibrate": 0.5, "evaluate": 1.5}
"""Written in place of what was measured: a busy machine must not fail the tests."""


def make_submission(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train, pack and describe; returns the record."""
    folder.mkdir()
    run = folder.parent / f"{folder.name}.run"
    result = train(config, FileReporter(run), run)
    model = (run / "artifact.bin").read_bytes()
    text = json.dumps(config.without_places())
    packed = base64.b85encode(packed_code(config)).decode()
    code = PROGRAM.format(packed=packed, config=text).encode()
    (folder / "train_gpt.py").write_bytes(code)
    (folder / "artifact.bin").write_bytes(model)
    (folder / "README.md").write_text("A small one.\n")
    (folder / "requirements.txt").write_text("torch\n")
    log = "".join(f"{name}: {seconds:.2f} s\n" for name, seconds in SECONDS.items())
    (folder / f"train_seed{config.runtime.seed}.log").write_text(log)
    record = {
        "track": "laptop",
        "val_bpb": result.val_bpb,
        "val_loss": result.val_loss,
        "bytes_total": len(code) + len(model),
        "bytes_code": len(code),
        "bytes_model": len(model),
        "seeds": [config.runtime.seed],
        "seed_results": {str(config.runtime.seed): {"val_bpb": result.val_bpb}},
        "artifact_digest": artifact.weights_digest(artifact.decode(model)[1]),
        "config": config.without_places(),
        "phases": {**result.phases, **SECONDS},
        "data_digest": _digest(config),
        "hardware": {"device": result.device, "cpu": describe_hardware()["cpu"]},
        "versions": {"python": platform.python_version()},
    }
    write_record(folder, record)
    return record


def write_record(folder: Path, record: object) -> None:
    (folder / "submission.json").write_text(json.dumps(record))


def _digest(config: TrainConfig) -> str:
    from trainer.data.dataset import Dataset

    return Dataset.open(config.data.dir).digest
