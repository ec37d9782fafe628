"""Numbers as people read them."""

from __future__ import annotations

import pytest

from fedloom.server.units import MINUS, NO_VALUE, Metric, human_bytes, human_seconds, iso, plural


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (950, "950 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (54_000, "54.0 kB"),
        (999_499, "999 kB"),
        (1_234_567, "1.23 MB"),
        (2.5e9, "2.50 GB"),
        (7e15, "7.00 PB"),
        (1.5e18, "1,500 PB"),
    ],
)
def test_bytes_have_three_digits_and_a_decimal_unit(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, NO_VALUE),
        (float("nan"), NO_VALUE),
        (0.11, "0.11 s"),
        (4.0, "4 s"),
        (5.25, "5.2 s"),
        (42.4, "42 s"),
        (99.6, "1 min 40 s"),
        (150, "2 min 30 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
    ],
)
def test_a_length_of_time_has_the_unit_that_suits_it(seconds: float | None, text: str) -> None:
    assert human_seconds(seconds) == text


def test_shares_are_percent_and_a_loss_is_itself() -> None:
    assert Metric(key="rouge_l").title == "Rouge-L"
    assert Metric(key="token_accuracy").title == "Token accuracy"
    assert Metric(key="accuracy").text(0.123) == "12.3%"
    assert Metric(key="accuracy").signed(-0.0123) == f"{MINUS}1.2"
    assert Metric(key="accuracy").change(0.0123) == "+1.2 points"
    assert Metric(key="loss").change(-0.5) == f"{MINUS}0.500"
    assert Metric(key="loss").text(float("nan")) == Metric(key="loss").signed(float("inf")) == "n/a"


def test_moments_and_counts() -> None:
    assert iso(0) == "1970-01-01T00:00:00Z"
    assert [plural(n, "device") for n in (0, 1, 1200)] == ["0 devices", "1 device", "1,200 devices"]
