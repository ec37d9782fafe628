"""A real agent: its own process for the model, a real socket, real files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stages import Stage, make_settings

from fedloom.client.agent.agent import running
from fedloom.client.agent.home import Home
from fedloom.client.data import Example


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, examples: list[Example]) -> Iterator[Stage]:
    """One agent for the tests that leave it as they found it."""
    settings = make_settings(tmp_path_factory.mktemp("stage"), tiny_llama, examples)
    home = Home(folder=settings.folder)
    with running(settings, home) as agent:
        yield Stage(settings=settings, home=home, agent=agent)
