"""Names that a submission folder uses: its files, and the fields of submission.json.

`caddie package` writes them and `caddie verify` reads them. Whatever the challenge's published
records have too is called as they call it; the rest is what makes a folder provable.
"""

from __future__ import annotations

CODE_FILE = "train_gpt.py"
"""The one program of a folder: it trains, packs and evaluates. Counts towards the artifact."""
MODEL_FILE = "artifact.bin"
"""The packed model, as `trainer.artifact` writes it. Counts towards the artifact."""
RECORD_FILE = "submission.json"
README_FILE = "README.md"
REQUIREMENTS_FILE = "requirements.txt"
READABLE_FILE = "train_gpt_readable.py"
"""The program before it was shortened. It is never run from the folder, so it does not count."""
LOG_FILES = "train_seed{seed}.log"
SCORE_ARGUMENTS = ("--data", "{data}", "--out", ".", "--artifact", MODEL_FILE)
"""With these CODE_FILE only scores MODEL_FILE, on the data set in the folder {data}."""
RESULT_FILE = "result.json"
"""What it then writes: JSON with val_bpb, val_loss and artifact_digest."""

FIELDS: dict[str, str] = {
    "track": "name of the budgets that it was made for, of `caddie tracks`",
    "val_bpb": "bits per byte of MODEL_FILE",
    "val_loss": "nats per token of MODEL_FILE",
    "val_bpb_std": "standard deviation over seeds",
    "bytes_total": "bytes_code + bytes_model",
    "bytes_code": "bytes of CODE_FILE",
    "bytes_model": "bytes of MODEL_FILE",
    "seeds": "list of the seeds that were run; MODEL_FILE is of the first",
    "seed_results": "seed -> {val_bpb, val_loss, artifact_bytes, steps, train_time_s, eval_time_s}",
    "artifact_digest": "trainer.artifact.weights_digest of the decoded weights",
    "config": "settings of the run, as TrainConfig.to_dict gives them, without folders",
    "phases": "seconds of each phase, as TrainResult.phases",
    "data_digest": "digest of the data set that it was trained and scored on",
    "hardware": "device and machine; two runs compare to the last bit only on the same",
    "versions": "versions of the packages",
}
"""Field of submission.json -> what it says."""
