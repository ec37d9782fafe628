"""Who takes part: the devices that said hello, what each holds, which are here, and who is drawn for a round."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedloom.protocols.messages import DeviceReport, Hello, ModelSpec
from fedloom.protocols.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a device has done lately."""

    failures: int = 0  # rounds in a row without a good answer
    until: int = 0  # the last round that it sits out


class Roster:
    """Devices by name, in name order: Flower's node ids change from run to run, names do not."""

    def __init__(self, hellos: Mapping[int, Hello]) -> None:
        """Take in the hellos by node id.

        Raises:
            ValueError: for no device, two devices of one name, or devices that hold different bases.
        """
        if not hellos:
            raise ValueError("a run needs at least one device, got none")
        by_name = sorted(hellos.items(), key=lambda item: item[1].report.device)
        self.spec: ModelSpec = by_name[0][1].spec
        self._nodes: dict[str, int] = {}
        self._reports: dict[str, DeviceReport] = {}
        self._standing: dict[str, Standing] = {}
        self._noted: dict[str, Sequence[int]] = {}  # what a checkpoint says of devices that have not come back yet
        self._here: set[int] = set(hellos)
        for node, hello in by_name:
            self.join(node, hello)

    def __len__(self) -> int:
        return len(self._reports)

    def join(self, node: int, hello: Hello) -> None:
        """Take in a device that comes, or comes back under another node.

        Raises:
            ValueError: when a device of that name is here already, or this one holds another base.
        """
        report = hello.report
        other = self._nodes.get(report.device)
        if other is not None and other != node and other in self._here:
            raise ValueError(f"device names must differ, got {report.device!r} twice")
        if hello.spec != self.spec:
            raise ValueError(other_base(hello.spec, self.spec))
        for name in [name for name, known in self._nodes.items() if known == node and name != report.device]:
            del self._nodes[name]  # the device behind a node has changed its name
        self._nodes[report.device] = node
        self._reports[report.device] = report
        self._reports = dict(sorted(self._reports.items()))
        self._here.add(node)
        if report.device in self._noted:
            self._take_back(report.device, self._noted.pop(report.device))

    def drop(self, device: str) -> None:
        """Forget a device that cannot take part, as if it had not come; before the next round it is asked again."""
        del self._reports[device]
        del self._nodes[device]

    def present(self, nodes: Collection[int]) -> list[int]:
        """Note which nodes are connected now; return those that have not said hello yet."""
        self._here = set(nodes)
        return sorted(self._here - set(self._nodes.values()))

    def node(self, device: str) -> int | None:
        """The device's node, or None while it is away."""
        node = self._nodes.get(device)
        return node if node in self._here else None

    def reports(self, names: Iterable[str] | None = None) -> list[DeviceReport]:
        """The reports of `names`, or of all devices that are here, in name order."""
        chosen = [name for name in self._reports if self.node(name) is not None] if names is None else names
        return [self._reports[name] for name in chosen]

    def draw(self, cohort: int, *, seed: int, round: int) -> list[DeviceReport]:
        """The cohort of a round, without replacement, from those that are here and do not sit out; 0 takes all.

        When all sit out, none does.
        """
        here = [report.device for report in self.reports()]
        fit = [name for name in here if self.standing(name).until < round]
        names: Sequence[str] = fit or here
        if 0 < cohort < len(names):
            generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "cohort", round)))
            chosen = generator.choice(len(names), size=cohort, replace=False)
            names = [names[index] for index in sorted(chosen)]
        return self.reports(names)

    def saw(self, device: str, *, version: int, trained_in: int | None = None) -> None:
        """Note what a device holds after it answered; it may be gone by now, with its answer in the journal."""
        if device in self._reports:
            report = replace(self._reports[device], version=version)
            self._reports[device] = report if trained_in is None else replace(report, state_round=trained_in)
        else:
            before = [*self._noted.get(device, ()), 0, 0, 0, 0][:4]
            self._noted[device] = [version, before[1] if trained_in is None else trained_in, *before[2:]]

    def standing(self, device: str) -> Standing:
        return self._standing.get(device, Standing())

    def did(self, device: str, *, good: bool, round: int, patience: int, rest: int) -> Standing:
        """Note how a device did in a round; after `patience` failures in a row (0: never) it sits out `rest` rounds."""
        if good:
            self._standing.pop(device, None)
            return Standing()
        before = self.standing(device)
        resting = 0 < patience <= before.failures + 1
        standing = (
            Standing(until=round + rest) if resting else Standing(failures=before.failures + 1, until=before.until)
        )
        self._standing[device] = standing
        return standing

    def to_json(self) -> dict[str, Any]:
        """For each device [version, state_round, failures, until]; also of devices that never came back."""
        table: dict[str, Any] = {name: list(values) for name, values in self._noted.items()}
        for name, report in self._reports.items():
            standing = self.standing(name)
            table[name] = [report.version, report.state_round, standing.failures, standing.until]
        return table

    def restore(self, noted: Mapping[str, Sequence[int]]) -> list[str]:
        """Take back what `to_json` gave; return the devices that no longer hold what they did.

        Such a device starts from the base again: the next patch it gets is the whole one. A device that is not here
        yet is taken back when it comes.
        """
        lost = []
        for name, values in noted.items():
            if name not in self._reports:
                self._noted[name] = list(values)
            elif not self._take_back(name, values):
                lost.append(name)
        return lost

    def away(self) -> list[str]:
        """Devices that a checkpoint names and that have not come back."""
        return sorted(self._noted)

    def _take_back(self, name: str, values: Sequence[int]) -> bool:
        """Whether the device still holds what was noted."""
        version, state_round, failures, until = [*values, 0, 0][:4]
        holds = self._reports[name].version >= version
        self._reports[name] = replace(self._reports[name], version=version if holds else 0, state_round=state_round)
        if failures or until:
            self._standing[name] = Standing(failures=failures, until=until)
        return holds


def other_base(held: ModelSpec, wanted: ModelSpec) -> str:
    """Why a device cannot take part that holds another model than the run is about."""
    return f"it must hold the run's base and targets, {in_brief(wanted)}, got {in_brief(held)}"


def in_brief(spec: ModelSpec) -> str:
    """A model in a few words, by which two can be told apart."""
    mask = f", mask {spec.mask[:12]}" if spec.mask else ""
    return f"{spec.base_hash[:12]} ({len(spec.matrices)} adapted matrices{mask})"
