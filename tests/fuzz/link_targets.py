"""The device-facing port of a server: its SuperLink behind its door, over TLS on a real socket.

An input's first byte says what is done with the rest: requests that a device's key signs, that another's does or none,
paths of any kind, requests without their end or past the limit, and bytes that are no HTTP or no TLS. Whatever it was,
the SuperLink must live, stay small, know the same devices, run nothing, and let the device in afterwards.
"""

from __future__ import annotations

import http.client
import random
import socket
import ssl
import time
import weakref
from base64 import b64encode
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from file_targets import joined, parted
from mutation import mutate_record, parsed
from served import Watched
from targets import Broken, Havoc, Target, same

LIMIT: Final = 1 << 20  # bytes of a request
SIGNED, UNSIGNED, STRANGER, PATH, SHORT, LARGE, BYTES, PLAIN = range(8)  # what an input is
_SECONDS: Final = 30.0  # for an answer: much more than there is need for
_GOOD_EVERY: Final = 64  # inputs between two looks at everything
_SIGN_EVERY: Final = 20.0  # seconds that a signature is used for
_CHUNKED: Final = (
    b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"
)
_HELLO: Final = (  # how a TLS client begins
    b"\x16\x03\x01\x00\x31\x01\x00\x00\x2d\x03\x03" + bytes(32) + b"\x00\x00\x04\x13\x01\x13\x02\x01\x00\x00\x00"
)
_SECRET: Final = ("/v1/control/", "/v1/runtime/")  # APIs that are not for devices


def _requests() -> dict[str, type[Any]]:
    """The Fleet API: what each of its calls takes."""
    from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2

    return {
        "activate-node": fleet_pb2.ActivateNodeRequest,
        "deactivate-node": fleet_pb2.DeactivateNodeRequest,
        "register-node": fleet_pb2.RegisterNodeFleetRequest,
        "unregister-node": fleet_pb2.UnregisterNodeFleetRequest,
        "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
        "pull-messages": fleet_pb2.PullMessagesRequest,
        "push-messages": fleet_pb2.PushMessagesRequest,
        "get-run": run_pb2.GetRunRequest,
        "get-fab": fab_pb2.GetFabRequest,
        "push-object": message_pb2.PushObjectRequest,
        "pull-object": message_pb2.PullObjectRequest,
        "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    }


class Key:
    """A device's key, as its SuperNode shows it."""

    def __init__(self, private: Any) -> None:
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        self._private, self.public = private, public_key_to_bytes(private.public_key())
        self._until, self._headers = 0.0, dict[str, str]()

    def headers(self) -> dict[str, str]:
        """The key, the time and its signature."""
        from flwr.supercore.date import now
        from flwr.supercore.primitives.asymmetric import sign_message

        if time.monotonic() > self._until:
            stamp = now().isoformat()
            signature = b64encode(sign_message(self._private, stamp.encode("ascii"))).decode()
            shown = b64encode(self.public).decode()
            self._headers = {"flwr-public-key": shown, "flwr-timestamp": stamp, "flwr-signature": signature}
            self._until = time.monotonic() + _SIGN_EVERY
        return self._headers


class Port:
    """A SuperLink with one device, and everything that can be done to its port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "link"
        self._watched: Watched | None = None
        self._count = 0
        self._calls: dict[str, type[Any]] = {}

    def seeds(self) -> list[bytes]:
        """Good requests of every call, and one of everything else."""
        self._open()
        bodies = [self._good(name).SerializeToString() for name in self._calls]
        made = [joined([bytes([kind, at]), body]) for kind in (SIGNED, STRANGER) for at, body in enumerate(bodies)]
        made += [joined([bytes([UNSIGNED, at]), bodies[at]]) for at in (0, 5)]
        paths = (
            b"/health",
            b"/v1/fleet/x",
            b"/docs",
            b"*",
            b"/v1/fleet/../control/list-runs",
            b"/v1/control/list-runs",
        )
        made += [joined([bytes([PATH, 0]), path]) for path in paths]
        made += [joined([bytes([SHORT, 5]), bodies[5] * 9]), joined([bytes([LARGE, 5]), bodies[5]])]
        made += [joined([bytes([kind, 0]), _CHUNKED]) for kind in (BYTES, PLAIN)] + [
            joined([bytes([PLAIN, 0]), _HELLO])
        ]
        return made

    def check(self, data: bytes) -> None:
        """Refused means: a status from 400, or no answer."""
        self._open()
        head, rest = parted(data, 2)
        kind, at = (head[0] % 8, head[1]) if len(head) > 1 else (BYTES, 0)
        status = self._do(kind, at, rest)
        self._look()
        if status >= 500 and kind != SIGNED:  # there Flower answers so to what it cannot serve
            raise Broken(f"a request must not break down in the server, got status {status}")
        if status == 0 or status >= 400:
            raise ValueError(f"status {status}")

    def mutate(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        head, rest = parted(data, 2)
        kind, at = (head[0] % 8, head[1]) if len(head) > 1 else (SIGNED, 0)
        if rng.random() < 0.05:
            kind, at = rng.randrange(8), rng.randrange(12)
        if kind in (SIGNED, STRANGER) and rng.random() < 0.7:
            record = parsed(list(self._calls.values())[at % len(self._calls)], rest)
            mutate_record(record, rng)
            if rng.random() < 0.7:  # of its own node, or nobody looks at the rest
                record.MergeFrom(self._good(list(self._calls)[at % len(self._calls)]))
            rest = record.SerializeToString()
        else:
            rest = havoc(rest)
        return joined([bytes([kind, at]), rest])

    def _open(self) -> None:
        """Start the SuperLink at the first input, with one device's key let in."""
        if self._watched is not None:
            return
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key

        from fedloom.server.admission import Admission
        from fedloom.server.keys import Consortium
        from fedloom.server.processes import processes_of
        from fedloom.server.settings import Link
        from fedloom.server.superlink import FOLDER, SuperLink

        (self._folder / FOLDER).mkdir(parents=True)
        keys = Consortium(self._folder / "keys")
        keys.init(["127.0.0.1"])
        self._port = _free_port()
        bundle = keys.add_device("hospital-a", f"127.0.0.1:{self._port}")
        self._key = Key(load_ssh_private_key(bundle.key.encode(), None))
        self._stranger = Key(ec.generate_private_key(ec.SECP384R1()))
        self._tls = ssl.create_default_context(cadata=bundle.ca)
        admission = Admission(keys, self._folder / FOLDER, limit=LIMIT)
        admission.post()
        link = SuperLink(Link(host="127.0.0.1", port=self._port), self._folder, keys.server_files())
        weakref.finalize(self, link.stop)
        link.start()
        admission.sync(link.control)
        self._control, self._calls = link.control, _requests()
        [node] = self._control.nodes()
        self._node = node.id
        [door] = [p for p in processes_of(self._folder) if "fedloom.server.door" in " ".join(p.cmdline())]
        self._watched = Watched(door.pid, link.log)
        self._line = http.client.HTTPSConnection("127.0.0.1", self._port, timeout=_SECONDS, context=self._tls)
        self._known = self._state()

    def _good(self, name: str) -> Any:
        """A request of the device's own that the call understands."""
        request = self._calls[name]()
        if hasattr(request, "public_key"):
            request.public_key = self._key.public
        if hasattr(request, "heartbeat_interval"):
            request.heartbeat_interval = 30.0
        if hasattr(request, "node_id"):
            request.node_id = self._node
        elif hasattr(request, "node"):
            request.node.node_id = self._node
        return request

    def _do(self, kind: int, at: int, rest: bytes) -> int:
        """The status of the answer; 0 for none."""
        path = f"/v1/fleet/{list(self._calls)[at % len(self._calls)]}"
        if kind == SIGNED:
            return self._post(path, rest, self._key.headers())
        if kind == STRANGER:
            return self._never(self._post(path, rest, self._stranger.headers()), "a key that is not let in")
        if kind == UNSIGNED:
            shown = self._key.headers() | {"flwr-signature": b64encode(rest).decode()}
            body = self._good(path.rpartition("/")[2]).SerializeToString()
            return self._never(self._post(path, body, shown), "a signature that is none")
        if kind == PATH:
            path = "/" + "".join(chr(33 + (byte - 33) % 94) for byte in rest).lstrip("/")
            status = self._post(path, b"", self._key.headers())
            return self._never(status, "a path without the password") if path.startswith(_SECRET) else status
        if kind == SHORT:
            return self._pour(_head(path, self._key.headers(), len(rest) + 1) + rest, tls=True)
        if kind == LARGE:
            return self._never(self._post(path, rest + bytes(LIMIT), self._key.headers()), "too large a request")
        return self._pour(rest, tls=kind == BYTES)

    def _never(self, status: int, what: str) -> int:
        if 0 < status < 400:
            raise Broken(f"{what} must be refused, got status {status}")
        return status

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> int:
        """Over the line that is kept open; one that the server has closed is opened again."""
        for _ in range(2):
            try:
                self._line.request("POST", path, body, headers | {"content-type": "application/protobuf"})
                answer = self._line.getresponse()
                answer.read()
                return answer.status
            except (OSError, http.client.HTTPException):
                self._line.close()
        return 0

    def _pour(self, data: bytes, *, tls: bool) -> int:
        """Bytes into a connection of their own, and its end; the status of what comes back within a moment."""
        back = b""
        with socket.create_connection(("127.0.0.1", self._port), timeout=_SECONDS) as plain, suppress(OSError):
            line = self._tls.wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain
            with line:
                line.sendall(data)
                line.settimeout(0.02)
                while part := line.recv(1 << 16):
                    back += part
                    if len(back) > 1 << 16:
                        break
        words = back.split(b" ", 2)
        return int(words[1]) if back.startswith(b"HTTP/") and len(words) > 1 and words[1].isdigit() else 0

    def _state(self) -> tuple[Any, ...]:
        """What no device may change: who is registered, who is let in, and that nothing runs."""
        nodes = sorted((node.id, node.key, node.name) for node in self._control.nodes())
        guests = (self._folder / "superlink" / "door.json").read_bytes()
        return nodes, guests, self._control.unfinished_runs()

    def _look(self) -> None:
        """The server is well, and the device gets in."""
        if self._watched is None:
            return
        self._watched.look()
        self._count += 1
        if self._post("/health", b"", {}) not in (200, 405):
            raise Broken("a server must say that it is well, it did not")
        if self._count % _GOOD_EVERY == 0:
            same("what the server knows", self._state(), self._known)
            until = time.monotonic() + 60
            leave, enter = (self._good(name).SerializeToString() for name in ("deactivate-node", "activate-node"))
            self._post("/v1/fleet/deactivate-node", leave, self._key.headers())
            while (status := self._post("/v1/fleet/activate-node", enter, self._key.headers())) != 200:
                if status != 503 or time.monotonic() > until:
                    raise Broken(f"a device must be let in, got status {status}")
                time.sleep(0.5)


def _head(path: str, headers: dict[str, str], length: int) -> bytes:
    """The lines before a request's body, whatever that body is."""
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {length}", "content-type: application/protobuf"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def targets(folder: Path) -> dict[str, Target]:
    """Files go into `folder`."""
    port = Port(folder)
    made = [
        Target(name="server-port", check=port.check, seeds=port.seeds, mutate=port.mutate, seconds=5.0, memory=64 << 20)
    ]
    return {target.name: target for target in made}
