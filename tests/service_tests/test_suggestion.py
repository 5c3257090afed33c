"""Every proposal of a sweep can be asked for again from what its storage holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli import main
from service.errors import UsageError
from service.sampler import ASKED
from service.study import load_study
from service.suggestion import CONFIRMING, ENQUEUED, MODELLED, RANDOM, suggest_again
from service.trial import TrialSpec
from tests.service_tests.sweeps import BREAKS, DIVERGES, FakeRun, Sweep

pytestmark = pytest.mark.filterwarnings("ignore")


def fates(spec: TrialSpec) -> FakeRun:
    """Some diverge and some fail; ends come in another order than asks."""
    if spec.number % 7 == 5:
        return DIVERGES
    if spec.number % 6 == 3:
        return BREAKS
    layers = spec.config.model.num_layers
    return FakeRun(val_bpb=3.0 - 0.1 * layers, train_s=8.0 - (spec.number % 3))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sweep of two drivers, of which the first was interrupted with trials in flight."""
    folder = tmp_path_factory.mktemp("sweep")
    limits = {"max_rejections": 999, "max_failures": 999}
    first = Sweep(folder, fates, num_trials=40, slots=3, **limits)
    first.steps(60)
    first.scheduler.close()
    Sweep(folder, fates, num_trials=40, slots=3, start_at=500.0, **limits).run()
    return first.url


def test_every_trial_is_proposed_again_with_the_same_parameters(stored: str) -> None:
    study = load_study("s", stored)
    found = [suggest_again(study, number) for number in range(len(study.get_trials()))]
    assert [each.number for each in found if each.same is False] == []
    origins = [each.origin for each in found]
    assert origins[0] == ENQUEUED and origins.count(MODELLED) > 15 and RANDOM in origins
    assert max(each.running for each in found) == 2


def test_a_history_that_was_changed_gives_other_parameters(stored: str) -> None:
    study = load_study("s", stored)
    last = len(study.get_trials()) - 1
    trials = study.get_trials(deepcopy=False)
    best = min((t for t in trials if t.value is not None), key=lambda t: t.value)
    best._params["optim.tied_embed_lr"] = 3.9
    assert suggest_again(study, last).same is False


def test_what_no_sampler_proposed_is_said_so(stored: str) -> None:
    study = load_study("s", stored)
    trials = study.get_trials(deepcopy=False)
    trials[4].user_attrs["confirms"] = 1
    del trials[4].system_attrs[ASKED]
    assert suggest_again(study, 4).origin == CONFIRMING
    del trials[5].system_attrs[ASKED]
    with pytest.raises(UsageError, match="an earlier version asked for it"):
        suggest_again(study, 5)
    with pytest.raises(UsageError, match="has no trial 999; its trials are 0 to"):
        suggest_again(study, 999)


def test_explain_on_the_command_line(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--storage", stored, "--out", str(tmp_path))
    assert main(["trial", "explain", "s", "12", *where, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["same"] is True and answer["again"] == answer["params"]
    assert main(["trial", "explain", "s", "12", *where]) == 0
    assert "the same" in capsys.readouterr().out
