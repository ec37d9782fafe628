"""Where a run's numbers go: metrics.jsonl always, TensorBoard, Weights & Biases and MLflow by config."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fedloom.protocols.config import RunConfig
from fedloom.server.disk import write_whole

METRICS_FILE = "metrics.jsonl"
PER_DEVICE = ("devices", "assigned")  # tables with a line for each device


class Tracker(Protocol):
    """Takes one record a round."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """One JSON object a line; lines past the round that a run resumes from are dropped first."""

    def __init__(self, path: Path, *, after_round: int | None) -> None:
        kept: list[str] = []
        if after_round is not None and path.exists():
            kept = [
                line
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
                if _round_of(line) <= after_round
            ]
        write_whole(path, "".join(f"{line}\n" for line in kept).encode())  # a cut or a full disk loses no line
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, sort_keys=True) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _round_of(line: str) -> float:
    """The round of a line; infinite for a line that a crash cut short."""
    try:
        return float(json.loads(line)["round"])
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return float("inf")


class TensorBoardTracker:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path, *, after_round: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if after_round is None else after_round + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["round"])

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Scalars for Weights & Biases."""

    def __init__(self, config: RunConfig, run: str) -> None:
        wandb = _installed("wandb", "track.wandb_project")
        self._run = wandb.init(
            project=config.track.wandb_project, name=config.name, id=run, resume="allow", config=config.model_dump()
        )

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(scalars(record), step=record["round"])

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """Scalars for MLflow."""

    def __init__(self, config: RunConfig, run: str) -> None:
        self._mlflow = _installed("mlflow", "track.mlflow_uri")
        self._mlflow.set_tracking_uri(config.track.mlflow_uri)
        self._mlflow.set_experiment(config.name)
        self._mlflow.start_run(run_name=f"{config.name}-{run}")

    def log(self, record: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics(scalars(record), step=record["round"])

    def close(self) -> None:
        self._mlflow.end_run()


def open_trackers(config: RunConfig, folder: Path, run: str, *, after_round: int | None = None) -> list[Tracker]:
    """All trackers that a recipe asks for.

    Raises:
        ValueError: when it asks for one whose package is not installed.
    """
    trackers: list[Tracker] = [JsonlTracker(folder / METRICS_FILE, after_round=after_round)]
    if config.track.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", after_round=after_round))
    if config.track.wandb_project:
        trackers.append(WandbTracker(config, run))
    if config.track.mlflow_uri:
        trackers.append(MlflowTracker(config, run))
    return trackers


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """A record's numbers by slashed name, per-device tables left out (they belong to the report)."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping) and name not in PER_DEVICE:
            flat.update(scalars(value, f"{prefix}{name}/"))
        elif isinstance(value, int | float) and name != "round":
            flat[f"{prefix}{name}"] = float(value)
    return flat


def _installed(package: str, key: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"recipe key {key!r} needs the package {package!r}: pip install {package}") from None
