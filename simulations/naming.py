"""What a run is called and judged by. Needs no torch, so that a server starts fast."""

from __future__ import annotations

import hashlib
import json

from fedloom.protocols.config import RunConfig

_NOT_THE_RESULT = {"about", "compare", "simulation", "track", "name"}  # keys that change no number of a run


def run_name(config: RunConfig) -> str:
    """A name that two recipes share only if they give the same run, whatever the number of rounds or workers.

    A learning rate that falls over the rounds makes their number part of the run.
    """
    table = config.model_dump(mode="json", exclude=_NOT_THE_RESULT)
    if config.train.schedule == "constant":
        del table["server"]["rounds"]
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def main_metric(config: RunConfig) -> str:
    """What a recipe's runs are judged by."""
    if config.eval.metric != "auto":
        return config.eval.metric
    return "accuracy" if config.model.task == "classify" else "exact_match"
