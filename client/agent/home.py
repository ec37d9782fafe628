"""A device's state folder: what lies where, who may use it, and the socket of the agent that does.

agent.lock          held by the one agent of this folder, for as long as it lives
agent.sock          its socket (elsewhere if that path is too long or odd for one)
paused              there while the owner has paused the device
traffic.json        today's bytes
outbox.jsonl        all that left the device, and older ones as outbox-1.jsonl, ...
answers/            the last answers, ready to be sent again
patches/, own/      the device's store (store.py)
link/               keys, Flower's folder and the logs of the link to the server
agent.log           what the model's process had to say
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

_LONGEST_SOCKET: Final = 100  # bytes; the system takes 107, or 103
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./ -]+")


@dataclass(frozen=True, kw_only=True)
class Home:
    """The places of one state folder."""

    folder: Path

    @property
    def paused(self) -> Path:
        return self.folder / "paused"

    @property
    def traffic(self) -> Path:
        return self.folder / "traffic.json"

    @property
    def answers(self) -> Path:
        return self.folder / "answers"

    @property
    def patches(self) -> Path:
        return self.folder / "patches"

    @property
    def own(self) -> Path:
        return self.folder / "own"

    @property
    def link(self) -> Path:
        return self.folder / "link"

    @property
    def log(self) -> Path:
        return self.folder / "agent.log"

    @property
    def socket(self) -> Path:
        """Where the agent listens. Always the same for one folder, so that others find it."""
        near = self.folder / "agent.sock"
        if len(os.fsencode(near)) <= _LONGEST_SOCKET and _PLAIN.fullmatch(str(near)):
            return near
        digest = hashlib.blake2b(os.fsencode(self.folder), digest_size=8).hexdigest()
        return Path(tempfile.gettempdir()) / f"fedloom-{os.getuid()}-{digest}" / "agent.sock"

    def open(self) -> None:
        """Make the folders, for their owner alone.

        Raises:
            ValueError: for a folder that cannot be made, or that belongs to somebody else.
        """
        for folder in (self.folder, self.socket.parent, self.link):
            _own_folder(folder)

    def tidy(self) -> None:
        """Clear away what a killed agent left half-written; for the one that holds the lock."""
        drafts = [*self.folder.glob(f".{self.traffic.name}.*")]  # other hidden files here are none of ours
        for kept in (self.answers, self.patches, self.own, self.link):
            drafts += kept.glob(".*.*")
        for draft in drafts:
            draft.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one agent of this folder, for as long as the block runs or the process lives.

        Raises:
            ValueError: when there is one already.
        """
        path = self.folder / "agent.lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                other = os.read(handle, 20).decode("ascii", "replace").strip() or "unknown"
                raise ValueError(f"an agent of {self.folder} runs already (process {other})") from None
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            yield
        finally:
            os.close(handle)


def socket_uri(path: Path) -> str:
    """A socket's address as gRPC writes it."""
    return "unix:" + quote(str(path))


def _own_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.is_symlink():
            raise ValueError(f"{folder} must be a folder that belongs to the user who runs the agent, it does not")
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise ValueError(f"the state folder {folder} cannot be used: {error.strerror}") from None
