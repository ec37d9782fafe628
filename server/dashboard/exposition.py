"""The run as Prometheus reads it: the text format 0.0.4, https://prometheus.io/docs/instrumenting/exposition_formats/."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fedloom.server.dashboard.folder import RunFolder
from fedloom.server.dashboard.rounds import Round
from fedloom.server.dashboard.state import Device, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A value and the labels that tell it from others of its name."""

    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A metric: counters end in `_total`, the others are gauges."""

    name: str
    about: str
    samples: tuple[Sample, ...]

    @property
    def kind(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"


def exposition(folder: RunFolder) -> str:
    """Every figure of the run and of each device."""
    families = [*_run(folder), *_rounds(list(folder.rounds())), *_devices(folder)]
    return "".join(line for family in families for line in _lines(family))


def _lines(family: Family) -> Iterator[str]:
    if not family.samples:
        return
    yield f"# HELP {family.name} {family.about}\n# TYPE {family.name} {family.kind}\n"
    for sample in family.samples:
        labels = ",".join(f'{name}="{_escape(value)}"' for name, value in sample.labels.items())
        yield (
            f"{family.name}{{{labels}}} {_number(sample.value)}\n"
            if labels
            else (f"{family.name} {_number(sample.value)}\n")
        )


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(value)


def _one(name: str, about: str, value: float | None) -> Family:
    samples = () if value is None else (Sample(value=value),)
    return Family(name=f"fedloom_{name}", about=about, samples=samples)


def _run(folder: RunFolder) -> Iterator[Family]:
    run, phase = folder.run, folder.run.phase
    labels = {"name": folder.title, "run": run.run, "strategy": run.strategy}
    info = (Sample(value=1, labels=labels),)
    yield Family(name="fedloom_run_info", about="The run and its strategy.", samples=info)
    states = tuple(Sample(value=int(run.status == status), labels={"state": status}) for status in Status)
    yield Family(name="fedloom_run_state", about="1 for the state that the run is in.", samples=states)
    yield _one("run_rounds", "Rounds that the run is to have.", run.total)
    yield _one("run_round", "The last finished round; -1 before any.", run.round)
    yield _one("run_starts_total", "How often a server has begun or gone on with the run.", run.starts)
    yield _one("phase_asked", "Devices asked in the running phase.", phase.asked if phase else 0)
    yield _one("phase_answered", "Devices that have answered in the running phase.", phase.answered if phase else 0)
    yield _one("last_event_timestamp_seconds", "When the last event came.", run.latest)
    yield _one("log_unreadable_lines_total", "Lines of the logs that could not be read.", folder.unreadable)
    yield _one("log_readable", "1 while the run's folder can be read.", int(not folder.problem))


def _rounds(rounds: list[Round]) -> Iterator[Family]:
    if not rounds:
        return
    last = rounds[-1]
    yield _one("received_bytes_total", "Bytes of devices' training answers.", last.up)
    yield _one("sent_bytes_total", "Bytes of training tasks to devices.", last.down)
    yield _one("evaluation_bytes_total", "Bytes of evaluation, both ways.", last.evaluation)
    yield _one("refused_total", "Answers that were not taken.", last.refused)
    yield _one("round_seconds", "Seconds that the last round took.", last.seconds)
    yield _one("round_updates", "Updates that the last round merged.", last.updates)
    trained = [done.train_loss for done in rounds if done.train_loss is not None]
    yield _one("train_loss", "Loss in training, of the last round that had one.", trained[-1] if trained else None)
    latest: dict[str, float] = {}
    for done in rounds:
        latest |= done.values
    samples = tuple(Sample(value=value, labels={"metric": name}) for name, value in latest.items())
    yield Family(name="fedloom_evaluation", about="The last evaluation on held-out examples.", samples=samples)


def _devices(folder: RunFolder) -> Iterator[Family]:
    devices = list(folder.run.devices.values())
    totals = {device.name: device.total() for device in devices}

    def each(name: str, about: str, values: Iterable[float | None]) -> Family:
        samples = tuple(
            Sample(value=value, labels={"device": device.name})
            for device, value in zip(devices, values, strict=True)
            if value is not None
        )
        return Family(name=f"fedloom_device_{name}", about=about, samples=samples)

    def total(device: Device, key: str) -> int:
        return int(getattr(totals[device.name], key))

    yield _one("devices", "Devices that the log names.", len(devices))
    yield each("last_seen_timestamp_seconds", "When it last sent something.", (device.seen for device in devices))
    yield each("rounds_total", "Rounds that took its update.", (total(device, "rounds") for device in devices))
    yield each("refused_total", "Its answers that were not taken.", (total(device, "refused") for device in devices))
    yield each("received_bytes_total", "Bytes of its answers.", (total(device, "up") for device in devices))
    yield each("sent_bytes_total", "Bytes of the tasks it was sent.", (total(device, "down") for device in devices))
    yield each("answer_seconds", "Seconds its last answer took, as it says.", (device.seconds for device in devices))
    yield each("quarantined", "1 while it sits out.", (int(folder.run.is_resting(device)) for device in devices))
