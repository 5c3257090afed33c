"""Published submission folders, in the many words they use, and folders that mean harm. CPU.

Records are written here from the facts that are known of the public ones; none is a copy.
"""

from __future__ import annotations

import json
import lzma
import os
import pickle
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import UsageError
from service.submission_fields import FIELDS
from service.verify import folder as reading
from service.verify.checks import Check
from service.verify.dialects import NAMES, Claims, number
from service.verify.folder import Folder, UnreadableError, shown
from service.verify.model_checks import Means
from service.verify.training_log import TrainingLog
from service.verify.verification import Verification, verify

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
SIZES = SHARED / "data" / "public_runs" / "sizes.jsonl.xz"
MEANS = Means(lambda config: "no data in this test")
BASELINE = {
    "author": "Baseline",
    "name": "baseline",
    "date": "2026-03-18T14:56:29Z",
    "val_loss": 2.07269931,
    "val_bpb": 1.2243657,
    "bytes_total": 15863489,
    "bytes_code": 47642,
}
CUSTOMARY = {
    "track": "10min_16mb",
    "val_bpb": 1.06107587,
    "val_loss": 2.32202732,
    "val_bpb_std": 0.0009,
    "seeds": [42, 0, 1234],
    "seed_results": {
        "42": {"val_bpb": 1.05989454, "artifact_bytes": 15897259, "eval_time_s": 508.8},
        "0": {"val_bpb": 1.0621, "artifact_bytes": 15907550, "train_time_s": 599.6},
        "1234": {"val_bpb": 1.06123307, "artifact_bytes": 15900948},
    },
    "artifact_bytes_mean": 15901919,
    "artifact_bytes_max": 15907550,
    "bytes_total": 15907550,
    "hardware": "8xH100 80GB SXM",
}
DIALECTS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "baseline": (BASELINE, {"val_bpb": 1.2243657, "bytes_total": 15863489, "bytes_code": 47642}),
    "customary": (CUSTOMARY, {"val_bpb": 1.06107587, "bytes_total": 15907550}),
    "means": (
        {"mean_val_bpb": 1.12, "std_val_bpb": 0.001},
        {"val_bpb": 1.12, "val_bpb_std": 0.001},
    ),
    "text": (
        {"val_bpb": "1.1194", "bytes_total": "15,990,006 bytes", "bytes_code": "48_001"},
        {"val_bpb": 1.1194, "bytes_total": 15990006, "bytes_code": 48001},
    ),
    "rounded": (
        {"bpb": "~1.12", "artifact_size": "15.9 MB"},
        {"val_bpb": 1.12, "bytes_total": 15.9e6},
    ),
    "groups": (
        {"metrics": {"val_bpb": 1.1}, "size": {"artifact": {"total_bytes": 15999999}}},
        {"val_bpb": 1.1, "bytes_total": 15999999},
    ),
    "other case": ({"Val-BPB": 1.1, "Total Bytes": 5}, {"val_bpb": 1.1, "bytes_total": 5}),
    "a loss that is none": ({"val_bpb": 1.15, "val_loss": 1.15}, {"val_bpb": 1.15}),
    "outer before inner": ({"val_bpb": 1.1, "old": {"val_bpb": 1.2}}, {"val_bpb": 1.1}),
    "nothing": ({"val_bpb": None, "bytes_total": True, "val_loss": "good"}, {}),
}
SEEDS: dict[str, Any] = {
    "by name": {"seed_results": {"42": {"val_bpb": 1.1}, "7": {"val_bpb": 1.2}}},
    "prefixed": {"per_seed": {"seed_42": {"bpb": 1.1}, "seed_7": {"bpb": 1.2}}},
    "numbers": {"seeds": {"42": 1.1, "7": 1.2}},
    "list": {"seeds": [42, 7], "runs": [{"seed": 42, "val_bpb": 1.1}, {"seed": 7, "val_bpb": 1.2}]},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_numbers(dialect: str) -> None:
    tree, expected = DIALECTS[dialect]
    found = dict(Claims.read(tree).numbers)
    if dialect in ("baseline", "customary"):
        found.pop("val_loss")
        found.pop("val_bpb_std", None)
    assert found == expected


@pytest.mark.parametrize("dialect", SEEDS)
def test_seeds_are_found_however_they_are_given(dialect: str) -> None:
    seeds = Claims.read(SEEDS[dialect]).seeds
    assert {seed.seed: seed.numbers["val_bpb"] for seed in seeds} == {"42": 1.1, "7": 1.2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15,863,489", 15863489.0),
        ("1.5e3", 1500.0),
        ("600s", 600.0),
        ("10 min", 600.0),
        ("-3", -3.0),
        ("16MB", 16e6),
        *((text, None) for text in ("", "1,2", "1.2.3", "nan", "0x10", "16 apples", "9" * 70)),
        *((value, None) for value in (True, None, [], {}, float("nan"), float("inf"), 10**400)),
    ],
)
def test_numbers_are_read_or_left_out(text: object, expected: float | None) -> None:
    assert number(text) == expected


def test_our_own_fields_are_understood() -> None:
    for meaning in ("val_bpb", "val_loss", "val_bpb_std", "bytes_total", "bytes_code"):
        assert NAMES[meaning][0] == meaning and meaning in FIELDS


LOG = """step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
quantized_sliding_window val_loss: 2.01 val_bpb: 1.1920 eval_time:74123ms
"""


def test_a_log_of_the_challenge_is_read() -> None:
    found = TrainingLog.read(LOG.encode())
    assert found == TrainingLog((1.2172, 1.2243657, 1.192), (15863489,), 600.038, 74.123)
    assert TrainingLog.read(LOG.encode("utf-16")) == found
    ours = TrainingLog.read(b"train: 500.25 s\ncalibrate: 4.50 s\nevaluate: 9.00 s\n")
    assert (ours.train_seconds, ours.eval_seconds) == (504.75, 9.0)


def published(folder: Path, record: object, **files: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "submission.json").write_text(json.dumps(record))
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def by_name(found: Verification) -> dict[str, Check]:
    return {check.name: check for check in found.checks}


def failures(found: Verification) -> set[str]:
    return {check.name for check in found.failures}


def test_a_sound_published_folder_passes_and_says_what_it_could_not_check(tmp_path: Path) -> None:
    log = LOG.replace("600038", "599938")
    program = b"#" * 47642
    found = verify(published(tmp_path, BASELINE, train_gpt__py=program, train__log=log), MEANS)
    assert not found.failures, found.failures
    assert found.bytes_total == 15863489 and found.val_bpb is None
    checked = {name for name, check in by_name(found).items() if check.ok}
    assert {"artifact_bytes", "bytes_code", "train_seconds", "eval_seconds"} <= checked
    assert {"logs_val_bpb", "logs_bytes"} <= checked
    missing = {check.name for check in found.unchecked}
    assert missing == {"track", "bytes_total", "artifact", "weights_digest", "config", "legality",
                       "val_bpb"}  # fmt: skip
    for check in found.unchecked:
        assert str(check.value).startswith("not checked: ")


@pytest.mark.parametrize(
    ("record", "files", "expected"),
    [
        ({**BASELINE, "bytes_total": 16000001}, {}, {"artifact_bytes"}),
        ({**BASELINE, "val_bpb": 1.15}, {"train__log": LOG}, {"logs_val_bpb", "train_seconds"}),
        ({**BASELINE, "bytes_total": 15000000}, {"l__txt": LOG}, {"logs_bytes", "train_seconds"}),
        ({**BASELINE, "bytes_code": 40000}, {"train_gpt__py": b"#" * 50000}, {"bytes_code"}),
        ({**CUSTOMARY, "val_bpb": 1.05}, {}, {"seeds_val_bpb"}),
        ({**CUSTOMARY, "eval_time_s": 600.5}, {}, {"eval_seconds"}),
        (
            {**BASELINE, "bytes_total": 15978121, "bytes_code": 0, "bytes_model": 15978121},
            {"train_gpt__py": "exec(open('real.py').read())", "real__py": "#" * 80055},
            {"artifact_bytes", "bytes_code"},
        ),
        ([1, 2], {"train__log": "nothing"}, {"record"}),
    ],
    ids=["over cap", "no log has it", "bytes", "code", "seeds", "slow", "code beside", "list"],
)
def test_what_a_published_folder_gets_wrong_is_found(
    record: object, files: dict[str, str | bytes], expected: set[str], tmp_path: Path
) -> None:
    assert failures(verify(published(tmp_path / "x", record, **files), MEANS)) == expected


def test_a_record_by_another_name_and_a_folder_of_nothing_but_a_log(tmp_path: Path) -> None:
    published(tmp_path / "a", BASELINE)
    (tmp_path / "a" / "submission.json").rename(tmp_path / "a" / "submission_ternary.json")
    assert by_name(verify(tmp_path / "a", MEANS))["record"].value == "submission_ternary.json"
    (tmp_path / "b c").mkdir()
    (tmp_path / "b c" / "train log.txt").write_text(LOG)
    found = verify(tmp_path / "b c", MEANS)
    assert by_name(found)["record"].ok is None
    assert failures(found) == {"train_seconds"}  # 600.038 s
    (tmp_path / "empty").mkdir()
    assert failures(verify(tmp_path / "empty", MEANS)) == {"files"}


@pytest.mark.skipif(not SIZES.exists(), reason="no facts of public runs beside the checkout")
def test_the_cap_catches_every_public_run_that_is_over_it(tmp_path: Path) -> None:
    """What is known of 2,575 public artifacts, said in one dialect after another."""
    with lzma.open(SIZES, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    dialects: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
        lambda row: {"bytes_total": row["bytes_total"]},
        lambda row: {"artifact_bytes": f"{row['bytes_total']:,} bytes"},
        lambda row: {"seeds": {"1": {"val_bpb": 1.1, "bytes_total": row["bytes_total"]}},
                     "results_summary": {"total_bytes": row["bytes_total"]}},
    ]  # fmt: skip
    wrong = over = 0
    for index, row in enumerate(rows):
        if row["bytes_total"] is None:
            continue
        claims = Claims.read(dialects[index % 3](row))
        over += row["over_cap"]
        wrong += (claims.numbers["bytes_total"] > 16_000_000) != row["over_cap"]
    assert over > 100 and wrong == 0


# --- folders that mean harm ----------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_models_of_other_kinds_are_never_loaded(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    folder = published(tmp_path / "x", BASELINE, train_gpt__py=b"#" * 10)
    for name in ("final_model.int8.ptz", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(trap)))
    found = verify(folder, MEANS)
    assert "can run code" in str(by_name(found)["artifact"].value)
    assert by_name(found)["artifact"].ok is None
    (folder / "artifact.bin").write_bytes(pickle.dumps(Bomb(trap)))
    assert by_name(verify(folder, MEANS))["artifact"].ok is False
    assert not trap.exists()


def test_links_pipes_and_deep_folders_are_faults_and_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"val_bpb": 0.5}))
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "submission.json").symlink_to(secret)
    (folder / "artifact.bin").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "train_gpt.py")
    (folder / "train.log").write_text("x")
    deep = folder
    for _ in range(30):
        deep = deep / "d"
        deep.mkdir()
    found = verify(folder, MEANS)
    assert by_name(found)["files"].value == 5 and by_name(found)["record"].ok is None
    assert Folder.look(folder).sizes == {"train.log": 1}


def test_a_file_that_is_swapped_for_a_link_or_a_pipe_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("x")
    (tmp_path / "b.log").write_text("x")
    listed = Folder.look(tmp_path)
    (tmp_path / "a.log").unlink()
    (tmp_path / "a.log").symlink_to("/etc/hostname")
    (tmp_path / "b.log").unlink()
    os.mkfifo(tmp_path / "b.log")
    with pytest.raises(UnreadableError, match=r"a\.log cannot be read"):
        listed.read("a.log", 100)
    with pytest.raises(UnreadableError, match=r"b\.log is not a regular file"):
        listed.read("b.log", 100)


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def test_huge_files_are_measured_and_not_read(tmp_path: Path) -> None:
    folder = published(tmp_path / "x", BASELINE)
    for name in ("artifact.bin", "train_gpt.py", "submission.json", "train.log"):
        sparse(folder / name, 1 << 40)
    tracemalloc.start()
    started = time.monotonic()
    found = verify(folder, MEANS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {"artifact_bytes", "record"} <= failures(found)
    assert found.bytes_total == 2 << 40
    assert peak < 2 * reading.MAX_MODEL_BYTES + (64 << 20) and time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"{" + b'"a" : 1, ' * 200_000, "more than the 1,048,576 bytes"),
        (b'{"val_bpb": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"", "not JSON"),
        (b"null", "holds a NoneType"),
        (b'"\x1b[2J"', "not JSON"),
    ],
    ids=range(8),
)
def test_records_that_are_none_give_one_line(text: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "submission.json").write_bytes(text)
    check = by_name(verify(tmp_path, MEANS))["record"]
    assert check.ok is False and words in str(check.value)


@pytest.mark.parametrize(
    "value",
    [None, True, -1, 1e308, 10**400, "x" * 100_000, [], [[]] * 1000, {}, {"a": {"b": {"c": 1}}}],
    ids=range(10),
)
def test_wrong_types_anywhere_are_left_out_or_refused(value: Any, tmp_path: Path) -> None:
    names = {name for names in NAMES.values() for name in names} | set(FIELDS) | {"runs", "results"}
    record = dict.fromkeys(names, value)
    found = verify(published(tmp_path / "x", record, train__log=LOG), MEANS)
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_strangers_write_cannot_steer_the_terminal(tmp_path: Path) -> None:
    assert shown("a\x1b[2J\nb\u202e", 50) == "a\ufffd[2J\ufffdb\ufffd"
    (tmp_path / "x\x1b[2J.py").write_text("")
    record = {"track": "\x1b]0;owned\x07", "artifact_digest": "\x1b[31m", "config": {"\x1b[1m": 1}}
    found = verify(published(tmp_path, record), MEANS)
    for check in found.checks:
        assert f"{check.value}{check.bound}{check.reason}".isprintable(), check


def test_more_files_than_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_FILES", 10)
    for index in range(30):
        (tmp_path / f"{index}.log").write_text("")
    listed = Folder.look(tmp_path)
    assert len(listed.sizes) == 11 and "more than 10 files" in listed.faults[0]


def test_a_folder_that_may_not_be_listed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        Folder.look(tmp_path / "none")
