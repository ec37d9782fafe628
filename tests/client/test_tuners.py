"""The registry of local algorithms."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from fedloom.client import tuners
from fedloom.client.training import tune


def test_names_and_descriptions() -> None:
    assert tuners.get("lora") is tune
    assert "lora" in tuners.names()
    assert dict(tuners.describe())["lora"].startswith("LoRA by backpropagation")


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown tuner 'lroa': did you mean 'lora'"):
        tuners.get("lroa")


def test_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint(name="mine", value="fedloom.client.training:tune", group=tuners.GROUP),
        EntryPoint(name="broken", value="no.such.module:tune", group=tuners.GROUP),
    ]
    monkeypatch.setattr(tuners, "entry_points", lambda group: points)
    assert tuners.names() == ["broken", "lora", "mine"]
    assert tuners.get("mine") is tune
    with pytest.raises(ValueError, match=r"tuner 'broken' \(no.such.module:tune\) cannot be loaded"):
        tuners.get("broken")
