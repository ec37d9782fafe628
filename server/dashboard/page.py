"""The page's parts, as HTML: everything that is shown is worked out here, the templates only set it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedloom.server.dashboard.charts import Chart, Series, draw
from fedloom.server.dashboard.folder import RunFolder
from fedloom.server.dashboard.recipe import metric_of, summary
from fedloom.server.dashboard.rounds import Round
from fedloom.server.dashboard.state import Device, Standing, Status
from fedloom.server.units import NO_VALUE, Metric, clock, human_bytes, human_seconds, iso, plural, tick_bytes

TEMPLATES = Path(__file__).with_name("templates")
PARTS = ("state", "numbers", "curves", "devices", "refusals", "rounds", "recipe")
DEVICES_SHOWN, ROUNDS_SHOWN = 200, 50
LATELY = 5  # rounds that "lately" means
TROUBLE = (Standing.REFUSED, Standing.LEFT_OUT, Standing.SILENT)
LOOKS = {  # what a standing looks like, beside what it says
    Standing.UNSEEN: "absent",
    Standing.JOINED: "ready",
    Standing.TRAINING: "busy",
    Standing.EVALUATING: "busy",
    Standing.ANSWERED: "ready",
    Standing.REFUSED: "bad",
    Standing.NOT_NOW: "absent",
    Standing.NOT_NEEDED: "ready",
    Standing.LEFT_OUT: "bad",
    Standing.SILENT: "bad",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """A number that stands for itself."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart and what stands above it."""

    title: str
    about: str
    chart: Chart | None
    missing: str


class Page:
    """Renders a folder's state."""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self._environment.filters.update(iso=iso, clock=clock, bytes=human_bytes, seconds=human_seconds)

    def whole(self, parts: dict[str, str], title: str, now: float) -> str:
        """The document around the parts."""
        return self._environment.get_template("page.html.j2").render(parts=parts, title=title, now=now)

    def parts(self, folder: RunFolder) -> dict[str, str]:
        """Every part's HTML by its name."""
        metric, rounds = metric_of(folder.recipe), list(folder.rounds())
        context = {
            "folder": folder,
            "run": folder.run,
            "headline": headline(folder),
            "cards": list(_cards(folder, rounds, metric)),
            "figures": list(_figures(folder, rounds, metric)),
            "devices": _shown(folder),
            "known": len(_known(folder)),
            "looks": LOOKS,
            "metric": metric,
            "rounds": list(_by_round(rounds))[-ROUNDS_SHOWN:][::-1],
            "many": len(rounds),
            "recipe": summary(folder.recipe),
            "blank": NO_VALUE,
        }
        return {name: self._environment.get_template(f"{name}.html.j2").render(context) for name in PARTS}


def headline(folder: RunFolder) -> tuple[str, str]:
    """Where the run stands: a word for its look, and a line."""
    run = folder.run
    if run.status == Status.STOPPED:
        return "bad", f"Stopped after round {run.round}" if run.round >= 0 else "Stopped before the first round"
    if run.status == Status.FINISHED:
        return "done", f"Finished, {plural(run.total, 'round')}"
    if run.status == Status.WAITING:
        wanted = f"Waiting for {plural(folder.wanted, 'device')}" if folder.wanted else "Waiting for the run to begin"
        return "waiting", wanted
    if run.phase is None:
        return "busy", f"Round {run.round} of {run.total} is done" if run.round >= 0 else "Starting"
    if run.phase.name == "hello":
        return "waiting", "Greeting devices"
    if run.phase.round == 0:
        return "busy", "Evaluating the base model, before round 1"
    done = run.phase.answered >= run.phase.asked
    what = {"train": "Merging" if done else "Training", "evaluate": "Evaluating"}.get(run.phase.name, "Running")
    return "busy", f"{what}, round {run.phase.round} of {run.total}"


def _cards(folder: RunFolder, rounds: list[Round], metric: Metric) -> Iterator[Card]:
    run = folder.run
    took = [done.seconds for done in rounds[-LATELY:] if done.seconds is not None and done.round > 0]
    yield Card(
        title="Rounds finished",
        value=f"{max(0, run.round)} of {run.total}" if run.total else NO_VALUE,
        note=f"{human_seconds(median(took))} a round lately" if took else "",
    )
    scores = [(done.round, done.values[metric.key]) for done in rounds if metric.key in done.values]
    if scores:
        (first, before), (last, score) = scores[0], scores[-1]
        since = f"{metric.change(score - before)} since round {first}" if last > first else "the base model"
        yield Card(title=metric.title, value=metric.text(score), note=since)
    else:
        yield Card(title=metric.title, value=NO_VALUE, note="not evaluated yet")
    yield _fleet_card(folder)
    last_round = rounds[-1] if rounds else None
    yield Card(
        title="Answers refused",
        value=f"{last_round.refused:,}" if last_round else NO_VALUE,
        note=f"up to round {last_round.round}" if last_round else "",
    )
    for title, key in (("From devices", "up"), ("To devices", "down"), ("For evaluation", "evaluation")):
        if last_round is None:
            yield Card(title=title, value=NO_VALUE)
            continue
        delta = getattr(last_round, key) - (getattr(rounds[-2], key) if len(rounds) > 1 else 0)
        note = f"{human_bytes(max(0, delta))} in round {last_round.round}"
        yield Card(title=title, value=human_bytes(getattr(last_round, key)), note=note)
    yield Card(title="Privacy spent", value="Not measured", note="in this run: no guarantee is claimed")


def _fleet_card(folder: RunFolder) -> Card:
    run, known = folder.run, _known(folder)
    standings = [device.standing for device in known]
    absent, resting = standings.count(Standing.UNSEEN), sum(map(run.is_resting, known))
    trouble = sum(standings.count(standing) for standing in TROUBLE)
    notes = [
        f"{absent:,} not seen yet" if absent else "",
        f"{trouble:,} in trouble" if trouble else "",
        f"{resting:,} in quarantine" if resting else "",
    ]
    said = ", ".join(note for note in notes if note)
    note = said or ("all well" if known else f"{folder.wanted} wanted" if folder.wanted else "")
    value = f"{len(known):,}{' and more' if run.crowded else ''}"
    return Card(title="Devices", value=value, note=note)


def _known(folder: RunFolder) -> list[Device]:
    """Devices that the log or the plan names."""
    heard = folder.run.devices
    return [*heard.values(), *(Device(name=name) for name in folder.names if name not in heard)]


def _shown(folder: RunFolder) -> list[Device]:
    """Devices by name; of many, those in trouble and those heard of last."""

    def urgency(device: Device) -> tuple[bool, float]:
        calm = device.standing not in TROUBLE and not folder.run.is_resting(device)
        return calm, -(device.seen or 0.0)

    chosen = sorted(_known(folder), key=urgency)[:DEVICES_SHOWN]
    return sorted(chosen, key=lambda device: device.name)


def _by_round(rounds: list[Round]) -> Iterator[tuple[Round, int, int, int]]:
    """Each round with the bytes up, down and for evaluation since the one before it."""
    nothing = Round(
        round=-1, up=0, down=0, evaluation=0, refused=0, updates=None, train_loss=None, seconds=None, values={}
    )
    for before, done in pairwise([nothing, *rounds]):
        deltas = (done.up - before.up, done.down - before.down, done.evaluation - before.evaluation)
        up, down, evaluation = (max(0, delta) for delta in deltas)
        yield done, up, down, evaluation


def _figures(folder: RunFolder, rounds: list[Round], metric: Metric) -> Iterator[Figure]:
    last, loss = folder.run.total, Metric(key="loss")
    if metric.is_share:
        scores = [(done.round, done.values[metric.key]) for done in rounds if metric.key in done.values]
        yield Figure(
            title=metric.title,
            about="on held-out examples",
            chart=draw(
                "metric",
                [Series(label=metric.title, points=scores)],
                unit="% of examples",
                last=last,
                text=metric.text,
                tick=metric.tick,
            ),
            missing="Nothing has been evaluated yet.",
        )
    held_out = [(done.round, done.values["loss"]) for done in rounds if "loss" in done.values]
    training = [(done.round, done.train_loss) for done in rounds if done.train_loss is not None]
    series = [Series(label="held out", points=held_out), Series(label="in training", points=training)]
    yield Figure(
        title="Loss",
        about="lower is better",
        chart=draw("loss", series, unit="cross-entropy, nats", last=last, text=loss.text, tick=loss.tick),
        missing="No round has been finished yet.",
    )
    by_round = list(_by_round(rounds))
    traffic = [
        Series(label="from devices", points=[(done.round, up) for done, up, _, _ in by_round if done.round > 0]),
        Series(label="to devices", points=[(done.round, down) for done, _, down, _ in by_round if done.round > 0]),
        Series(label="for evaluation", points=[(done.round, both) for done, _, _, both in by_round]),
    ]
    yield Figure(
        title="Bytes",
        about="in each round, over all devices",
        chart=draw("bytes", traffic, unit="bytes", last=last, text=human_bytes, tick=tick_bytes, zero=True),
        missing="No round has been finished yet.",
    )
