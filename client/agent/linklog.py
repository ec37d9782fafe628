"""A SuperNode's log: kept in a file that does not grow for ever, and read for what the device's owner should know."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Final

_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")
_LIMIT: Final = 2**20  # bytes of one file; one older one is kept
_LONGEST: Final = 4000  # characters of a line

REFUSED: Final = "the server refuses this device's key: it is unknown or revoked"
UNREACHABLE: Final = "the server cannot be reached; trying again"
_MEANINGS: Final = (
    ("[code: 2004]", REFUSED),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not signed by this device's CA, or no longer valid"),
    ("WRONG_VERSION_NUMBER", "the server does not speak TLS at this address"),
    ("does not recognize this SuperNode", "the server does not know this device any more"),
    ("Unable to parse the private key", "this device's private key cannot be read"),
    ("Connection attempt failed", UNREACHABLE),
    ("is not compatible", "the server runs another version of Flower"),
)
_OF_APPS: Final = ("ClientApp", "Failed to receive message", "Failed to send message")  # errors that end one message
CONNECTED: Final = ("SuperNode ID:", "Connection successful")


def meaning(line: str) -> str:
    """What a line of the log tells the owner, in plain words; empty if nothing."""
    return next((said for sign, said in _MEANINGS if sign in line), "")


def is_last(line: str) -> bool:
    """Whether a line is the error that a SuperNode ends after."""
    return line.startswith("ERROR") and not any(sign in line for sign in _OF_APPS)


class LinkLog:
    """The file. One process writes it; a full one is set aside as `.old`, in place of the one before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        path.chmod(0o600)

    def write(self, line: str) -> str:
        """Write a line, and return it as it was written: without colours, and cut where it is too long."""
        plain = _COLOURS.sub("", line.rstrip())[:_LONGEST]
        with suppress(OSError, ValueError):  # a full disk, a closed file: whoever is logged must not wait for it
            self._write(plain)
        return plain

    def _write(self, plain: str) -> None:
        if self._file.tell() > _LIMIT:
            self._file.close()
            self._path.replace(self._path.with_suffix(".old.log"))
            self._file = self._path.open("a", encoding="utf-8")
            self._path.chmod(0o600)
        self._file.write(plain + "\n")
        self._file.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
