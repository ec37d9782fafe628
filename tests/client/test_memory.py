"""Peak memory over a stretch of work."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from fedloom.client import memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can start a new stretch")
def test_a_peak_is_seen_and_forgotten() -> None:
    if not memory.reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    before = memory.peak_rss()
    block = np.ones(48 * 2**20, np.uint8)
    del block
    assert memory.peak_rss() - before > 40 * 2**20
    memory.reset_peak()
    assert memory.peak_rss() - before < 24 * 2**20


def test_without_proc_the_peak_is_of_the_whole_life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "none")
    assert not memory.reset_peak()
    assert memory.peak_rss() > 2**24
