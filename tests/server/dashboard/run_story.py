"""A run's folder as a server fills it, told by the server's own event log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedloom.protocols.messages import DeviceReport
from fedloom.server.events import EventLog


class Story:
    """A run of pretend devices; each chapter is one call."""

    def __init__(self, out: Path, devices: list[str], *, rounds: int = 4) -> None:
        self.out, self.devices, self.rounds, self.done = out, devices, rounds, -1
        out.mkdir(parents=True, exist_ok=True)
        self.log = EventLog(out / "events.jsonl")

    def begin(self, *, after: int = -1) -> Story:
        nodes = [str(1000 + index) for index in range(len(self.devices))]
        self.log.began(round=0, rounds=self.rounds, phase="hello", devices=nodes)
        for rank, device in enumerate(self.devices, 1):
            self.log.answered(round=0, phase="hello", device=device, size=1400, down=0, seconds=0.0, refused="")
            self.log.joined(
                report=DeviceReport(device=device, examples=100 * rank, rank=rank, software="fedloom 0.1.0")
            )
        about = {"run": "0123456789abcdef", "name": "kitchen", "strategy": "fedloom"}
        self.log.started(**about, round=after, rounds=self.rounds, devices=self.devices)
        self.done = after
        return self

    def ask(self, round: int, phase: str = "train") -> Story:
        self.log.began(round=round, rounds=self.rounds, phase=phase, devices=self.devices)
        return self

    def answer(
        self,
        round: int,
        device: str,
        *,
        phase: str = "train",
        size: int = 1000,
        down: int = 2500,
        seconds: float = 1.5,
        refused: str = "",
    ) -> Story:
        told = {"size": size, "down": down, "seconds": seconds, "refused": refused}
        self.log.answered(round=round, phase=phase, device=device, **told)
        return self

    def end(self, round: int, **changes: Any) -> Story:
        record = self.record(round) | changes
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.log.ended(record=record)
        self.done = round
        return self

    def record(self, round: int) -> dict[str, Any]:
        trained = {"train_loss": 2.0 - 0.3 * round, "updates": len(self.devices)} if round else {}
        return {
            "round": round,
            **trained,
            "seconds": 12.5,
            "bytes_up": 1_000_000 * round,
            "bytes_down": 2_500_000 * round,
            "bytes_evaluation": 10_000 * (round + 1),
            "refused": 0,
            "evaluation": {"exact_match": 0.3 + 0.1 * round, "loss": 1.9 - 0.2 * round},
            "devices": {device: {"n": 30.0} for device in self.devices},
        }

    def whole_round(self, round: int) -> Story:
        self.ask(round, "train" if round else "evaluate")
        for device in self.devices:
            self.answer(round, device, phase="train" if round else "evaluate")
        return self.end(round)

    def recipe(self, **changes: Any) -> Story:
        recipe: dict[str, Any] = {
            "name": "kitchen",
            "seed": 7,
            "model": {"path": "embedded", "task": "causal", "dtype": "float32"},
            "strategy": {"name": "fedloom"},
            "train": {"tuner": "auto", "optimizer": "adamw", "lr": 0.003, "steps": 8, "batch_size": 4},
            "server": {"rounds": self.rounds, "cohort": 0, "min_updates": 2, "timeout": 600.0},
            "track": {"mlflow_uri": "https://user:hunter2@tracker.example"},
            "eval": {"every": 1, "metric": "auto"},
        }
        (self.out / "recipe.json").write_text(json.dumps(recipe | changes), encoding="utf-8")
        return self
