"""Every device alone: the floor that federation has to beat.

theta_k,t+1 = train(theta_k,t) on device k; nothing travels, nothing is merged
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedloom.protocols.messages import DeviceReport, Kind, ModelSpec, Patch, Payload, Start, Task, Update
from fedloom.strategies import planning
from fedloom.strategies.base import Scaling, State
from fedloom.strategies.packing import spec_of, spec_to_meta


@dataclass(frozen=True, kw_only=True)
class Local:
    """Each device trains alone and keeps its adapter."""

    scaling: Scaling = field(default=Scaling(), metadata={"doc": "How the recipe scales adapters."})

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """Nothing but the spec."""
        return State(version=0, meta={"spec": spec_to_meta(spec)})

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Each device goes on from its own adapter, and sends none."""
        spec = spec_of(state)
        return [
            planning.training_task(
                report, spec, self.scaling, round=round, rank=report.rank, start_from=Start.OWN, send=False
            )
            for report in devices
        ]

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Each device's own adapter."""
        return [
            Task(
                device=report.device,
                round=round,
                kind=Kind.EVALUATE,
                rank=max(report.rank, 1),
                alpha=self.scaling.alpha_for(max(report.rank, 1)),
                rslora=self.scaling.rslora,
                start_from=Start.OWN,
                send=False,
                state_round=report.state_round,
            )
            for report in devices
        ]

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """Count the round.

        Raises:
            ValueError: for an update that carries tensors, or when none carries an example.
        """
        examples = 0
        for update in updates:
            if update.payload or update.payload.keep:
                raise ValueError(f"update of {update.device} must carry no tensors under local, got some")
            if update.examples < 0:
                raise ValueError(f"update of {update.device} must count examples >= 0, got {update.examples}")
            examples += update.examples
        if not examples:
            raise ValueError("a round must have an update with at least one example, got none")
        return State(version=state.version + 1, tensors=state.tensors, meta=state.meta)

    def catch_up(self, state: State, since: int) -> Patch | None:
        """Nothing is ever merged."""
        return None

    def adapter(self, state: State) -> Payload:
        """There is no global model.

        Raises:
            ValueError: always.
        """
        raise ValueError("an adapter to export must come from a strategy that merges, got local")
