from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

import pytest

from fedloom.strategies import registry
from fedloom.strategies.base import Scaling, Strategy
from fedloom.strategies.local import Local


def test_every_strategy_is_described_and_documents_each_option():
    described = dict(registry.describe())
    assert list(described) == registry.names()
    assert {"fedloom", "flora", "flexlora", "hetlora", "fedit", "ffa", "local"} <= described.keys()
    for name in registry.names():
        assert described[name].endswith(".")
        assert "\n" not in described[name]
        for option, default, doc in registry.options(name):
            assert doc.endswith("."), (name, option)
            assert registry.build(name, {option: default}, Scaling()) is not None


def test_build_passes_options_and_scaling():
    scaling = Scaling(alpha=16.0, rslora=True)
    strategy = registry.build("fedloom", {"rank_cap": 4, "server_lr": 1, "start": "fresh"}, scaling)
    assert isinstance(strategy, Strategy)
    assert (strategy.rank_cap, strategy.server_lr, strategy.start, strategy.scaling) == (4, 1, "fresh", scaling)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("flroa", {}, "unknown strategy 'flroa': did you mean 'flora'"),
        ("fedloom", {"rank_cpa": 4}, "unknown option 'rank_cpa' of strategy fedloom: did you mean 'rank_cap'"),
        ("fedloom", {"scaling": Scaling()}, "unknown option 'scaling'"),
        ("local", {"rank": 4}, "unknown option 'rank' of strategy local: it has none"),
        (
            "fedloom",
            {"rank_cap": "4"},
            "option 'rank_cap' of strategy fedloom: input should be a valid integer, got '4'",
        ),
        ("fedloom", {"rank_cap": True}, "valid integer, got True"),
        ("fedloom", {"energy": "all"}, "option 'energy'"),
        ("fedloom", {"error_feedback": 1}, "option 'error_feedback'"),
        ("fedloom", {"start": "random"}, "option 'start'"),
        ("fedloom", {"rank_cap": 0}, "rank_cap must be >= 1"),
        ("fedloom", {"energy": 1.5}, "energy must be in"),
        ("hetlora", {"weights": "size"}, "option 'weights'"),
        ("hetlora", {"rank": -1}, "rank must be >= 0"),
        ("fedit", {"rank": -1}, "rank must be >= 0"),
        ("flora", {"server_optimizer": "fedadam"}, "got flora"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(name, options, match):
    with pytest.raises(ValueError, match=match):
        registry.build(name, options, Scaling())


@dataclass(frozen=True, kw_only=True)
class Guest(Local):
    """A guest strategy."""

    knob: int = field(default=3, metadata={"doc": "A knob."})


@dataclass(frozen=True, kw_only=True)
class Hollow:
    """Not a strategy."""

    scaling: Scaling = field(default=Scaling())


def test_other_packages_add_strategies_through_an_entry_point(monkeypatch):
    points = [EntryPoint(name=n, value=f"{__name__}:{n}", group=registry.GROUP) for n in ("Guest", "Hollow", "names")]
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points if group == registry.GROUP else [])
    assert "Guest" in registry.names()
    assert registry.options("Guest") == [("knob", 3, "A knob.")]
    assert registry.build("Guest", {"knob": 5}, Scaling()) == Guest(knob=5)
    with pytest.raises(ValueError, match="must answer the Strategy protocol, got Hollow"):
        registry.build("Hollow", {}, Scaling())
    monkeypatch.setattr(
        registry, "entry_points", lambda *, group: [EntryPoint("f", "fedloom.strategies.lowrank:add", group)]
    )
    with pytest.raises(ValueError, match="must be a dataclass"):
        registry.build("f", {}, Scaling())
