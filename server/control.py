"""A SuperLink's Control API: runs started and stopped, device keys registered; what the `flwr` command does.

Called in this process, since a command takes one to two seconds to start: a server that was killed is back sooner, and
a thousand keys are registered in seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import init_http_client_from_connection
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedloom.protocols.password import HEADER

FINISHED = "finished"
GONE = "unregistered"
PAGE, MOST_PAGES = 100, 50  # runs that are listed in one call, and calls


@dataclass(frozen=True, kw_only=True)
class Node:
    """A registered SuperNode: its number, its public key (PEM) and the name it was registered under, if any."""

    id: int
    key: bytes
    name: str


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Where Flower sees a run: pending, starting, running or finished; and of a finished one, how and why."""

    status: str
    ending: str = ""
    details: str = ""

    @property
    def over(self) -> bool:
        return self.status == FINISHED


class Control:
    """A client of one SuperLink. Calls raise ConnectionError when it cannot be reached, ValueError when it refuses."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def start_run(self, app: Path, settings: Mapping[str, str]) -> int:
        """Submit the app in a folder with these run settings; return the run's number."""
        content = build_fab_from_disk(app)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        with _told():
            answer = self._client.StartRun(
                StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(settings)))
            )
        if not answer.HasField("run_id"):
            raise ValueError(f"SuperLink must start a run, it did not: {answer.note or 'without a reason'}")
        return int(answer.run_id)

    def stop_run(self, run: int) -> None:
        """Stop a run; one that is over already stays as it is."""
        with contextlib.suppress(ValueError), _told():
            self._client.StopRun(StopRunRequest(run_id=run))

    def run_status(self, run: int) -> RunStatus:
        with _told():
            found = self._client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
        return RunStatus(status=found.status, ending=found.sub_status, details=found.details)

    def unfinished_runs(self, settings: Mapping[str, str] | None = None) -> list[int]:
        """The numbers of the runs that are not over; with `settings`, of those that were started with them.

        Flower lists the newest first, a page at a time.
        """
        found: list[int] = []
        for page in range(MOST_PAGES):
            with _told():
                runs = self._client.ListRuns(ListRunsRequest(limit=PAGE, skip=page * PAGE)).run_dict
            for number, run in runs.items():
                same = all(run.override_config[key].string == value for key, value in (settings or {}).items())
                if run.status.status != FINISHED and same:
                    found.append(number)
            if len(runs) < PAGE:
                break
        return found

    def nodes(self) -> list[Node]:
        """Every SuperNode that is registered now."""
        with _told():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [Node(id=node.node_id, key=node.public_key, name=node.name) for node in found if node.status != GONE]

    def register(self, name: str, key: bytes) -> Node:
        """Let in a public key (PEM)."""
        with _told():
            answer = self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
        return Node(id=answer.node_id, key=key, name=name)

    def unregister(self, node: int) -> None:
        """Shut out a SuperNode, also while it is connected."""
        with _told():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def close(self) -> None:
        self._client.close()


class _Password:
    """Shows the run's password with each request (door.py)."""

    def __init__(self, password: str) -> None:
        self._password = password

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[HEADER] = self._password
        return call_next(context)


def connect(address: str, ca: Path | None, password: str) -> Control:
    """A client of the SuperLink at host:port on this machine; without a CA's file it speaks no TLS."""
    client = ControlHttpClient.from_server_address(
        server_address=address,
        insecure=ca is None,
        root_certificates=None if ca is None else ca.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedloom server"), _Password(password)],
    )
    return Control(client)


def join(name: str) -> Control:
    """A client of the connection that Flower's config.toml has under a name, logged in as the `flwr` command is.

    Raises:
        ValueError: when there is no such connection, or it is not usable.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return Control(init_http_client_from_connection(read_superlink_connection(name)))
    except (click.exceptions.Exit, click.ClickException, SystemExit, OSError) as error:
        why = " ".join(said.getvalue().split()) or str(error)
        raise ValueError(f"Flower's connection {name!r} cannot be used: {why}") from None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Transport errors and refusals, each in one line."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        known = FlowerError.from_json(error.response.text)
        why = f"{known.message} {known.public_details or ''}" if known else f"HTTP {error.response.status_code}"
        raise ValueError(f"SuperLink refused: {' '.join(why.split())}") from None
    except httpx.HTTPError as error:
        raise ConnectionError(f"SuperLink cannot be reached: {error or type(error).__name__}") from None
