"""The report: parsed as a browser would, with hostile names, and read back against the study."""

from __future__ import annotations

import json
import shlex
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import mkdtemp

import optuna
import pytest

from service.cli import main
from service.commands.recipe_config import configured
from service.reports.page.charts import STYLE, trade_chart
from service.reports.page.page import draw_page, importances
from service.reports.study_view import view_trials
from service.reports.trade_picture import Point
from service.runners.fake_runner import FakeRun
from service.status import status_of
from service.study import CONFIRMS, load_study
from service.tracking.jsonl_tracker import JsonlTracker
from service.trial import TrialSpec
from tests.service_tests.sweeps import TRACK, Sweep

EVIL = "<script>alert('&')</script>\x1b[31m$\\frac"
VOID = ("meta", "br", "hr", "img", "link", "input")


class Page(HTMLParser):
    """Elements, text by element, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)
        if "tr" in self._open and self._open[-1] in ("span", "th"):
            self.rows[-1].append(data)


def script(spec: TrialSpec) -> FakeRun:
    depth = spec.config.model.num_layers
    return FakeRun(
        val_bpb=3.0 - 0.1 * depth + 0.01 * spec.number, bytes_model=60_000 + 9_000 * depth
    )


@cache
def swept() -> Path:
    """A folder with the study "s": rejected, stopped, infeasible and feasible trials."""
    folder = Path(mkdtemp(prefix="caddie-report-"))
    (folder / "s").mkdir()
    Sweep(folder, script, num_trials=9, trackers=[_Entries()]).run()
    return folder


class _Entries(JsonlTracker):
    """Writes tracking.json, as the MLflow tracker does."""

    def __init__(self) -> None:
        super().__init__(Path(mkdtemp()) / "trials.jsonl")

    def trial_started(self, spec: TrialSpec) -> None:
        from service.tracking.outbox import open_entry

        open_entry(spec)


def page_of(name: str | None = None, price: float = 0.0) -> str:
    study = load_study("s", f"sqlite:///{swept() / 'caddie.db'}")
    status = status_of(study)
    trials = view_trials(study, swept() / "s")
    if name is not None:
        study.study_name = name
        status = type(status)(**{**status.__dict__, "study": name})
    return draw_page(study, trials, status, TRACK.artifact_bytes, price)


def test_the_page_stands_alone_and_is_well_formed() -> None:
    text = page_of()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    loads = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all((value or "").startswith("#") for value in loads)
    assert "url(http" not in text and "@import" not in text
    assert ("name", "viewport") in page.attributes
    assert text.count("<svg") == 3 and text.count('role="img"') == 3
    assert len(text) < 400_000


def test_the_page_says_what_the_study_says() -> None:
    study = load_study("s", f"sqlite:///{swept() / 'caddie.db'}")
    trials = view_trials(study, swept() / "s")
    page = Page(page_of(price=3.0))
    first = next(row for row in page.rows if row and row[0] == "1")
    best = min(t.value for t in trials if t.is_feasible and t.value is not None)
    assert f"{best:,.4f}" in first
    rejected = [t for t in trials if t.outcome.verdict == "rejected before launch"]
    assert rejected
    for trial in rejected:
        row = next(r for r in page.rows if r[:2] == [str(trial.number), trial.outcome.verdict])
        assert row[-1] == trial.outcome.reason and row[2] == "artifact_size"
        assert row[4] == "16"  # 8 s of two workers
    spent = status_of(study).gpu_seconds
    ledger = next(row for row in page.rows if row and row[0] == "spent on training")
    assert ledger[1:] == [
        f"{spent.spent:,.0f}",
        f"{spent.spent / 3600:,.3f}",
        f"{spent.spent / 1200:,.2f}",
    ]


def test_the_replay_command_gives_the_best_trial_s_configuration() -> None:
    page = Page(page_of())
    commands = "".join(page.texts["pre"]).splitlines()
    words = shlex.split(next(line for line in commands if line.startswith("caddie train")))
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    config, _ = configured(words[2], sets, int(words[words.index("--seed") + 1]))
    study = load_study("s", f"sqlite:///{swept() / 'caddie.db'}")
    number = int(commands[0].split()[-1])
    assert config.digest() == study.trials[number].user_attrs["digest"]
    assert words[words.index("--nproc") + 1] == "2"


def test_hostile_text_stays_text() -> None:
    page = Page(page_of(EVIL))
    assert "script" not in page.tags
    assert "<script>alert('&')</script>[31m$\\frac" in "".join(page.texts["h1"])
    assert "\x1b" not in page_of(EVIL)


def test_charts_take_any_text_and_no_data() -> None:
    points = [Point(0, 10, 2.0, True), Point(1, 20, 1.9, True), Point(2, 30, 1.8, False)]
    svg = trade_chart(points, 25)
    assert "cap 25" in svg and "breaks a constraint" in svg
    assert trade_chart(points[:1], 25) == ""
    assert STYLE["text.parse_math"] is False


def test_importances_name_the_axis_that_matters_and_leave_seeds_out() -> None:
    study = optuna.create_study()
    axis = optuna.distributions.FloatDistribution(0, 1)
    seeds = optuna.distributions.IntDistribution(0, 100)
    study.set_user_attr("axes", {"a": "", "b": ""})
    for i in range(12):
        a, b = (i % 4) / 4, (i % 3) / 3
        params, distributions = {"a": a, "b": b}, {"a": axis, "b": axis}
        if i > 8:
            params["runtime.seed"], distributions["runtime.seed"] = i, seeds
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=distributions,
                value=a,
                user_attrs={CONFIRMS: "x"} if i > 8 else {},
            )
        )
    found = importances(study)
    assert set(found) == {"a", "b"} and found["a"] > 0.8


def test_the_command_writes_the_file_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "s.html"
    runs = ("--runs", str(swept()))
    assert main(["report", "s", "--out", str(file), *runs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(file)}
    Page(file.read_text())
    assert main(["report", "s", "--out", str(tmp_path), *runs]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["report", "t", "--out", str(file), *runs]) == 2
    assert "no study 't'" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small_disk / "s.html"
    file.write_text("the earlier page")
    (small_disk / "ballast").write_bytes(bytes(48 * 1024))
    assert main(["report", "s", "--out", str(file), "--runs", str(swept())]) == 1
    assert "free some space" in capsys.readouterr().err
    assert file.read_text() == "the earlier page"
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "s.html"]
