"""`fedloom plan RECIPE`: what each pretend device would get, and why, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedloom.cli.tables import show
from fedloom.server.units import human_bytes

if TYPE_CHECKING:
    from fedloom.client.model import Resident
    from fedloom.protocols.config import RunConfig
    from fedloom.simulations.planned import Planned

REFERENCE_RANK = 8  # of the whole step that memory budgets are set beside


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file (.toml), or the name of an embedded one.")],
    round: Annotated[int, typer.Option(min=1, help="Which round, as if nothing had been learned before it.")] = 1,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="fedpipe: run one device's warm-up, take its scores for all devices', and show what they get then.",
        ),
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. fleet.memory_mb=[20].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every device as JSON in place of a table.")] = False,
) -> None:
    """Show what each device of a recipe's fleet would get, what it would need, and why. Nothing is trained.

    Memory, seconds and bytes are predicted: seconds by the profiles of `fleet.profiles`, bytes of tensors alone.

    Examples: `fedloom plan fedspine`, `fedloom plan fedspine --round 5`, `fedloom plan fedpipe --measure`,
    `fedloom plan my.toml --set train.batch_size=4 --json`.
    """
    from fedloom.client.model import load_model
    from fedloom.protocols.config import contenders, read_recipe
    from fedloom.server.app import build_strategy
    from fedloom.simulations.cookbook import find_recipe
    from fedloom.simulations.planned import plan_fleet, whole_step
    from fedloom.simulations.world import base_model
    from fedloom.strategies.why import schedule

    config = read_recipe(find_recipe(recipe), set_ or [])
    loaded: dict[str, Resident] = {}
    plans: list[dict[str, Any]] = []
    with Console(stderr=True).status("reading the recipe") as status:
        for label, each in contenders(config):
            status.update(f"{label}: loading the model")
            key = each.model.model_dump_json() + each.lora.model_dump_json()
            if key not in loaded:
                loaded[key] = load_model(base_model(each), each.lora, seed=each.seed)
            resident = loaded[key]
            tell = _teller(label, status.update)
            devices = plan_fleet(each, resident, round=round, measure=measure, tell=tell)
            whole = whole_step(each, resident, REFERENCE_RANK)
            room = schedule(build_strategy(each), round)
            said = f"; its schedule leaves ratios {room[0]:.3f} to {room[1]:.3f}" if room else ""
            plans.append({"name": label, "config": each, "whole": whole, "devices": devices, "room": said})
    if as_json:
        print(json.dumps([_as_json(one, round) for one in plans], indent=1))
        return
    console = Console()
    for one in plans:
        _show(console, one, "after the warm-up" if measure else f"round {round}")


def _teller(label: str, update: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: update(f"{label}: {line}")


def _as_json(plan: Mapping[str, Any], round: int) -> dict[str, Any]:
    config: RunConfig = plan["config"]
    return {
        "name": plan["name"],
        "strategy": config.strategy.name,
        "round": round,
        "whole_step_bytes": plan["whole"],
        "devices": [asdict(device) for device in plan["devices"]],
    }


def _show(console: Console, plan: Mapping[str, Any], when: str) -> None:
    config: RunConfig = plan["config"]
    devices: Sequence[Planned] = plan["devices"]
    groups: dict[tuple[object, ...], list[Planned]] = {}
    for device in devices:
        groups.setdefault((device.kind, device.lends, device.largest_rank, device.why), []).append(device)
    columns = {name: cell for name, cell in _COLUMNS.items() if any(cell(group) for group in groups.values())}
    rows = [[_who(group), *(cell(group) for cell in columns.values())] for group in groups.values()]
    names = ", ".join(dict.fromkeys((config.name, plan["name"])))
    title = f"{names}: {when}, {len(devices)} devices"
    show(console, title, ("devices", *columns), rows)
    train = config.train
    console.print(
        f"a step on the whole model at rank {REFERENCE_RANK}, batch {train.batch_size}, {config.data.max_length} "
        f"tokens: {human_bytes(plan['whole'])}; a round is {train.steps} steps{plan['room']}",
        highlight=False,
        soft_wrap=True,
    )


def _who(group: Sequence[Planned]) -> str:
    """`9 x jetson-tx2`, or the device's own name where it is alone."""
    first = group[0]
    return f"{len(group)} x {first.kind or 'device'}" if len(group) > 1 else f"{first.device} {first.kind}".strip()


def _span(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    """The values of a group: one, or the least and the most; nothing where there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = text(min(known)), text(max(known))
    number, _, unit = low.partition(" ")
    return low if low == high else f"{number if high.endswith(unit) else low}\N{EN DASH}{high}"


def _memory(group: Sequence[Planned]) -> str:
    """What is needed, of what is lent."""
    needs = _span([device.memory for device in group], human_bytes)
    return f"{needs} of {human_bytes(group[0].lends)}" if needs and group[0].lends else needs


def _rank(group: Sequence[Planned]) -> str:
    """A device's rank, or where its modules differ the least and the most of the group's."""
    return _span([rank for device in group for rank in (device.ranks.values() or (device.rank,))], "{:.0f}".format)


_COLUMNS: Mapping[str, Callable[[Sequence[Planned]], str]] = {
    "rank": _rank,
    "modules": lambda group: _span([len(device.ranks) or None for device in group], "{:.0f}".format),
    "ratio": lambda group: _span([device.ratio for device in group], "{:.2f}".format),
    "batch": lambda group: _span([device.batch for device in group], "{:.0f}".format),
    "bits": lambda group: _span([device.bits for device in group], "{:.0f}".format) if group[0].ranks else "",
    "memory": _memory,
    "seconds": lambda group: _span([device.seconds for device in group], "{:.2f}".format),
    "down": lambda group: _span([device.down for device in group], human_bytes),
    "up": lambda group: _span([device.up for device in group], human_bytes),
    "why": lambda group: group[0].why,
}
