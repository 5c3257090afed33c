"""Throws damaged and hostile files at everything that reads a file of strangers.

    python -m tests.fuzz --mutations 10000 --seed 0

A case is sound when the reader gives back something or raises the error that it promises, within
limits of time and memory of its own. Anything else is a finding: another exception, a crash, a
case killed by its alarm. Cases are made from (seed, target, index) alone, so that
`--target T --only I` runs one of them again. Cases run in forked children, which may die.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import functools
import hashlib
import json
import lzma
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import torch
import zstandard

from service.verify.folder import UnreadableError
from service.verify.model_checks import Means
from service.verify.verification import verify
from trainer import artifact, checkpoint
from trainer.compress import CODECS
from trainer.compress.rans_classes import BLOCK_LOGS
from trainer.config import TrainConfig
from trainer.data import shards
from trainer.errors import ArtifactError, DataError
from trainer.quantize import quantize

SECONDS = 10.0
"""A case may take, on a busy machine too; sound ones take milliseconds."""
EXTRA_BYTES = 1 << 30
"""A case may take beside what the process has at the start: an artifact may unpack to a quarter of
this, and is then computed with in fp32."""
CODEC_EXTRA_BYTES = 100 << 20
"""As EXTRA_BYTES, for decoders that are told how much must come out; less than a bomb."""
LARGEST_DECLARED = 20_000_000
CODEC_CONTENT = np.clip(np.random.default_rng(0).normal(0, 9, 3000).round(), -31, 31)
BOMB_BYTES = 200_000_000
GROUPINGS = ("type", "role", "role_transposed", "role_sorted")
NUMBERS = (0, 1, 2, 127, 255, 256, 32767, 65535, 1 << 31, (1 << 32) - 1, 1 << 48, (1 << 64) - 1)
NODES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 40, 10**30, 1e308, "", "../../etc/passwd", "int6+lr9999"),
    *(
        "int4+hi9999x9999",
        "a" * 5000,
        [],
        [[[[]]]],
        {},
        {"a": {}},
        [1 << 40, 1 << 40, 0],
        "\x1b[2J",
    ),
)


@dataclass
class Outcome:
    """What became of the cases of a target."""

    target: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    findings: list[str] = field(default_factory=list)


# --- mutations -----------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, overwrite numbers, cut, repeat, insert, truncate; once or a few times."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not found:
            return bytes(found)
        start = rng.randrange(len(found))
        end = min(len(found), start + rng.choice((1, 1, 2, 4, 30, 300)))
        kind = rng.randrange(8)
        if kind < 2:
            found[start] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[start:end] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * (end - start)
        elif kind == 3:
            del found[start:end]
        elif kind == 4:
            found[start:start] = found[start:end] * rng.choice((1, 1, 1, 50))
        elif kind == 5:
            found[start:start] = rng.randbytes(end - start)
        elif kind == 6:
            width = rng.choice((2, 4, 8))
            number = rng.choice((*NUMBERS, len(found), len(found) + 1)) % (1 << 8 * width)
            found[start : start + width] = number.to_bytes(width, rng.choice(("little", "big")))
        else:
            del found[start:]
    return bytes(found)


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """JSON with one node or a few replaced, removed, or doubled under another name."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2, 4))):
        node, key = tree, None
        for _ in range(rng.choice((1, 2, 3, 5))):
            parent, keys = node, _keys(node)
            if not keys:
                break
            key = rng.choice(keys)
            holder, node = parent, parent[key]
        if key is None:
            return copy.deepcopy(rng.choice(NODES))
        kind = rng.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            holder[rng.choice(("seed", "config", "a.b", "", "x" * 300))] = copy.deepcopy(node)
        elif kind == 1:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(NODES))
    return tree


def _keys(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node)
    return list(range(len(node))) if isinstance(node, list) else []


# --- targets -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A reader: makes a case from a generator, and reads it."""

    make: Callable[[random.Random], Any]
    read: Callable[[Any], object]
    promised: tuple[type[Exception], ...] = (ArtifactError,)
    extra_bytes: int = EXTRA_BYTES


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = 0.05 * torch.randn(24, 40, generator=generator)
    return {
        "tok_emb.weight": weights,
        "head.weight": weights,
        "blocks.0.attn.q.weight": 0.02 * torch.randn(40, 40, generator=generator),
        "blocks.0.mlp.up.weight": 0.02 * torch.randn(80, 40, generator=generator),
        "blocks.0.attn_scale": torch.randn(40, generator=generator),
        "empty": torch.zeros(0, 7),
        "count": torch.tensor([3, 4]),
    }


@functools.cache
def artifact_seeds() -> list[bytes]:
    """Every codec and grouping, with scales of both kinds and low-rank factors in one of them."""
    blobs = []
    for index, codec in enumerate(CODECS):
        config = TrainConfig().with_overrides(
            {
                "compress.codec": codec,
                "compress.byte_shuffle": bool(index % 2),
                "compress.grouping": GROUPINGS[index % 4],
                "quantize.keep_float_max_numel": 100,
                "quantize.scale_bits": 8 if index % 2 else 16,
                "quantize.low_rank": ("off", "float16", "asymmetric")[index % 3],
            }
        )
        blobs.append(artifact.encode(quantize(_state(), config.quantize), config))
    return blobs


def sealed(body: bytes) -> bytes:
    """The body with a checksum that is right, so that damage reaches the inner layers."""
    return body + hashlib.blake2b(body, digest_size=16).digest()


def _split(blob: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(blob[10:14], "little")
    return json.loads(brotli.decompress(blob[18 : 18 + size])), blob[18 + size : -16]


def with_header(blob: bytes, header: Any, streams: bytes) -> bytes:
    """An artifact with this header."""
    text = json.dumps(header).encode()
    packed = brotli.compress(text, quality=1)
    sizes = struct.pack("<II", len(packed) % (1 << 32), len(text) % (1 << 32))
    return sealed(blob[:10] + sizes + packed + streams)


def make_artifact(rng: random.Random) -> bytes:
    blob = rng.choice(artifact_seeds())
    kind = rng.randrange(4)
    if kind == 0:
        return mutated(blob, rng)
    if kind == 1:
        return sealed(mutated(blob[:-16], rng))
    header, streams = _split(blob)
    if kind == 2:
        return with_header(blob, mutated_tree(header, rng), streams)
    name = rng.choice(list(header["streams"]))  # one stream is replaced by a bomb or by another
    start = sum(list(header["streams"].values())[: list(header["streams"]).index(name)])
    other = rng.choice([*bombs().values(), mutated(rng.choice(list(bombs().values())), rng)])
    streams = streams[:start] + other + streams[start + header["streams"][name] :]
    header["streams"][name] = len(other)
    return with_header(blob, header, streams)


def read_artifact(blob: bytes) -> str:
    _, quantized = artifact.decode(blob)
    return artifact.weights_digest(quantized)


@functools.cache
def bombs() -> dict[str, bytes]:
    """For every codec a few kilobytes that become BOMB_BYTES of zeros."""
    zeros = bytes(BOMB_BYTES)
    table = np.zeros(256, "<u2")
    table[0] = 1 << 14
    packed_table = brotli.compress(table.tobytes())
    by_states = struct.pack("<cQH", b"R", BOMB_BYTES, len(packed_table)) + packed_table
    block_log = max(BLOCK_LOGS)
    blocks = bytes(BOMB_BYTES >> block_log)
    head = brotli.compress(blocks + table.tobytes())
    by_classes = struct.pack("<cQBBI", b"C", BOMB_BYTES, block_log, 1, len(head)) + head
    return {
        "zlib": zlib.compress(zeros, 1),
        "brotli": brotli.compress(zeros, quality=1),
        "lzma": lzma.compress(zeros, preset=0),
        "zstd": zstandard.ZstdCompressor(level=1).compress(zeros),
        "rans": by_states + struct.pack("<I", 1 << 16) * 256,
        "rans_classes": by_classes + struct.pack("<I", 1 << 16) * 4096,
    }


@functools.cache
def packed_codes(codec: str) -> bytes:
    return CODECS[codec].compress(CODEC_CONTENT.astype(np.int8).tobytes(), 9)


def make_packed(codec: str, rng: random.Random) -> tuple[bytes, int]:
    size = rng.choice((len(CODEC_CONTENT),) * 4 + (0, 1, len(CODEC_CONTENT) + 1, LARGEST_DECLARED))
    source = packed_codes(codec) if rng.random() < 0.75 else bombs()[codec]
    return mutated(source, rng), size


def read_packed(codec: str, case: tuple[bytes, int]) -> object:
    data = CODECS[codec].decompress(*case)
    assert len(data) == case[1]
    return data


@functools.cache
def checkpoint_seed() -> bytes:
    arrays = {name: value.numpy() for name, value in _state().items()}
    return checkpoint.pack(arrays, TrainConfig())


def make_checkpoint(rng: random.Random) -> bytes:
    blob = checkpoint_seed()
    kind = rng.randrange(3)
    if kind == 0:
        return mutated(blob, rng)
    if kind == 1:
        return sealed(mutated(blob[:-16], rng))
    size = int.from_bytes(blob[8:12], "little")
    header = mutated_tree(json.loads(blob[12 : 12 + size]), rng)
    text = json.dumps(header).encode()
    return sealed(blob[:8] + struct.pack("<I", len(text)) + text + blob[12 + size : -16])


def read_checkpoint(blob: bytes) -> object:
    path = _scratch() / "checkpoint.bin"
    path.write_bytes(blob)
    weights = checkpoint.read(path)
    checkpoint.read_config(path)
    return sum(int(array.size) for array in weights.values())


RECORD = {
    "track": "10min_16mb",
    "val_bpb": 1.06,
    "val_loss": "2.32",
    "bytes_total": "15,907,550",
    "seeds": [42, 0],
    "seed_results": {"42": {"val_bpb": 1.05, "artifact_bytes": 15897259, "eval_time_s": 508.8}},
    "runs": [{"seed": 42, "val_bpb": 1.1}],
    "metrics": {"inner": {"bytes_code": 24943}},
    "config": TrainConfig().to_dict(),
    "artifact_digest": "0" * 64,
    "phases": {"train": 590.0, "evaluate": 300.0},
    "hardware": {"device": "cpu"},
}
LOG = (
    "step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms\n"
    "Total submission size int8+zlib: 15863489 bytes\ntrain: 5.50 s\n"
    "quantized_ttt val_loss: 2.01 val_bpb: 1.1920 eval_time:74123ms\n"
) * 20


def make_folder(rng: random.Random) -> tuple[bytes, bytes]:
    record = json.dumps(mutated_tree(RECORD, rng)).encode()
    return (mutated(record, rng) if rng.random() < 0.4 else record), mutated(LOG.encode(), rng)


def read_folder(case: tuple[bytes, bytes]) -> object:
    folder = _scratch() / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "submission.json").write_bytes(case[0])
    (folder / "train.log").write_bytes(case[1])
    found = verify(folder, Means(lambda config: "not scored here")).to_dict()
    return json.dumps(found, allow_nan=False)


def make_shard(rng: random.Random) -> bytes:
    header = np.zeros(shards.HEADER_INTS, "<i4")
    header[:3] = shards.MAGIC, shards.VERSION, 50
    whole = header.tobytes() + np.arange(50, dtype="<u2").tobytes()
    if rng.random() < 0.5:  # the beginning, where the numbers are
        return mutated(whole[:12], rng) + whole[12:]
    return mutated(whole, rng)


def read_shard(blob: bytes) -> object:
    path = _scratch() / "x_val_000000.bin"
    path.write_bytes(blob)
    return int(shards.open_shard(path).sum())


TARGETS: dict[str, Target] = {
    "artifact": Target(make_artifact, read_artifact),
    **{
        codec: Target(
            functools.partial(make_packed, codec),
            functools.partial(read_packed, codec),
            extra_bytes=CODEC_EXTRA_BYTES,
        )
        for codec in CODECS
    },
    "checkpoint": Target(make_checkpoint, read_checkpoint),
    "folder": Target(make_folder, read_folder, (UnreadableError,)),
    "shard": Target(make_shard, read_shard, (DataError,)),
}
WEIGHTS = {"artifact": 8, "checkpoint": 3, "folder": 3}
"""Shares of the cases; 1 for the others."""


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="caddie-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # children leave without it
    return folder


# --- running -------------------------------------------------------------------------------


def fuzz(target: str, num_cases: int, seed: int, only: int | None = None) -> Outcome:
    """Run the cases of one target; children that die are replaced."""
    outcome = Outcome(target)
    first, last = (0, num_cases) if only is None else (only, only + 1)
    bombs()  # made here, so that children have them
    _scratch()
    with mmap.mmap(-1, 8) as place:
        while first < last:
            first = _run_child(TARGETS[target], outcome, range(first, last), seed, place)
    return outcome


def _run_child(target: Target, outcome: Outcome, cases: range, seed: int, place: mmap.mmap) -> int:
    """Fork, run cases until they are done or one kills the child; the case to go on with."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read_end)
            found = _run_cases(target, outcome.target, cases, seed, place)
            with os.fdopen(write_end, "w") as pipe:
                json.dump(asdict(found), pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status == 0:
        found = Outcome(**json.loads(text))
        outcome.cases += found.cases
        outcome.accepted += found.accepted
        outcome.refused += found.refused
        outcome.slowest_s = max(outcome.slowest_s, found.slowest_s)
        outcome.findings += found.findings
        return cases.stop
    index = int.from_bytes(place[:8], "little")
    killed_by = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "itself"
    outcome.cases += index + 1 - cases.start
    outcome.findings.append(f"case {index}: the process was ended by {killed_by}")
    return index + 1


def _run_cases(target: Target, name: str, cases: range, seed: int, place: mmap.mmap) -> Outcome:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, inside C code too
    most = _data_bytes() + target.extra_bytes
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    found = Outcome(name)
    for index in cases:
        place[:8] = index.to_bytes(8, "little")
        case = target.make(random.Random(f"{seed}/{name}/{index}"))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        started = time.perf_counter()
        try:
            target.read(case)
            found.accepted += 1
        except target.promised as error:
            found.refused += 1
            if not str(error).strip() or len(str(error)) > 5000:
                found.findings.append(f"case {index}: an error of {len(str(error))} characters")
        except Exception as error:
            found.findings.append(f"case {index}: {type(error).__name__}: {str(error)[:200]}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        found.cases += 1
        found.slowest_s = max(found.slowest_s, time.perf_counter() - started)
    return found


def _data_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:"))


def shares(mutations: int) -> dict[str, int]:
    """Cases of each target, `mutations` or a few more in all."""
    total = sum(WEIGHTS.get(name, 1) for name in TARGETS)
    return {name: -(-mutations * WEIGHTS.get(name, 1) // total) for name in TARGETS}


def main() -> int:
    """Fuzz, print a table, and give 1 when there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000, help="cases in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS), help="only this one")
    parser.add_argument("--only", type=int, help="only this case of --target")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args()
    counts = shares(asked.mutations)
    if asked.target:
        counts = {asked.target: asked.mutations}
    torch.set_num_threads(1)
    outcomes = [fuzz(name, count, asked.seed, asked.only) for name, count in counts.items()]
    if asked.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    else:
        print("target       cases  accepted  refused  slowest  findings")
        for found in outcomes:
            print(
                f"{found.target:<10} {found.cases:>7,} {found.accepted:>9,} {found.refused:>8,}"
                f" {found.slowest_s:>6.2f} s {len(found.findings):>9,}"
            )
            for finding in found.findings[:20]:
                print(f"  {finding}")
    return 1 if any(found.findings for found in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
