"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedloom.cli.main import main

Fedloom = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fedloom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fedloom:
    """Runs a command line; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedloom", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
