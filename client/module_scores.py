"""How much each module's gradient matters, measured while its adapter trains (FedPipe's warm-up).

score_m = 0.9 score_m + 0.1 sum |g * (W + scaling B A)|      g from the adapter's gradients (pruning/importance.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedloom.client.lora import Adapters
from fedloom.client.pruning.importance import DECAY, entry_scores
from fedloom.strategies.unequal import SCORE


@dataclass(kw_only=True)
class ModuleScores:
    """Scores that follow the steps of a training."""

    scores: dict[str, float] = field(default_factory=dict)

    def observe(self, adapters: Adapters) -> None:
        """Take in the gradients that the adapters hold: after `backward`, before they are zeroed."""
        for name, layer in adapters.active.items():
            now = float(entry_scores(layer)[0].sum())
            before = self.scores.get(name)
            self.scores[name] = now if before is None else DECAY * before + (1 - DECAY) * now

    def metrics(self) -> Mapping[str, float]:
        """As an update reports them."""
        return {SCORE + name: value for name, value in self.scores.items()}
