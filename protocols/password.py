"""A password among the processes of one server, or of one device, on their machine.

Flower's processes talk to each other over loopback, where every user of the machine can connect. Whoever starts them
puts a fresh password into their environment, which the system shows to their own user (and root) alone. They send it
with each request, and a request without it is not answered. It is on no command line and in no file.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Iterable
from typing import Any, Final

VARIABLE: Final = "FEDLOOM_PASSWORD"
HEADER: Final = "fedloom-password"


def fresh() -> str:
    """A new password."""
    return secrets.token_urlsafe(32)


def own() -> str:
    """The password that this process was started with.

    Raises:
        ValueError: when there is none.
    """
    password = os.environ.get(VARIABLE, "")
    if not password:
        raise ValueError(f"a process of a run must be started with {VARIABLE}: `fedloom` does so")
    return password


def is_shown(headers: Iterable[tuple[bytes, bytes]], password: str) -> bool:
    """Whether a request's headers (names in lower case, as ASGI has them) show the password."""
    sent = [value for name, value in headers if name == HEADER.encode()]
    return bool(password) and len(sent) == 1 and hmac.compare_digest(sent[0], password.encode())


def show(client: type[Any], password: str) -> None:
    """Have every client of a class of Flower's send the password, for processes that talk to one server alone."""
    start = client.__init__

    def started(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        self._client.headers[HEADER] = password

    client.__init__ = started
