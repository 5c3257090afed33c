"""Runs that only score a packed file, with every way to make a score, on 1 and 2 workers. CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search_spaces import SPACES
from service.commands.recipe_config import settings, settings_of_source
from service.filters import default_filters
from service.filters.legality import Legality
from service.trial import TrialSpec
from tests.ranks import run_ranks
from tests.trainer_tests.test_loop import Collector, configure, data_dir  # noqa: F401
from trainer.config import TrainConfig
from trainer.distributed import Group
from trainer.errors import ArtifactError, ConfigError
from trainer.evaluate.scorer import Scorer
from trainer.loop import train
from trainer.report import NullReporter, TrainResult

Configure = Callable[..., TrainConfig]
CHUNKS = {
    "evaluate.ttt": "chunks",
    "evaluate.ttt_chunk_tokens": 256,
    "evaluate.ttt_lr": 0.05,
    "evaluate.stride": 16,
}
DOCUMENTS = {
    "evaluate.ttt": "documents",
    "evaluate.ttt_doc_chunk_tokens": 16,
    "evaluate.ttt_doc_batch": 2,
    "evaluate.ttt_doc_lanes": 2,
    "evaluate.ttt_lora_rank": 2,
    "evaluate.ttt_lora_lr": 0.01,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact")


@pytest.fixture
def packed(configure: Configure, folder: Path) -> tuple[str, TrainResult]:  # noqa: F811
    """A file, and the run that made it; made once."""
    result = folder / "result.json"
    if not result.exists():
        result.write_text(train(configure(), NullReporter(), folder).model_dump_json())
    return str(folder / "artifact.bin"), TrainResult.model_validate_json(result.read_text())


def test_the_score_of_the_file_is_that_of_the_run_that_wrote_it(
    configure: Configure,  # noqa: F811
    packed: tuple[str, TrainResult],
    tmp_path: Path,
) -> None:
    path, made = packed
    reporter = Collector()
    result = train(configure(**{"source.artifact": path}), reporter, tmp_path)
    assert (result.val_bpb, result.val_loss) == (made.val_bpb, made.val_loss)
    assert (result.bytes_model, result.artifact_sha256) == (made.bytes_model, made.artifact_sha256)
    assert (result.steps, result.tokens, result.train_loss) == (0, 0, None)
    assert set(result.phases) == {"build", "restore", "prime", "evaluate"}
    assert reporter.of("step") == [] and list(tmp_path.iterdir()) == []
    assert (result.stages, result.skipped) == ({"quantized": made.val_bpb}, [])


def on_a_rank(group: Group, config: TrainConfig) -> TrainResult:
    return train(config, NullReporter())


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"evaluate.stride": 8}, "sliding"),
        (CHUNKS, "sliding+ttt"),
        ({**DOCUMENTS, "evaluate.ttt_lora_warm_start": True}, "lora_ttt"),
        (
            {**DOCUMENTS, "evaluate.ttt_phases": 1, "evaluate.ttt_prefix_docs": 1},
            "lora_ttt+phases",
        ),
    ],
    ids=["sliding", "chunks", "documents", "phases"],
)
def test_two_workers_give_the_number_of_one(
    configure: Configure,  # noqa: F811
    packed: tuple[str, TrainResult],
    changes: dict[str, Any],
    stage: str,
) -> None:
    path, made = packed
    config = configure(**{"source.artifact": path, "runtime.prime_steps": 0}, **changes)
    alone = train(config, NullReporter())
    first, second = run_ranks(on_a_rank, 2, config)
    assert alone.stages == {stage: alone.val_bpb}
    assert alone.skipped == ["quantized"]
    assert first.val_bpb == second.val_bpb
    assert first.val_bpb == pytest.approx(alone.val_bpb, rel=1e-6)
    assert first.val_tokens == alone.val_tokens == made.val_tokens
    assert alone.val_bpb != made.val_bpb


@pytest.mark.parametrize("changes", [CHUNKS, DOCUMENTS], ids=["chunks", "documents"])
def test_a_whole_run_scores_with_training_and_priming_leaves_no_trace(
    configure: Configure,  # noqa: F811
    packed: tuple[str, TrainResult],
    changes: dict[str, Any],
    tmp_path: Path,
) -> None:
    path, made = packed
    result = train(configure(**changes, **{"evaluate.stages": True}), NullReporter(), tmp_path)
    assert result.illegal == {}
    assert result.stages["quantized"] == made.val_bpb
    unprimed = configure(**{"source.artifact": path, "runtime.prime_steps": 0}, **changes)
    assert train(unprimed, NullReporter()).val_bpb == result.val_bpb


def test_a_run_for_a_score_makes_one_pass_and_says_which_it_skipped(
    configure: Configure,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []
    honest = Scorer.result
    monkeypatch.setattr(Scorer, "result", lambda self: passes.append(1) or honest(self))
    lean = {"evaluate.prequant": False, "average.kind": "ema", "average.decay": 0.5}
    result = train(configure(**lean, **CHUNKS), NullReporter())
    assert len(passes) == 1
    assert list(result.stages) == ["sliding+ttt"]
    assert result.skipped == ["trained", "averaged", "quantized"]
    passes.clear()
    result = train(configure(**{**lean, "evaluate.prequant": True}), NullReporter())
    assert len(passes) == 3 and result.skipped == []


def test_a_file_of_another_model_is_refused_with_both_named(
    configure: Configure,  # noqa: F811
    packed: tuple[str, TrainResult],
) -> None:
    config = configure(**{"source.artifact": packed[0], "model.num_layers": 3})
    with pytest.raises(
        ConfigError, match=r"artifact\.bin was made with model\.num_layers = 2 where this run has 3"
    ):
        train(config, NullReporter())


def fails(group: Group, config: TrainConfig) -> str:
    try:
        train(config, NullReporter())
    except ArtifactError as error:
        return str(error)
    return ""


def test_a_missing_file_is_an_error_on_every_rank(
    configure: Configure,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configure(**{"source.artifact": str(tmp_path / "none.bin")})
    assert all("none.bin: cannot be read" in said for said in run_ranks(fails, 2, config))


def test_a_run_starts_from_one_file() -> None:
    both = {"source.checkpoint": "a", "source.artifact": "b"}
    with pytest.raises(ConfigError, match=r"source\.checkpoint = 'a' and source\.artifact = 'b'"):
        TrainConfig().with_overrides(both)


def test_what_the_file_was_trained_with_is_judged(
    configure: Configure,  # noqa: F811
    tmp_path: Path,
) -> None:
    train(configure(**{"data.train_split": "val"}), NullReporter(), tmp_path)
    config = configure(**{"source.artifact": str(tmp_path / "artifact.bin")})
    result = train(config, NullReporter())
    assert list(result.illegal) == ["validation_training"]
    spec = TrialSpec("s", 0, "tiny", {}, config, tmp_path)
    assert Legality("laptop").before_launch(spec) is None
    verdict = Legality("laptop").after_finish(spec, result)
    assert verdict is not None and not verdict.ok and "data.train_split" in verdict.reason
    assert Legality("night").after_finish(spec, result) is None


def test_no_filter_stops_a_trial_that_only_scores(
    configure: Configure,  # noqa: F811
    packed: tuple[str, TrainResult],
    tmp_path: Path,
) -> None:
    config = configure(
        **{"source.artifact": packed[0], "budget.min_steps": 5, "budget.artifact_bytes": 60_000}
    )
    result = train(config, NullReporter())
    spec = TrialSpec("s", 0, "tiny", {}, config, tmp_path)
    for judge in default_filters(track="laptop"):
        verdicts = [judge.before_launch(spec), judge.while_running(spec, [])]
        judge.learn(config, result)
        verdicts += [judge.before_launch(spec), judge.after_finish(spec, result)]
        for verdict in verdicts:
            assert verdict is None or verdict.ok or verdict.name == "artifact_size", verdict
            assert verdict is None or not verdict.predicted, verdict


def test_a_sweep_takes_the_model_from_the_file_and_its_axes_from_nobody(
    configure: Configure,  # noqa: F811
    packed: tuple[str, TrainResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path(packed[0])
    monkeypatch.chdir(path.parent)
    space = SPACES["evaluation"]
    given = settings(space.base(), [f"source.artifact={path.name}", "evaluate.batch_tokens=4096"])
    assert given["source.artifact"] == str(path)
    overrides = settings_of_source(space.base(), given, space.axes) | given
    config = space.base().with_overrides(overrides)
    assert config.model == configure().model
    assert config.evaluate.batch_tokens == 4096
    assert not set(overrides) & set(space.axes)
    assert config.data.dir == space.base().data.dir
    assert settings_of_source(space.base(), {}, space.axes) == {}
