"""Where the parts of a study are: one place that turns settings into paths and URLs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from service.config import ServiceSettings, with_driver

if TYPE_CHECKING:
    import optuna


def study_dir(settings: ServiceSettings, study: str) -> Path:
    """The folder of a study: its trials and trials.jsonl."""
    return settings.out.absolute() / study


def tracking_uri(settings: ServiceSettings) -> str:
    """The MLflow store in use; by default SQLite beside the studies."""
    if settings.tracking_uri:
        return with_driver(settings.tracking_uri)
    return f"sqlite:///{settings.out.absolute() / 'mlflow.db'}"


def artifact_root(settings: ServiceSettings) -> str | None:
    """Where a local MLflow store keeps files; None = as its server decides."""
    if tracking_uri(settings).startswith(("http://", "https://", "databricks")):
        return None
    return (settings.out.absolute() / "mlartifacts").as_uri()


def dashboard_page(settings: ServiceSettings, study: optuna.Study) -> str:
    """Address of a study in optuna-dashboard, for people."""
    return f"{settings.dashboard_url.rstrip('/')}/dashboard/studies/{study._study_id}"
