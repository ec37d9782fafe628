"""What every device sent and received, in bytes of encoded frames, counted where they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Ledger:
    """Bytes by device: [up, down, of which for evaluation]."""

    entries: dict[str, list[int]] = field(default_factory=dict)
    refused: int = 0

    def count(self, device: str, *, up: int = 0, down: int = 0, evaluation: bool = False) -> None:
        entry = self.entries.setdefault(device, [0, 0, 0])
        entry[0] += up
        entry[1] += down
        entry[2] += (up + down) if evaluation else 0

    @property
    def up(self) -> int:
        return sum(entry[0] for entry in self.entries.values())

    @property
    def down(self) -> int:
        return sum(entry[1] for entry in self.entries.values())

    @property
    def evaluation(self) -> int:
        return sum(entry[2] for entry in self.entries.values())

    @staticmethod
    def restore(entries: Mapping[str, Sequence[int]], refused: int) -> Ledger:
        return Ledger(entries={name: list(entry) for name, entry in entries.items()}, refused=refused)
