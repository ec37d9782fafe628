"""A consortium whose server and devices are on networks of their own, joined by links that a test spoils.

Each has a network namespace, and each device a pair of TUN devices to the server's, between which `wire.py` forwards
the packets: what is lost, late or cut there is so for the kernel's own TCP. It needs root and /dev/net/tun, no module
of the kernel's and no tool but `ip`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from stand import Stand

WIRE = Path(__file__).with_name("wire.py")
TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SERVER = "10.77.0.1"  # the address that the certificate names
PREFIX = "fedloom-"


def unable() -> str:
    """Why links cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces and TUN devices need root"
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is not installed"
    try:
        os.close(_tun(f"fl{os.getpid()}probe"))
        _ip("netns", "add", f"{PREFIX}{os.getpid()}-probe")
        _ip("netns", "del", f"{PREFIX}{os.getpid()}-probe")
    except (OSError, RuntimeError) as error:
        return f"no network of its own can be made here: {error}"
    return ""


class Network:
    """Namespaces of a server and its devices, and the links between them."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self._wire: subprocess.Popen[str] | None = None

    def __enter__(self) -> Network:
        _sweep()
        ends: dict[str, tuple[int, int]] = {}
        try:
            self._namespace("server", SERVER)
            for index, device in enumerate(self.devices):
                ends[device] = self._link(device, index)
            self._wire = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WIRE), *(f"{name}:{a}:{b}" for name, (a, b) in ends.items())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[end for pair in ends.values() for end in pair],
            )
        except BaseException:
            self.__exit__()
            raise
        finally:
            for pair in ends.values():
                for end in pair:
                    os.close(end)  # the wire has its own
        return self

    def __exit__(self, *_: object) -> None:
        if self._wire is not None:
            self._wire.kill()
            self._wire.communicate()
        for label in ("server", *self.devices):
            with suppress(RuntimeError):
                _ip("netns", "del", self._name(label))

    def inside(self, label: str) -> list[str]:
        """What to put before a command, so that it runs where the server or a device is."""
        return ["ip", "netns", "exec", self._name(label)]

    def set(self, *devices: str, **how: float | bool) -> dict[str, int]:
        """Change the links of devices, of all where none is named: `up`, `delay` (one way, seconds), `loss` (one way).

        Returns what they have done with packets so far: how many `passed`, were `lost` by chance, or `cut`.
        """
        wire, counts = self._wire, {"passed": 0, "lost": 0, "cut": 0}
        if wire is None or wire.stdin is None or wire.stdout is None:
            raise ValueError("a network must be entered before its links are changed")
        for device in devices or self.devices:
            wire.stdin.write(json.dumps({"link": device, **how}) + "\n")
            wire.stdin.flush()
            said = json.loads(wire.stdout.readline())
            counts = {fate: counts[fate] + said[fate] for fate in counts}
        return counts

    def _name(self, label: str) -> str:
        return f"{PREFIX}{os.getpid()}-{label}"

    def _namespace(self, label: str, address: str) -> None:
        _ip("netns", "add", self._name(label))
        _ip("-n", self._name(label), "addr", "add", f"{address}/32", "dev", "lo")
        _ip("-n", self._name(label), "link", "set", "lo", "up")

    def _link(self, device: str, index: int) -> tuple[int, int]:
        """A device's namespace and its link to the server's; the two ends as files."""
        address, ends = f"10.77.0.{index + 2}", []
        self._namespace(device, address)
        for where, far, own in (("server", address, SERVER), (device, SERVER, address)):
            interface = f"fl{os.getpid()}{'s' if where == 'server' else 'd'}{index}"
            ends.append(_tun(interface))
            _ip("link", "set", interface, "netns", self._name(where))
            _ip("-n", self._name(where), "link", "set", interface, "up")
            _ip("-n", self._name(where), "route", "add", f"{far}/32", "dev", interface, "src", own)
        return ends[0], ends[1]


@dataclass
class LinkedStand(Stand):
    """A stand on a network: the server listens on all addresses of its namespace, devices dial the one they know."""

    host: str = SERVER
    network: Network | None = None

    def around(self, label: str) -> tuple[list[str], dict[str, str]]:
        return (self.network.inside(label) if self.network else []), {}


def _tun(name: str) -> int:
    """A new TUN device: packets that the kernel sends there can be read from it, and what is written arrives."""
    end = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode("ascii"), IFF_TUN | IFF_NO_PI))
    except OSError:
        os.close(end)
        raise
    return end


def _sweep() -> None:
    """Remove the namespaces that a killed test left behind."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not psutil.pid_exists(int(owner)):
            _ip("netns", "del", name)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
