"""The code of docs/add-a-strategy.md does what the page says, loaded as a third party's would be."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from fedloom.protocols.messages import LowRank, MatrixSpec, ModelSpec, Payload, Update
from fedloom.strategies import registry
from fedloom.strategies.base import Scaling

PAGE = Path(__file__).parents[2] / "docs" / "add-a-strategy.md"


@pytest.fixture
def voices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The strategy's name, once the page's code is importable and its entry point is known."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    (tmp_path / "voices_page.py").write_text(found[1])
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint(name="voices", value="voices_page:Voices", group="fedloom.strategies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.delitem(sys.modules, "voices_page", raising=False)
    return "voices"


def test_the_page_says_forty_lines_and_means_it() -> None:
    found = re.search(r"(@dataclass.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    assert len(found[1].strip().splitlines()) <= 40


def test_it_is_listed_with_its_options(voices: str) -> None:
    assert voices in registry.names()
    assert (voices, "FLoRA in which a device's vote is its number of examples to a power.") in registry.describe()
    assert registry.options(voices) == [("power", 0.5, "0: every device alike; 1: by number of examples.")]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_it_computes_what_it_says(voices: str, power: float) -> None:
    spec = ModelSpec(base_hash="h", matrices={"m": MatrixSpec(d_out=9, d_in=7)})
    generator = np.random.default_rng(0)
    updates = [
        Update(
            device=f"d{k}",
            round=1,
            examples=examples,
            payload=Payload(
                factors={
                    "m": LowRank(
                        b=generator.normal(size=(9, rank)), a=generator.normal(size=(rank, 7)), alpha=2.0 * rank
                    )
                }
            ),
        )
        for k, (examples, rank) in enumerate([(5, 2), (50, 1), (500, 4)])
    ]
    strategy = registry.build(voices, {"power": power}, Scaling())
    state = strategy.aggregate(strategy.init(spec, 0), updates)
    votes = np.array([update.examples for update in updates], dtype=np.float64) ** power
    exact = sum(v * u.payload.factors["m"].dense() for v, u in zip(votes / votes.sum(), updates, strict=True))
    total = strategy.adapter(state)
    got = total.factors["m"].dense() if "m" in total.factors else total.dense["m"]
    np.testing.assert_allclose(got, exact, atol=1e-6)
    patch = strategy.catch_up(state, 0)
    assert patch is not None
    assert patch.version == 1
