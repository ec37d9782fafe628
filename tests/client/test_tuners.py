"""The registry of local algorithms: those that train factors, and those that answer with scalars."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from fedloom.client import tuners
from fedloom.client.subspace import subspace
from fedloom.client.training import tune
from fedloom.client.zeroth_order import zeroth_order

FACTORS = "fedloom.client.training:tune"
SCALARS = "fedloom.client.zeroth_order:zeroth_order"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed packages that offer a tuner of either kind, and two that cannot be loaded."""
    points = [
        EntryPoint(name="mine", value=FACTORS, group=tuners.GROUP),
        EntryPoint(name="broken", value="no.such.module:tune", group=tuners.GROUP),
        EntryPoint(name="my_scalars", value=SCALARS, group=tuners.SCALAR_GROUP),
        EntryPoint(name="torn", value="fedloom.client.training:none", group=tuners.SCALAR_GROUP),
    ]
    monkeypatch.setattr(tuners, "entry_points", lambda group: [point for point in points if point.group == group])


def test_names_and_descriptions() -> None:
    assert tuners.get("lora") is tune
    assert tuners.get_scalar("zeroth_order") is zeroth_order
    assert tuners.get_scalar("subspace") is subspace
    assert {"lora", "subspace", "zeroth_order"} <= set(tuners.names())
    assert tuners.names() == sorted(tuners.names())
    described = dict(tuners.describe())
    assert described["lora"].startswith("LoRA by backpropagation")
    assert described["zeroth_order"].startswith("Zeroth-order tuning by seeds")
    assert described["subspace"].startswith("First-order tuning in a sketch")
    assert set(tuners.FORWARD_ONLY) <= set(tuners.names())
    for name in tuners.names():
        tuners.known(name)


def test_an_unknown_name() -> None:
    for find in (tuners.get, tuners.get_scalar, tuners.known):
        with pytest.raises(ValueError, match="unknown tuner 'lroa': did you mean 'lora'"):
            find("lroa")
        with pytest.raises(ValueError, match="unknown tuner 'zeroth_ordre': did you mean 'zeroth_order'"):
            find("zeroth_ordre")


def test_a_tuner_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match=r"must have a tuner of factors \(lora.*\), got 'zeroth_order'"):
        tuners.get("zeroth_order")
    with pytest.raises(ValueError, match=r"must have a tuner of scalars \(zeroth_order, subspace.*\), got 'lora'"):
        tuners.get_scalar("lora")


@pytest.mark.usefixtures("plugins")
def test_plugins() -> None:
    assert tuners.names() == ["broken", "lora", "mine", "my_scalars", "subspace", "torn", "zeroth_order"]
    assert tuners.get("mine") is tune
    assert tuners.get_scalar("my_scalars") is zeroth_order
    for find in (tuners.get, tuners.known):
        with pytest.raises(ValueError, match=r"tuner 'broken' \(no.such.module:tune\) cannot be loaded"):
            find("broken")
    for find in (tuners.get_scalar, tuners.known):
        with pytest.raises(ValueError, match=r"tuner 'torn' \(fedloom.client.training:none\) cannot be loaded"):
            find("torn")
    tuners.known("mine")
    tuners.known("my_scalars")


@pytest.mark.usefixtures("plugins")
def test_a_plugin_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match=r"a tuner of factors \(lora, mine, broken\), got 'my_scalars'"):
        tuners.get("my_scalars")
    with pytest.raises(ValueError, match=r"of scalars \(zeroth_order, subspace, my_scalars, torn\), got 'mine'"):
        tuners.get_scalar("mine")
