"""What every request must be, and what every answer carries; nothing here can be turned off by a page of another site.

A page elsewhere that rebinds its name to this address (DNS rebinding) still sends its own name as Host: it is refused.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9._-]{1,253}))(?::\d{1,5})?")


def host_of(header: str) -> str:
    """The host of a Host header, without its port; empty where it is none."""
    match = _HOST.fullmatch(header)
    return (match[1] or match[2]).lower().rstrip(".") if match else ""


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host spells, if it does."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class Guard:
    """Refuses what is not a plain look at the page under one of its own names."""

    def __init__(self, app: ASGIApp, *, bound: str, names: Iterable[str] = ()) -> None:
        """
        Args:
            bound: the host that the server listens on.
            names: other names that it is reached by, such as that of a proxy before it.
        """
        self._app = app
        self._names = {"localhost", bound.lower(), *(name.lower() for name in names)}
        address = address_of(bound)
        self._local = bound == "localhost" or (address is not None and address.is_loopback)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        if not self.admits(headers.get("host", "")):
            return PlainTextResponse("this host name is not served here\n", 421)
        if method not in METHODS:
            return PlainTextResponse("read-only: GET or HEAD\n", 405, {"Allow": ", ".join(METHODS)})
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return PlainTextResponse("not for other sites\n", 403)
        return None

    def admits(self, header: str) -> bool:
        """Whether a Host header names this server: addresses cannot be rebound, names must be known."""
        host = host_of(header)
        address = address_of(host)
        if host in self._names:
            return True
        return address is not None and (address.is_loopback or not self._local)
