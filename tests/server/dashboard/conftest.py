"""A run's folder, a dashboard of it on a free port, and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Browser
from run_story import Story

from fedloom.server.dashboard.serving import Dashboard


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "out", ["hospital-a", "hospital-b", "clinic"])


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[Dashboard]:
    """Serves tmp_path/out, which need not exist."""
    with Dashboard(tmp_path / "out", "127.0.0.1", 0, period=0.05) as running:
        yield running


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Serves a folder with nothing in it, for many tests."""
    with Dashboard(tmp_path_factory.mktemp("idle"), "127.0.0.1", 0) as running:
        yield running


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    chromium = Browser(tmp_path / "profile")
    yield chromium
    chromium.close()
