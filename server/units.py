"""Numbers as people read them: on the run page, in reports and in the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
MINUS = "\N{MINUS SIGN}"
NO_VALUE = "\N{EN DASH}"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a run is judged by: shares are written as percent, the loss as it is."""

    key: str

    @property
    def title(self) -> str:
        return {"rouge_l": "Rouge-L"}.get(self.key, self.key.replace("_", " ").capitalize())

    @property
    def is_share(self) -> bool:
        return self.key != "loss"

    def text(self, value: float) -> str:
        if not math.isfinite(value):
            return "n/a"
        return f"{100 * value:.1f}%" if self.is_share else f"{value:.3f}"

    def signed(self, value: float) -> str:
        """A difference with its sign, in percentage points for shares."""
        if not math.isfinite(value):
            return "n/a"
        return (f"{100 * value:+.1f}" if self.is_share else f"{value:+.3f}").replace("-", MINUS)

    def change(self, value: float) -> str:
        """The same with its unit."""
        return self.signed(value) + (" points" if self.is_share else "")

    def tick(self, value: float) -> str:
        return f"{100 * value:.4g}%" if self.is_share else f"{value:.4g}"


def human_bytes(value: float, digits: str = "#.3g") -> str:
    """Three digits and a decimal unit: 1 kB is 1,000 bytes."""
    unit = 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    number = f"{value:{digits if unit else '.0f'}}" if value < 999.5 else f"{value:,.0f}"
    return f"{number.rstrip('.')} {UNITS[unit]}"


def tick_bytes(value: float) -> str:
    return human_bytes(value, ".4g")


def human_seconds(value: float | None) -> str:
    """A length of time in the unit that suits it."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    if value < 99.5:
        return f"{value:.2g} s" if value < 9.95 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds and minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def iso(moment: float) -> str:
    """Unix seconds as `datetime` attributes want them."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clock(moment: float) -> str:
    """Unix seconds as a date and time of day that say their zone."""
    return datetime.fromtimestamp(moment, UTC).strftime("%d %b %Y, %H:%M:%S UTC")


def plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
