"""The report: what it says is what the files hold, whatever names they hold, and bad folders fail in one line."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.server.pooling import interval, pool
from fedloom.simulations.plots import MARKERS, PALETTE, shorten, spread
from fedloom.simulations.report import (
    paired_difference,
    paired_interval,
    read_finished,
    write_report,
)

PLOTS = ["metric", "loss", "traffic", "bytes", "devices"]
METRIC = "exact_match"


def _measured(share: float, seed: int, devices: int = 6) -> dict[str, dict[str, float]]:
    """What devices report that get about `share` of 20 to 30 examples right; the devices are the same for all seeds."""
    sizes = np.random.Generator(np.random.Philox(key=1)).integers(20, 31, devices)
    hits = np.random.Generator(np.random.Philox(key=seed)).binomial(sizes, share)
    return {
        f"device-{i:02d}": {
            "n": float(n),
            "tokens": 9.0 * n,
            "loss_sum": 9.0 * n * (2.0 - 1.5 * right / n),
            "exact_match_sum": float(right),
            "token_hits": 9.0 * right,
        }
        for i, (n, right) in enumerate(zip(sizes.tolist(), hits.tolist(), strict=True))
    }


def _records(final: float, rounds: int, scale: int, devices: int) -> list[dict[str, Any]]:
    """Rounds as the loop writes them; only the even ones and the last are evaluated."""
    records: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        record: dict[str, Any] = {"round": number, "seconds": 1.5, "refused": 0, "train_seconds": 1.0}
        record |= {"bytes_up": scale * (number + 1), "bytes_down": 2 * scale * (number + 1), "bytes_evaluation": scale}
        if number:
            record |= {"train_loss": 2.0 / number, "updates": devices, "device_seconds": 9.0, "device_peak_mb": 400.0}
        if number % 2 == 0 or number == rounds:
            share = 0.3 + (final - 0.3) * number / rounds
            record["devices"] = _measured(share, seed=number and round(1000 * share), devices=devices)
            record["evaluation"] = pool(list(record["devices"].values()))
        records.append(record)
    return records


def _write_run(
    out: Path, finals: Mapping[str, float], *, rounds: int = 3, devices: int = 6, metric: str = METRIC
) -> dict[str, Any]:
    """A finished run whose strategies end near `finals`."""
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, (name, final) in enumerate(finals.items()):
        folder = "." if len(finals) == 1 else f"run-{index}"
        (out / folder).mkdir(exist_ok=True)
        records = _records(final, rounds, scale=10 ** (5 + index), devices=devices)
        (out / folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        first, last = (list(record["devices"].values()) for record in (records[0], records[-1]))
        ends = {key: records[-1][key] for key in ("bytes_up", "bytes_down", "bytes_evaluation", "refused")}
        entry = {"name": name, "folder": folder, "strategy": "fedloom", "metric": metric, **ends}
        entry |= {"before": pool(first)[metric], "after": pool(last)[metric]}
        entry |= {"ci95_before": interval(first, metric, seed=0), "ci95": interval(last, metric, seed=0)}
        entry |= {"loss_before": pool(first)["loss"], "loss_after": pool(last)["loss"]}
        entry |= {f"{key}_per_device": records[-1][key] / devices for key in ("bytes_up", "bytes_down")}
        entries.append(entry | {"seconds": 125.0, "device_seconds": 7500.0, "peak_rss_mb": 400.0})
    summary = {"name": "trial", "about": "What it shows.", "model": "embedded", "devices": devices, "rounds": rounds}
    summary |= {"seed": 0, "ranks": [8, 4], "metric": metric, "strategies": entries}
    summary["machine"] = {"cpu": "x86_64", "cores": 2, "torch": "2.9.0"}
    (out / "summary.json").write_text(json.dumps(summary))
    return summary


class _Page(HTMLParser):
    """Collects a page's tags, ids and text, and checks that they nest."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A comparison of three, the default among them but neither first nor best; folder, summary and page."""
    out = tmp_path_factory.mktemp("several")
    summary = _write_run(out, {"flora": 0.7, "fedloom": 0.5, "seeds": 0.9})
    return out, summary, write_report(out).read_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Names that are markup, mathematics and other scripts."""
    out = tmp_path_factory.mktemp("hostile")
    _write_run(out, {"<script>alert(1)</script>": 0.6, "$x^2$ & 'quotes\" ]]>": 0.5, "連合学習": 0.4})
    return out, write_report(out).read_text()


def test_the_headline_says_who_ended_where_with_interval_and_bytes(several: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, page = several
    flora, fedloom, seeds = summary["strategies"]
    low, high = seeds["ci95"]
    text = _Page(page).text
    assert (
        f"seeds ended highest, at {100 * seeds['after']:.1f}% exact match (95% interval {100 * low:.1f}% to "
        f"{100 * high:.1f}%), from {100 * seeds['before']:.1f}%, after 3 rounds on 6 devices, with 40.0 MB up and "
        f"80.0 MB down in all. Next came flora at {100 * flora['after']:.1f}% exact match"
    ) in text
    gap = 100 * (seeds["after"] - flora["after"])
    assert f"paired, the two differ by {gap:+.1f} points: enough to tell them apart." in text
    assert f"fedloom ended at {100 * fedloom['after']:.1f}% exact match" in text


def test_the_table_holds_every_number_in_human_units(several: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, page = several
    row = re.search(r'<tr><th scope="row"><span[^>]*></span>fedloom</th>(.*?)</tr>', page, re.S)
    assert row is not None
    cells = [_Page(cell).text for cell in re.findall(r"<td>(.*?)</td>", row.group(1), re.S)]
    entry = summary["strategies"][1]

    def share(key: str, bounds: str) -> str:
        low, high = entry[bounds]
        return f"{100 * entry[key]:.1f}% {100 * low:.1f}% to {100 * high:.1f}%"

    assert cells == [
        share("before", "ci95_before"),
        share("after", "ci95"),
        f"{entry['loss_before']:.3f}",
        f"{entry['loss_after']:.3f}",
        "4.00 MB",
        "8.00 MB",
        "1.00 MB",
        "222 kB",  # 4 MB over 6 devices and 3 rounds
        "444 kB",
        "2 min 5 s",
        "2 h 5 min",
        "419 MB",  # 400 MiB
    ]


def test_the_default_is_what_others_are_paired_with(several: tuple[Path, dict[str, Any], str]) -> None:
    out, _, page = several
    section = page[page.index('<section aria-labelledby="paired">') :]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', section[: section.index("</section>")], re.S)
    assert "Against fedloom, paired" in section
    assert [name for name, _ in rows] == ["flora", "seeds"]
    _, (_, fedloom, seeds) = read_finished(out)
    value = paired_difference(fedloom.devices, seeds.devices, METRIC)
    low, high = paired_interval(fedloom.devices, seeds.devices, METRIC, seed=0)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rows[1][1], re.S)
    assert cells == [f"{100 * value:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", "6", "better"]


def test_each_plot_is_on_the_page_and_in_a_file(several: tuple[Path, dict[str, Any], str]) -> None:
    out, _, page = several
    assert re.findall(r'<figure id="figure-(\w+)"', page) == PLOTS
    assert sorted(path.stem for path in (out / "plots").iterdir()) == sorted(PLOTS)
    for key in PLOTS:
        image = (out / "plots" / f"{key}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
        assert len(image) > 5000
        assert f'href="plots/{key}.png"' in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        texts = [text for element in ElementTree.fromstring(svg).iter() for text in [element.text] if text]
        assert {"flora", "fedloom", "seeds"} <= set(texts)


def test_devices_are_named_with_their_number_of_examples(several: tuple[Path, dict[str, Any], str]) -> None:
    out, _, page = several
    _, runs = read_finished(out)
    for name, sums in runs[0].devices.items():
        assert f"{name} ({sums['n']:.0f})" in page


def test_the_page_needs_nothing_else_and_is_well_formed(several: tuple[Path, dict[str, Any], str]) -> None:
    page = _Page(several[2])
    assert not page.open
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert len(set(page.ids)) == len(page.ids)
    referred = [value or "" for name, value in page.attributes if name in ("href", "xlink:href", "src")]
    assert all(value.startswith(("#", "plots/")) for value in referred)
    assert {value[1:] for value in referred if value.startswith("#")} <= set(page.ids)
    named = {part for name, value in page.attributes if name == "aria-labelledby" for part in (value or "").split()}
    assert named <= set(page.ids)
    assert "prefers-color-scheme: dark" in several[2]


def test_names_are_text_whatever_they_hold(hostile: tuple[Path, str]) -> None:
    _, page = hostile
    parsed = _Page(page)
    assert "script" not in parsed.tags
    assert parsed.text.count("<script>alert(1)</script>") >= 3  # headline, table, paired table
    assert "$x^2$ & 'quotes\" ]]>" in parsed.text
    assert "連合学習" in parsed.text
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)


def test_a_report_is_the_same_byte_for_byte(several: tuple[Path, dict[str, Any], str]) -> None:
    out, _, page = several
    images = {key: (out / "plots" / f"{key}.png").read_bytes() for key in PLOTS}
    assert write_report(out).read_text() == page
    assert images == {key: (out / "plots" / f"{key}.png").read_bytes() for key in PLOTS}


def test_one_strategy_on_one_device_for_one_round(tmp_path: Path) -> None:
    _write_run(tmp_path, {"fedloom": 0.8}, rounds=1, devices=1)
    text = _Page(write_report(tmp_path).read_text()).text
    assert "fedloom ended at" in text
    assert "after 1 round on 1 device, with" in text
    assert "paired" not in text


def test_few_devices_tell_nothing_apart(tmp_path: Path) -> None:
    _write_run(tmp_path, {"a": 0.1, "b": 0.95}, devices=5)
    page = write_report(tmp_path).read_text()
    assert _Page(page).text.count("too few devices to tell them apart") == 2  # headline and table
    assert '<td class="words">better' not in page


def test_a_loss_is_not_a_share_and_has_one_plot(tmp_path: Path) -> None:
    summary = _write_run(tmp_path, {"a": 0.4, "b": 0.9}, metric="loss")
    page = write_report(tmp_path).read_text()
    after = summary["strategies"][1]["after"]
    assert f"b ended lowest, at {after:.3f} loss (95% interval " in _Page(page).text
    assert "Against a, paired" in page
    assert "better" in page
    assert re.findall(r'<figure id="figure-(\w+)"', page) == ["metric", "traffic", "bytes", "devices"]


def test_a_run_that_diverged_is_still_reported_and_comes_last(tmp_path: Path) -> None:
    summary = _write_run(tmp_path, {"a": 0.4, "b": 0.9}, metric="loss")
    path = tmp_path / "run-1" / "metrics.jsonl"
    path.write_text(re.sub(r'("loss_sum": )[^,}]*', r"\1NaN", path.read_text()))
    summary["strategies"][1] |= {"after": float("nan"), "loss_after": float("nan"), "ci95": [float("nan")] * 2}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = _Page(write_report(tmp_path).read_text()).text
    assert "a ended lowest" in text
    assert "Next came b at n/a loss" in text


def test_many_devices_and_strategies_still_fit(tmp_path: Path) -> None:
    _write_run(tmp_path, {f"strategy {index}": 0.5 + index / 100 for index in range(9)}, rounds=1, devices=250)
    page = write_report(tmp_path).read_text()
    assert len(page) < 500_000
    assert "<details>" not in page


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    _write_run(tmp_path, {"fedloom": 0.8})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"round": 4, "eval')
    _, (run,) = read_finished(tmp_path)
    assert [record.round for record in run.records] == [0, 2, 3]


def _without(path: Path, change: Sequence[tuple[str, str]]) -> None:
    text = path.read_text()
    for pattern, replacement in change:
        text = re.sub(pattern, replacement, text)
    path.write_text(text)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("summary.json", [("^.*$", "{")], r".*summary.json is not JSON: .*"),
        ("summary.json", [("^.*$", "[]")], r"input should be .*, got \[\] in .*summary.json"),
        ("summary.json", [('"model": "embedded", ', "")], r"'model' is missing in .*summary.json"),
        ("summary.json", [('"after": [^,]*,', "")], r"'strategies.0.after' is missing in .*summary.json"),
        ("summary.json", [('"rounds": 3', '"rounds": "x"')], r"'rounds' input should be .*, got 'x' in .*summary.json"),
        ("summary.json", [(r'"strategies": \[.*\]', '"strategies": []')], r".* must list a strategy, got none"),
        ("metrics.jsonl", [(r"^\{", "{{")], r".*metrics.jsonl line 1 is not JSON: .*"),
        ("metrics.jsonl", [('"bytes_up": [0-9]*, ', "")], r"'bytes_up' is missing in .*metrics.jsonl line 1"),
        ("metrics.jsonl", [('"devices"', '"others"')], r"an evaluated round is missing in .*metrics.jsonl"),
        ("metrics.jsonl", [('"exact_match_sum"', '"x"')], r"'exact_match_sum' of 'device-00' is missing in .* round 0"),
    ],
)
def test_a_malformed_file_is_named_in_one_line(
    tmp_path: Path, name: str, change: list[tuple[str, str]], problem: str
) -> None:
    _write_run(tmp_path, {"fedloom": 0.8})
    _without(tmp_path / name, change)
    with pytest.raises(ValueError, match=f"is not a finished run: {problem}$") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a finished run: .*summary.json is missing"):
        write_report(tmp_path / "nowhere")
    _write_run(tmp_path, {"a": 0.4, "b": 0.9})
    (tmp_path / "run-1" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"is not a finished run: .*run-1/metrics.jsonl is missing"):
        write_report(tmp_path)


def test_strategies_judged_by_different_metrics_are_refused(tmp_path: Path) -> None:
    summary = _write_run(tmp_path, {"a": 0.4, "b": 0.9})
    summary["strategies"][1]["metric"] = "loss"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"must all be judged by 'exact_match', got others for \['b'\]"):
        write_report(tmp_path)


@pytest.mark.parametrize("metric", ["exact_match", "loss", "token_accuracy"])
@pytest.mark.parametrize("seed", range(3))
def test_a_paired_interval_contains_the_difference_and_turns_with_its_sides(metric: str, seed: int) -> None:
    one, two = _measured(0.5, seed, devices=12), _measured(0.7, seed + 50, devices=12)
    low, high = paired_interval(one, two, metric, seed=seed)
    value = paired_difference(one, two, metric)
    assert low < value < high
    assert value == pytest.approx(pool(list(two.values()))[metric] - pool(list(one.values()))[metric])
    assert paired_interval(two, one, metric, seed=seed) == pytest.approx([-high, -low])
    assert paired_interval(one, two, metric, seed=seed) == [low, high]


def test_a_paired_interval_of_equal_runs_is_zero_and_of_one_device_has_no_width() -> None:
    one = _measured(0.5, 1)
    assert paired_interval(one, one, METRIC, seed=0) == [0.0, 0.0]
    alone, other = ({"device-00": _measured(share, 3)["device-00"]} for share in (0.5, 0.9))
    assert paired_interval(alone, other, METRIC, seed=0) == [paired_difference(alone, other, METRIC)] * 2


def test_pairing_removes_what_makes_devices_easy_or_hard() -> None:
    """Devices from 10% to 90%, all better by two examples of 20: the intervals overlap, the paired one is sure."""
    one = {f"d{i}": {"n": 20.0, "exact_match_sum": float(2 + i)} for i in range(17)}
    two = {name: {"n": 20.0, "exact_match_sum": sums["exact_match_sum"] + 2} for name, sums in one.items()}
    assert interval(list(one.values()), METRIC, seed=0)[1] > interval(list(two.values()), METRIC, seed=0)[0]
    assert paired_interval(one, two, METRIC, seed=0) == pytest.approx([0.1, 0.1])


def test_pairs_are_the_devices_with_examples_in_both() -> None:
    one = {"a": {"n": 10.0, "exact_match_sum": 5.0}, "b": {"n": 10.0, "exact_match_sum": 0.0}}
    two = {"a": {"n": 10.0, "exact_match_sum": 8.0}, "c": {"n": 10.0, "exact_match_sum": 10.0}}
    assert paired_difference(one, two, METRIC) == pytest.approx(0.3)
    two["b"] = {"n": 0.0, "exact_match_sum": 0.0}
    assert paired_difference(one, two, METRIC) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="got 2 and 1 devices with none in common"):
        paired_interval(one, {"c": two["c"]}, METRIC, seed=0)


@settings(deadline=None)
@given(st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=8), st.floats(0.01, 0.12))
def test_labels_are_spread_in_order_and_within_the_plot(heights: list[float], gap: float) -> None:
    moved = spread(heights, gap)
    ordered = sorted(moved)
    assert all(later - earlier >= gap - 1e-9 for earlier, later in pairwise(ordered))
    assert ordered[0] >= -1e-9
    assert ordered[-1] <= 1 + 1e-9
    assert [moved[i] for i in sorted(range(len(heights)), key=lambda i: heights[i])] == ordered


def test_labels_that_are_apart_stay_and_a_cluster_keeps_its_middle() -> None:
    assert spread([0.8, 0.2], 0.1) == pytest.approx([0.8, 0.2])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])


def test_looks_differ_between_strategies_of_a_page() -> None:
    assert len(set(PALETTE)) == len(PALETTE) == len(set(MARKERS))


def test_long_names_are_cut() -> None:
    assert shorten("a" * 30) == "a" * 21 + "\N{HORIZONTAL ELLIPSIS}"
