"""Files that are well formed, and say what no file of ours would. CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fuzz import BOMB_BYTES, bombs
from tests.trainer_tests.test_loop import configure, data_dir  # noqa: F401
from trainer import artifact, checkpoint
from trainer.compress import CODECS
from trainer.config import QuantizeConfig, TrainConfig
from trainer.errors import ArtifactError
from trainer.loop import train
from trainer.quantize import QuantizedState, QuantizedTensor, quantize
from trainer.quantize.schemes import scheme_named
from trainer.report import NullReporter


def empty_arrays(scheme: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    layout = scheme_named(scheme).layout(shape)
    return {part: np.zeros(spec.shape, spec.dtype) for part, spec in layout.items()}


@pytest.mark.parametrize("codec", ["rans", "rans_classes"])
def test_a_few_bytes_do_not_buy_a_long_decoding(codec: str) -> None:
    """One symbol that is certain needs no words: a kilobyte would go on for as long as it says."""
    bomb = bombs()[codec]
    started = time.perf_counter()
    with pytest.raises(ArtifactError, match="too short for what it says"):
        CODECS[codec].decompress(bomb, BOMB_BYTES)
    assert time.perf_counter() - started < 5  # it was half a minute


@pytest.mark.parametrize("codec", ["rans", "rans_classes"])
@pytest.mark.parametrize("share", [1 / 60, 1 / 40, 1 / 8])
def test_whatever_the_encoder_leaves_to_states_is_long_enough(share: float, codec: str) -> None:
    size = 400_000
    rare = np.random.default_rng(0).random(size) < share / 8
    data = rare.astype(np.uint8).tobytes()
    packed = CODECS[codec].compress(data, 9)
    assert CODECS[codec].decompress(packed, size) == data


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("int6+lr9", "rank 9 for a tensor of shape"),
        ("int6+lr9g4", "rank 9 for a tensor of shape"),
        ("int6+hi5x4", "5 groups of 4 columns at 8 bits in a matrix of 16"),
        ("int6+hi9999x9999", "9999 groups of 9999 columns"),
    ],
)
def test_a_scheme_that_no_matrix_of_this_shape_can_have(scheme: str, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        scheme_named(scheme).decode(empty_arrays(scheme, (8, 16)), (8, 16))


@pytest.mark.parametrize("scheme", ["int6+lr8", "int6+lr8g4", "int6+hi4x4", "int6+u8+hi1x16+lr1"])
def test_a_scheme_at_its_bound_is_decoded(scheme: str) -> None:
    arrays = empty_arrays(scheme, (8, 16))
    assert not scheme_named(scheme).decode(arrays, (8, 16)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("scheme", "part"), [("int6", "scales"), ("float32", "values")])
def test_numbers_that_are_not_finite_are_refused(scheme: str, part: str, value: float) -> None:
    arrays = empty_arrays(scheme, (8, 16))
    arrays[part].flat[3] = value
    blob = artifact.encode(
        QuantizedState({"w": QuantizedTensor(scheme, (8, 16), arrays)}), TrainConfig()
    )
    with pytest.raises(ArtifactError, match="not finite"):
        artifact.decode(blob)


@pytest.mark.parametrize("read", [checkpoint.read, checkpoint.read_config])
def test_a_pipe_for_a_checkpoint_does_not_wait(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        read(tmp_path / "pipe")


def test_tensors_that_do_not_fit_the_settings_of_their_file(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configure(**{"runtime.prime_steps": 0})
    path = tmp_path / "artifact.bin"
    state = quantize({"tok_emb.weight": torch.zeros(3, 4)}, QuantizeConfig())
    artifact.write(path, artifact.encode(state, config))
    scored = config.with_overrides({"source.artifact": str(path)})
    with pytest.raises(ArtifactError, match="tensors are not those of its settings"):
        train(scored, NullReporter())
