"""Three rounds of the embedded recipe against committed values (see golden/make.py)."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

MAKE = Path(__file__).parent / "golden" / "make.py"


def test_three_rounds_give_the_golden_values(tmp_path: Path) -> None:
    made = runpy.run_path(str(MAKE))
    golden = json.loads(made["GOLDEN"].read_text(encoding="utf-8"))
    got = made["measure"](tmp_path / "run")
    assert got["base_hash"] == golden["base_hash"]
    assert got["patch_norm"] == pytest.approx(golden["patch_norm"], rel=0.02)
    for one, other in zip(got["rounds"], golden["rounds"], strict=True):
        assert (one["bytes_up"], one["bytes_down"]) == (other["bytes_up"], other["bytes_down"])
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)
        assert one["exact_match"] == pytest.approx(other["exact_match"], abs=0.05)
