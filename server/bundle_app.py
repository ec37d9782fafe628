"""The app that a run sends through Flower: names of modules and nothing else, so that each side runs what it installed.

The same version of the package gives the same bytes, so that a device can know the app by its hash.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

NAME = "fedloom-run"
PUBLISHER = "fedloom"
SERVER_APP = "fedloom.server.deployed:app"
CLIENT_APP = "fedloom.client.relay:app"
SETTING = "plan"  # the run's folder, told to a SuperLink that this server did not start

_PROJECT = """[project]
name = "{name}"
version = "{version}"
description = "A run of Fedloom: the code is the package that each side has installed."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "{publisher}"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"

[tool.flwr.app.config]
{setting} = ""
"""

_README = """# A run of Fedloom

This bundle holds no code. Server and devices run the `fedloom` package that they have installed.
"""


def write_app(folder: Path) -> Path:
    """Write the app's folder, replacing what it held of an earlier version; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    project = _PROJECT.format(
        name=NAME,
        version=version("fedloom"),
        publisher=PUBLISHER,
        server=SERVER_APP,
        client=CLIENT_APP,
        setting=SETTING,
    )
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    (folder / "README.md").write_text(_README, encoding="utf-8")
    return folder
