"""Who takes part: the devices that said hello, what each holds, and who is drawn for a round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedloom.protocols.messages import DeviceReport, Hello, ModelSpec
from fedloom.protocols.seeds import derive_seed


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
        names = [hello.report.device for _, hello in by_name]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"device names must differ, got {twice!r} twice")
        first = by_name[0][1]
        for _, hello in by_name:
            if hello.spec != first.spec:
                raise ValueError(
                    f"devices must hold the same base and targets: {names[0]!r} holds {first.spec.base_hash[:12]}, "
                    f"{hello.report.device!r} holds {hello.spec.base_hash[:12]}"
                )
        self.spec: ModelSpec = first.spec
        self._nodes = {hello.report.device: node for node, hello in by_name}
        self._reports = {hello.report.device: hello.report for _, hello in by_name}

    def __len__(self) -> int:
        return len(self._reports)

    def node(self, device: str) -> int:
        return self._nodes[device]

    def reports(self, names: Iterable[str] | None = None) -> list[DeviceReport]:
        return [self._reports[name] for name in (self._reports if names is None else names)]

    def draw(self, cohort: int, *, seed: int, round: int) -> list[DeviceReport]:
        """The cohort of a round, without replacement; 0 or more than there are takes all."""
        names: Sequence[str] = list(self._reports)
        if 0 < cohort < len(names):
            generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "cohort", round)))
            chosen = generator.choice(len(names), size=cohort, replace=False)
            names = [names[index] for index in sorted(chosen)]
        return self.reports(names)

    def saw(self, device: str, *, version: int, trained_in: int | None = None) -> None:
        """Note what a device holds after it answered."""
        report = replace(self._reports[device], version=version)
        if trained_in is not None:
            report = replace(report, state_round=trained_in)
        self._reports[device] = report

    def to_json(self) -> dict[str, Any]:
        return {name: [report.version, report.state_round] for name, report in self._reports.items()}

    def restore(self, noted: Mapping[str, Sequence[int]]) -> list[str]:
        """Take back what `to_json` gave; return the devices that no longer hold what they did.

        Such a device starts from the base again: the next patch it gets is the whole one.

        Raises:
            ValueError: when the devices are not those of the checkpoint.
        """
        if set(noted) != set(self._reports):
            odd = sorted(set(noted) ^ set(self._reports))
            raise ValueError(f"a run resumes on the devices of its checkpoint, got a difference in {odd[:5]}")
        lost = []
        for name, (version, state_round) in noted.items():
            if self._reports[name].version < version:
                lost.append(name)
            held = 0 if name in lost else version
            self._reports[name] = replace(self._reports[name], version=held, state_round=state_round)
        return lost
