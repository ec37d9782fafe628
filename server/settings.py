"""A server's settings, server.toml: where devices find it, its keys, how long it waits for them, its page.

The rules of rounds (cohort, deadlines, retries) are the recipe's, in its [server] table.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from fedloom.protocols.sections import Section, build_section, read_toml

Port = Annotated[int, Field(ge=1, le=65535)]


class Link(Section):
    """The SuperLink, which devices connect to."""

    host: str = Field(default="0.0.0.0", min_length=1)
    """The address to listen on; `0.0.0.0` listens on all of the machine's IPv4 addresses."""
    port: Port = 9092
    """The port to listen on, over TLS."""
    insecure: bool = False
    """No TLS and no device keys, for trials on one machine: the host must then be a loopback address."""
    join: str = ""
    """Join a running SuperLink in place of starting one: the name of a connection in Flower's config.toml. Its
    ServerApps must run on this machine, since they read and write the run's folder."""

    @model_validator(mode="after")
    def _fits(self) -> Link:
        if self.insecure and not self.join and not is_loopback(self.host):
            raise ValueError(f"must have a loopback host when it is insecure, such as 127.0.0.1, got {self.host!r}")
        return self


class Keys(Section):
    """The consortium's keys."""

    folder: Path = Path("keys")
    """The folder that `fedloom keys init` made; from server.toml's own folder where it is relative."""


class FleetTable(Section):
    """Which devices a run waits for."""

    wait_for: int = Field(default=1, ge=1)
    """Devices that must be connected before the first round."""
    wait_seconds: float = Field(default=600.0, gt=0)
    """Seconds to wait for them before the run stops."""
    rejoin_seconds: float = Field(default=60.0, ge=0)
    """Seconds that a server which was started again waits for the devices that took part before; it then goes on
    without those that are still away."""


class DashboardTable(Section):
    """The live run page."""

    enabled: bool = False
    """Serve it; `fedloom server --dashboard` does so too."""
    host: str = "127.0.0.1"
    """The address to serve it on. It has no passwords: anyone who reaches the address reads the page."""
    port: Port = 8080
    """The port to serve it on."""


class ServerSettings(Section):
    """All of server.toml."""

    link: Link = Link()
    keys: Keys = Keys()
    fleet: FleetTable = FleetTable()
    dashboard: DashboardTable = DashboardTable()


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and nothing else can reach it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_settings(path: Path | None = None) -> ServerSettings:
    """Read server.toml; without one, the defaults. A relative keys folder is taken from the file's own folder.

    Raises:
        ValueError: for a missing file, malformed TOML, an unknown key or a bad value.
    """
    if path is None:
        return ServerSettings()
    settings = build_section(ServerSettings, read_toml(path, "server settings"), "server settings")
    try:
        folder = path.parent / settings.keys.folder.expanduser()
    except RuntimeError:
        raise ValueError("server settings key 'keys.folder': its home folder must be one of this machine's") from None
    return settings.model_copy(update={"keys": Keys(folder=folder)})
