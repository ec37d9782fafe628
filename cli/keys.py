"""The commands of `fedloom keys`: who may be the server, and which devices may join it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from fedloom.server.certificates import CertificateFacts
    from fedloom.server.keys import Consortium, DeviceKey

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Keys of a consortium: its own CA, the server's certificate, and one key per device.\n\n"
        "On the server: `fedloom keys init --host fl.example.org`, then for each device `fedloom keys add-device NAME "
        "--server fl.example.org:9092`. Each gets one file, its join bundle, which is all that the device needs."
    ),
)

Keys = Annotated[Path, typer.Option("--keys", metavar="FOLDER", help="The consortium's folder of keys.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="HOST", help="A name or IP address that devices dial; repeat it for each."),
]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How long the server's certificate is valid.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The device: a-z, 0-9, '-' and '_', at most 63.")]

_FOLDER = Path("keys")
_DAYS = 825  # as server/certificates.py has it, which is imported when a command runs


@app.command()
def init(
    keys: Keys = _FOLDER,
    host: Hosts = None,
    days: Days = _DAYS,
    force: Annotated[
        bool, typer.Option("--force", help="Start over: a new CA, and every device revoked and to be added again.")
    ] = False,
) -> None:
    """Make a consortium: its CA (ten years) and a server certificate for the hosts, localhost and 127.0.0.1.

    Example: `fedloom keys init --host fl.example.org --host 10.0.0.5`.
    """
    facts = _consortium(keys).init(host or [], days=days, force=force)
    _made(f"{keys}: a CA, and a server certificate", facts)
    print(f"Keep {keys / 'ca.key'} safe: it is needed only to renew, so it may live on another machine until then.")
    if not host:
        print("Only this machine can connect; for others: fedloom keys renew --host NAME_THEY_DIAL" + _at(keys))
    _next(f"fedloom keys add-device NAME --server {_bracketed(facts.hosts[0])}:9092{_at(keys)}")


@app.command(name="add-device")
def add_device(
    name: Name,
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the device finds the server.")],
    keys: Keys = _FOLDER,
    out: Annotated[Path | None, typer.Option(help="The join bundle to write. [default: NAME.toml]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Make a device's key and write its join bundle: the server's address, the CA to trust, the private key.

    The bundle has the only copy of the private key; the consortium's folder keeps the public one. A device whose
    bundle is lost, or is in wrong hands, is revoked and added again.

    Example: `fedloom keys add-device hospital-a --server fl.example.org:9092`.
    """
    from fedloom.protocols.bundle import check_name

    consortium = _consortium(keys)
    file = out or Path(f"{check_name(name)}.toml")
    consortium.add_device(name, server, out=file, force=force)
    _warn(consortium.check(server))
    key = next(key for key in reversed(consortium.devices()) if key.name == name)
    print(f"{file}: the join bundle of {name}, key {key.fingerprint}")
    print("It holds the device's private key. Move it there by a safe way (scp, a stick) and delete it here.")
    _next(f"on the device: fedloom client --join {shlex.quote(file.name)}")


@app.command()
def revoke(name: Name, keys: Keys = _FOLDER) -> None:
    """Shut a device out. A running `fedloom server` notices by itself; there is nothing to restart."""
    consortium = _consortium(keys)
    before = {key.fingerprint for key in consortium.devices() if key.revoked}
    key = consortium.revoke(name)
    when = "was revoked already, at" if key.fingerprint in before else "is revoked since"
    print(f"{name}: key {key.fingerprint} {when} {key.revoked_at}")
    _next(f"fedloom keys add-device {name} --server HOST:PORT{_at(keys)} would let it in again, with a new key")


@app.command()
def renew(keys: Keys = _FOLDER, host: Hosts = None, days: Days = _DAYS) -> None:
    """Make a new server certificate from the same CA: before the old one expires, or for other hosts.

    Devices trust the CA, so their bundles stay good. Without `--host` the hosts stay; with it they are replaced by
    those given, localhost and 127.0.0.1.
    """
    _made(f"{keys}: a new server certificate", _consortium(keys).renew(host or [], days=days))
    _next("restart `fedloom server`, which reads its certificate when it starts")


@app.command(name="list")
def list_(
    keys: Keys = _FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """The devices and the certificates, with what needs care: expired or soon to be, or not a pair."""
    consortium = _consortium(keys)
    facts = dict(zip(("ca", "server"), consortium.facts(), strict=True))
    devices = consortium.devices()
    try:
        warnings = consortium.check()
    except ValueError as error:
        warnings = [str(error)]
    if as_json:
        print(json.dumps(_as_json(facts, devices, warnings), indent=1))
        return
    _show(facts, devices)
    _warn(warnings)
    if not devices:
        _next(f"fedloom keys add-device NAME --server {_bracketed(facts['server'].hosts[0])}:9092{_at(keys)}")


def _consortium(keys: Path) -> Consortium:
    from fedloom.server.keys import Consortium

    return Consortium(keys)


def _as_json(facts: dict[str, CertificateFacts], devices: list[DeviceKey], warnings: list[str]) -> dict[str, Any]:
    certificates = {name: asdict(fact) | {"expires": fact.expires.isoformat()} for name, fact in facts.items()}
    return {
        **certificates,
        "devices": [asdict(key) | {"public_key": str(key.public_key)} for key in devices],
        "warnings": warnings,
    }


def _show(facts: dict[str, CertificateFacts], devices: list[DeviceKey]) -> None:
    from fedloom.cli.tables import show

    console = Console()
    rows = [
        (name, f"{fact.expires:%Y-%m-%d}", f"{fact.days_left}", ", ".join(fact.hosts)) for name, fact in facts.items()
    ]
    show(console, "Certificates", ("certificate", "expires", "days left", "hosts"), rows)
    lines = [
        (
            key.name,
            f"revoked {key.revoked_at[:10]}" if key.revoked else "active",
            key.created[:10],
            key.fingerprint.removeprefix("SHA256:"),
        )
        for key in devices
    ]
    show(console, "Devices", ("device", "state", "added", "key, SHA256"), lines)


def _made(what: str, facts: CertificateFacts) -> None:
    print(f"{what} for {', '.join(facts.hosts)}, valid until {facts.expires:%Y-%m-%d}")


def _warn(warnings: list[str]) -> None:
    for line in warnings:
        print(f"Warning: {line}")


def _next(step: str) -> None:
    print(f"Next: {step}")


def _at(keys: Path) -> str:
    """The option that names the folder, where it is not the default."""
    return "" if keys == _FOLDER else f" --keys {shlex.quote(str(keys))}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
