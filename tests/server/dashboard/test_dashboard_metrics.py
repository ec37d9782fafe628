"""/metrics by a strict parser of the text format 0.0.4."""

from __future__ import annotations

import re

import httpx
import pytest
from run_story import Story
from test_dashboard_web import HOSTILE

from fedloom.server.dashboard.exposition import exposition
from fedloom.server.dashboard.folder import RunFolder
from fedloom.server.dashboard.serving import Dashboard

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (-?\d+(?:\.\d+)?(?:e[+-]\d+)?)")

UNESCAPE = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    """Samples by name and labels.

    Raises:
        AssertionError: for anything that the format does not allow.
    """
    samples: Samples = {}
    kinds: dict[str, str] = {}
    current = ""
    assert text.endswith("\n")
    for line in text.split("\n")[:-1]:
        if line.startswith("# HELP "):
            current = line.split(" ")[2]
            assert current not in kinds, f"{current} comes twice"
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == current
            assert kind in ("counter", "gauge")
            assert (kind == "counter") == name.endswith("_total")
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, f"no sample: {line!r}"
            assert match[1] == current, "samples of a family stand together, after its type"
            labels = frozenset(
                (name, re.sub(r"\\[\\\"n]", lambda escape: UNESCAPE[escape[0]], value))
                for name, value in re.findall(LABEL, match[2] or "")
            )
            assert (match[1], labels) not in samples, "a sample comes once"
            samples[match[1], labels] = float(match[match.lastindex or 0])
    return samples


def of(samples: Samples, name: str, /, **labels: str) -> float:
    return samples[f"fedloom_{name}", frozenset(labels.items())]


def test_figures_of_a_run(dashboard: Dashboard, story: Story) -> None:
    parse(httpx.get(dashboard.url + "metrics").text)  # before anything
    story.recipe().begin().whole_round(0).whole_round(1).ask(2).answer(2, "clinic", size=77, seconds=2.5)
    folder = RunFolder(story.out)
    folder.poll()
    samples = parse(exposition(folder))
    assert of(samples, "run_info", name="kitchen", run="0123456789abcdef", strategy="fedloom") == 1
    assert [of(samples, "run_state", state=state) for state in ("waiting", "running", "finished", "stopped")] == [
        0,
        1,
        0,
        0,
    ]
    assert (of(samples, "run_round"), of(samples, "run_rounds")) == (1, 4)
    assert (of(samples, "received_bytes_total"), of(samples, "sent_bytes_total")) == (1_000_000, 2_500_000)
    assert of(samples, "evaluation", metric="exact_match") == pytest.approx(0.4)
    assert of(samples, "train_loss") == pytest.approx(1.7)
    assert (of(samples, "phase_asked"), of(samples, "phase_answered")) == (3, 1)
    assert of(samples, "device_received_bytes_total", device="clinic") == 2077
    assert of(samples, "device_sent_bytes_total", device="clinic") == 7500
    assert of(samples, "device_rounds_total", device="clinic") == 2
    assert of(samples, "device_answer_seconds", device="clinic") == 2.5
    assert of(samples, "device_quarantined", device="hospital-a") == 0
    answer = httpx.get(dashboard.url + "metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_hostile_names_are_labels(dashboard: Dashboard, story: Story) -> None:
    story.devices = list(HOSTILE)
    story.recipe(name=HOSTILE[2]).begin().whole_round(0).ask(1)
    folder = RunFolder(story.out)
    folder.poll()
    text = exposition(folder)
    text.encode("utf-8")
    samples = parse(text)
    devices = {dict(labels)["device"] for name, labels in samples if name == "fedloom_device_refused_total"}
    assert len(devices) == len(HOSTILE)
    assert HOSTILE[0] in devices
    assert 'quo"te\\ and\ufffdnewline\ufffdreturn\ufffd' in devices
