"""Server optimisers on the pseudo-gradient, Reddi et al., Adaptive Federated Optimization (ICLR 2021), Algorithm 2.

    FedAvgM:  m_t = beta m_{t-1} + D_t;                x_t = x_{t-1} + eta m_t          (Hsu et al. 2019)
    FedAdam:  m_t = beta m_{t-1} + (1 - beta) D_t;     v_t = beta2 v_{t-1} + (1 - beta2) D_t^2;
              x_t = x_{t-1} + eta m_t / (sqrt(v_t) + tau),    m_0 = 0, v_0 = tau^2

D_t is the mean change of a round. FedAvgM is linear, so it works on products too: m is then a sum of factors. FedAdam
divides entry by entry, which has no factored form: it is for strategies whose state is the factors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedloom.protocols.messages import Array
from fedloom.strategies.base import Scaling
from fedloom.strategies.lowrank import Delta, bounded, plus

ELEMENTWISE = ("fedit", "ffa", "hetlora")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The options that every strategy which merges updates has: fields only, no behaviour."""

    scaling: Scaling = field(default=Scaling(), metadata={"doc": "How the recipe scales adapters."})
    clip_norm: float = field(
        default=0.0, metadata={"doc": "Scale down an update whose product changes by more than this norm; 0: off."}
    )
    server_optimizer: Literal["none", "fedavgm", "fedadam"] = field(
        default="none", metadata={"doc": "What turns the mean change into a step: none, fedavgm or fedadam."}
    )
    server_lr: float = field(default=1.0, metadata={"doc": "Step size of the server optimiser."})
    server_momentum: float = field(default=0.9, metadata={"doc": "Momentum (FedAvgM) or beta 1 (FedAdam)."})
    server_beta2: float = field(default=0.99, metadata={"doc": "Beta 2 of FedAdam."})
    server_tau: float = field(default=1e-3, metadata={"doc": "Adaptivity of FedAdam, added to the root."})

    def __post_init__(self) -> None:
        if not 0 <= self.clip_norm < np.inf:
            raise ValueError(f"clip_norm must be >= 0, got {self.clip_norm}")
        if self.server_optimizer not in ("none", "fedavgm", "fedadam"):
            raise ValueError(f"server_optimizer must be none, fedavgm or fedadam, got {self.server_optimizer!r}")
        if not 0 < self.server_lr < np.inf or not 0 < self.server_tau < np.inf:
            raise ValueError(f"server_lr and server_tau must be > 0, got {self.server_lr} and {self.server_tau}")
        if not (0 <= self.server_momentum < 1 and 0 <= self.server_beta2 < 1):
            raise ValueError(
                f"server_momentum and server_beta2 must be in [0, 1), got {self.server_momentum}, {self.server_beta2}"
            )


def refuse_elementwise(options: MergeOptions, name: str) -> None:
    """Raise ValueError for FedAdam on a strategy that merges products."""
    if options.server_optimizer == "fedadam":
        raise ValueError(
            f"server_optimizer fedadam must be used with {', '.join(ELEMENTWISE)} (it works entry by entry), got {name}"
        )


def step(
    options: MergeOptions,
    change: Mapping[str, Array],
    moments: Mapping[str, Array],
    measured: Mapping[str, Array] | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The step for each tensor's mean change, and the next moments (`m/<name>`, `v/<name>`).

    `measured` is what FedAdam's v is taken of, where that is not the change itself.
    """
    if options.server_optimizer == "none":
        return dict(change), {}
    beta, beta2, tau = options.server_momentum, options.server_beta2, options.server_tau
    steps: dict[str, Array] = {}
    after: dict[str, Array] = {}
    for name, value in change.items():
        m = moments.get(f"m/{name}", np.zeros_like(value))
        if options.server_optimizer == "fedavgm":
            after[f"m/{name}"] = m = beta * m + value
            steps[name] = options.server_lr * m
            continue
        v = moments.get(f"v/{name}", np.full_like(value, tau**2))
        after[f"m/{name}"] = m = beta * m + (1 - beta) * value
        scale = value if measured is None else measured[name]
        after[f"v/{name}"] = v = beta2 * v + (1 - beta2) * scale**2
        steps[name] = options.server_lr * m / (np.sqrt(v) + tau)
    return steps, after


def step_toward(
    options: MergeOptions, old: Mapping[str, Array], mean: Mapping[str, Array], moments: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The next value of each tensor, from its old value and the clients' mean, and the next moments."""
    if options.server_optimizer == "none":
        return dict(mean), {}
    steps, after = step(options, {name: value - old[name] for name, value in mean.items()}, moments)
    return {name: old[name] + value for name, value in steps.items()}, after


def step_product(options: MergeOptions, change: Delta, momentum: Delta) -> tuple[Delta, Delta]:
    """FedAvgM for one matrix in factored form: the step and the next momentum, in bounded space."""
    if options.server_optimizer == "none":
        return change, Delta()
    momentum = bounded(plus(change, momentum.times(options.server_momentum)))
    return momentum.times(options.server_lr), momentum
