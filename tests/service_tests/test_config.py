"""Where settings come from, and what a wrong one says."""

from pathlib import Path

import pytest

from service.commands.sweep_driver import make_runner
from service.config import ServiceSettings, load_settings, mask_passwords, nearest
from service.errors import UsageError


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "caddie.toml"


def test_no_file_means_defaults(toml: Path) -> None:
    settings = load_settings()
    assert settings == ServiceSettings()
    assert settings.storage_url == f"sqlite:///{toml.parent}/caddie-runs/caddie.db"


def test_command_line_beats_file_beats_environment_beats_default(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml.write_text('trials = 5\nseed = 3\naddress = "ray://file"\n')
    monkeypatch.setenv("RAY_ADDRESS", "ray://env")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    settings = load_settings({"trials": 9, "seed": None})
    assert (settings.trials, settings.seed) == (9, 3)
    assert (settings.address, settings.tracking_uri) == ("ray://file", "http://env")
    assert settings.max_attempts == 2


def test_faults_of_the_file_are_listed_together_with_file_key_and_remedy(toml: Path) -> None:
    toml.write_text('trails = 5\nworkers_per_trial = "two"\n[tracks.mine]\nartifact_byte = 5\n')
    with pytest.raises(UsageError) as caught:
        load_settings()
    lines = str(caught.value).splitlines()
    assert lines[0] == "caddie.toml: trails: no such setting; did you mean trials, tracks?"
    assert "caddie.toml: workers_per_trial = 'two': " in lines[1]
    assert lines[2] == (
        "caddie.toml: tracks.mine.artifact_byte: no such setting; did you mean artifact_bytes?"
    )


def test_folders_may_stand_in_the_file(toml: Path) -> None:
    toml.write_text('out = "my-runs"\ndata = "data/mine"\n')
    settings = load_settings()
    assert (settings.out, settings.data) == (Path("my-runs"), Path("data/mine"))


def test_links_point_to_where_people_look(toml: Path) -> None:
    assert load_settings().mlflow_page == "http://127.0.0.1:5000"
    toml.write_text('tracking_uri = "http://me:secret@mlflow:5000/"\n')
    assert load_settings().mlflow_page == "http://me:***@mlflow:5000"
    toml.write_text('tracking_uri = "http://mlflow:5000"\nmlflow_url = "https://m.example/"\n')
    assert load_settings().mlflow_page == "https://m.example"


def test_broken_toml_and_missing_file(toml: Path) -> None:
    toml.write_text("trials = = 5\n")
    with pytest.raises(UsageError, match=r"caddie\.toml: not valid TOML.*line 1"):
        load_settings()
    with pytest.raises(UsageError, match=r"other\.toml: no such file"):
        load_settings(file=Path("other.toml"))


def test_users_track_stands_beside_the_built_in_ones(toml: Path) -> None:
    toml.write_text("[tracks.mine]\nartifact_bytes = 1000\ntrain_seconds = 5\n")
    settings = load_settings()
    assert settings.track("mine").budget().artifact_bytes == 1000
    assert settings.track("laptop").name == "laptop"
    with pytest.raises(UsageError, match=r"no track 'labtop'; did you mean laptop\?"):
        settings.track("labtop")


def test_nearest_lists_all_when_nothing_is_near() -> None:
    assert nearest("zzz", ["smoke", "iha"]) == "there are smoke, iha"
    assert nearest("zzz", []) == "there are none"


def test_mask_passwords() -> None:
    text = "to postgresql://me:s3cr:et@db:5432/x and http://a:b@c, not http://d:80/e"
    assert mask_passwords(text) == (
        "to postgresql://me:***@db:5432/x and http://a:***@c, not http://d:80/e"
    )


def test_isolation_comes_from_the_file_and_needs_ray(tmp_path: Path) -> None:
    file = tmp_path / "caddie.toml"
    file.write_text('isolation = "resident"\ntrials_per_gang = 7\nrunner = "local"\n')
    settings = load_settings({}, file)
    assert (settings.isolation, settings.trials_per_gang) == ("resident", 7)
    with pytest.raises(UsageError, match=r"'resident' needs runner = 'ray'.*leave one"):
        make_runner(settings)
    with pytest.raises(UsageError, match="isolation"):
        load_settings({"isolation": "process"})
