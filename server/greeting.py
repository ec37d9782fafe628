"""Before a round: who is there, which model each holds, and which of them the run can go on with.

One device that does not fit is left out, said so, and asked again before the next round; it does not stop the others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedloom.protocols.codec import decode_answer
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import DeviceReport, Hello, ModelSpec, Refusal
from fedloom.protocols.validate import one_line
from fedloom.server.collect import largest_frame
from fedloom.server.courier import Courier, Parcel
from fedloom.server.enrolled import check_name
from fedloom.server.intake import NO_REASON
from fedloom.server.roster import Roster, in_brief, other_base
from fedloom.server.watch import Watcher
from fedloom.strategies.base import State, Strategy

log = logging.getLogger("fedloom.server")


def greet(
    courier: Courier,
    nodes: Sequence[int],
    config: RunConfig,
    watcher: Watcher,
    owners: Mapping[int, str] | None = None,
) -> tuple[dict[int, Hello], list[str]]:
    """Ask nodes who they are and which model they hold; a line for each that does not say.

    `owners` are the devices that the nodes' keys were given to, where there are keys.
    """
    hellos: dict[int, Hello] = {}
    problems: list[str] = []
    if not nodes:
        return hellos, problems
    greeted: set[str] = set()
    names = [str(node) for node in nodes]
    watcher.began(round=0, rounds=config.server.rounds, phase="hello", devices=names)
    parcels = [Parcel(node=node, kind="query", frame=b"") for node in nodes]
    for reply in courier.exchange(parcels, "0"):
        problem, size = "", len(reply.frame)
        name = (owners or {}).get(reply.node, str(reply.node))
        try:
            if reply.error:
                raise ValueError(reply.error)
            answer = decode_answer(reply.frame, (Hello, Refusal), limit=largest_frame(config))
            if isinstance(answer, Refusal):
                raise ValueError(answer.reason or NO_REASON)
            claimed = answer.report.device
            check_name(claimed, reply.node, owners)
            if claimed in greeted:
                raise ValueError(f"device names must differ, got {claimed!r} twice")
            greeted.add(claimed)
            hellos[reply.node], name = answer, claimed
        except ValueError as error:
            problem = one_line(str(error))
            problems.append(problem)
            log.warning("node %d is left out: %s", reply.node, problem)
        watcher.answered(round=0, phase="hello", device=name, size=size, down=0, seconds=0.0, refused=problem)
    return hellos, problems


def muster(hellos: Mapping[int, Hello], watcher: Watcher, *, prefer: ModelSpec | None = None) -> Roster:
    """The devices of a run: those that hold `prefer`, where any does, or else what more than half of them hold.

    Raises:
        ValueError: for no device, none that most agree with, or two of one name.
    """
    known = prefer is not None and any(hello.spec == prefer for hello in hellos.values())
    spec = prefer if prefer is not None and known else _common(hellos)
    roster = Roster({node: hello for node, hello in hellos.items() if hello.spec == spec})
    for hello in hellos.values():
        if hello.spec != spec:
            leave_out(watcher, hello.report.device, other_base(hello.spec, spec))
    return roster


def drop_unfit(roster: Roster, strategy: Strategy, state: State, round: int, watcher: Watcher) -> None:
    """Take from the roster those that no task fits.

    Raises:
        ValueError: when none is left.
    """
    problems = unfit(strategy, state, roster.reports(), round)
    if len(problems) == len(roster):
        raise ValueError(next(iter(problems.values())))
    for device, problem in problems.items():
        roster.drop(device)
        leave_out(watcher, device, problem)


def unfit(strategy: Strategy, state: State, reports: Sequence[DeviceReport], round: int) -> dict[str, str]:
    """Why devices cannot be planned for, by name.

    Raises:
        ValueError: for devices each of which can be planned for alone, but not all together.
    """
    fresh = [replace(report, version=0) for report in reports]  # what a device says that it holds is not at stake
    together = _problem(strategy, state, fresh, round)
    if not together:
        return {}  # one plan for all is quick, one for each is not
    problems = {report.device: _problem(strategy, state, [report], round) for report in fresh}
    found = {device: problem for device, problem in problems.items() if problem}
    if not found:
        raise ValueError(together)
    return found


def leave_out(watcher: Watcher, device: str, reason: str) -> None:
    log.warning("%s is left out: %s", device, reason)
    watcher.left_out(device=device, reason=reason)


def _problem(strategy: Strategy, state: State, reports: Sequence[DeviceReport], round: int) -> str:
    try:
        strategy.plan(state, reports, round)
    except ValueError as error:
        return one_line(str(error)) or "the strategy does not plan for it"
    return ""


def _common(hellos: Mapping[int, Hello]) -> ModelSpec:
    """What more than half of the devices hold."""
    kinds: list[list[Hello]] = []
    for hello in hellos.values():
        alike = next((kind for kind in kinds if kind[0].spec == hello.spec), None)
        if alike is None:
            kinds.append([hello])
        else:
            alike.append(hello)
    kinds.sort(key=len, reverse=True)
    if not kinds:
        raise ValueError("a run needs at least one device, got none")
    if 2 * len(kinds[0]) <= len(hellos):
        told = ", ".join(f"{kind[0].report.device!r} holds {in_brief(kind[0].spec)}" for kind in kinds[:4])
        raise ValueError(f"more than half of the devices must hold the same base and targets, got {len(kinds)}: {told}")
    return kinds[0][0].spec
