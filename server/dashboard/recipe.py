"""What a recipe asks for, in a few lines; read from JSON as it stands, so that any version's recipe can be shown.

Only what is named here is shown: a recipe may hold addresses with passwords, of trackers for instance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.server.dashboard.fields import clean, table_of
from fedloom.server.units import Metric, human_seconds, plural

OPTION_LIMIT = 12


def metric_of(recipe: Mapping[str, Any]) -> Metric:
    """What the run is judged by."""
    key = table_of(recipe, "eval").get("metric", "auto")
    if key == "auto" or not isinstance(key, str):
        key = "accuracy" if table_of(recipe, "model").get("task") == "classify" else "exact_match"
    return Metric(key=clean(key, 32))


def summary(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labels and what they are set to; what a recipe does not say is left out."""
    if not recipe:
        return []
    strategy, model, lora = table_of(recipe, "strategy"), table_of(recipe, "model"), table_of(recipe, "lora")
    train, server, wire = table_of(recipe, "train"), table_of(recipe, "server"), table_of(recipe, "wire")
    options = [f"{clean(key, 32)} {value(strategy, key)}" for key in list(strategy)[:OPTION_LIMIT] if key != "name"]
    lines = [
        ("About", value(recipe, "about")),
        ("Strategy", _join(value(strategy, "name"), *options)),
        ("Base model", _join(value(model, "path"), value(model, "task"), value(model, "dtype"))),
        ("Adapter", _join(_targets(lora), _said("alpha {}", lora, "alpha"))),
        ("Tuner", _join(_tuner(train), value(train, "optimizer"), _said("learning rate {}", train, "lr"))),
        ("Work in a round", _join(_said("{} steps", train, "steps"), _said("batches of {}", train, "batch_size"))),
        ("Cohort", _cohort(server)),
        ("Waits", _waits(server)),
        ("On the wire", _join(_said("up {}", wire, "up"), _said("down {}", wire, "down"))),
        ("Evaluation", _evaluation(recipe)),
        ("Seed", value(recipe, "seed")),
    ]
    return [(label, text) for label, text in lines if text]


def value(table: Mapping[str, Any], key: str) -> str:
    """A setting as text; empty where it is not set."""
    found = table.get(key)
    if isinstance(found, list):
        return clean(", ".join(str(part) for part in found[:OPTION_LIMIT]))
    if isinstance(found, dict) or found is None:
        return ""
    return clean(f"{found:g}" if isinstance(found, float) else str(found), 200)


def _said(form: str, table: Mapping[str, Any], key: str) -> str:
    found = value(table, key)
    return form.format(found) if found else ""


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _targets(lora: Mapping[str, Any]) -> str:
    return "on every linear layer" if lora.get("targets") == "auto" else _said("on {}", lora, "targets")


def _tuner(train: Mapping[str, Any]) -> str:
    return "the strategy's own" if train.get("tuner") == "auto" else value(train, "tuner")


def _cohort(server: Mapping[str, Any]) -> str:
    size, least, over = server.get("cohort"), server.get("min_updates"), server.get("over_select")
    if not isinstance(size, int):
        return ""
    drawn = plural(size, "device") if size else "all devices"
    more = f"{value(server, 'over_select')} times as many asked" if isinstance(over, int | float) and over > 1 else ""
    return _join(drawn, more, f"at least {plural(least, 'update')}" if isinstance(least, int) else "")


def _waits(server: Mapping[str, Any]) -> str:
    timeout = server.get("timeout")
    return f"{human_seconds(timeout)} for an answer" if isinstance(timeout, int | float) else ""


def _evaluation(recipe: Mapping[str, Any]) -> str:
    every = table_of(recipe, "eval").get("every")
    if not isinstance(every, int):
        return ""
    when = {0: "before the first round and after the last", 1: "after every round"}.get(
        every, f"after every {every} rounds"
    )
    return f"{metric_of(recipe).title}, {when}"
