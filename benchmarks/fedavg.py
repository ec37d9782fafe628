"""Full FedAvg, the yardstick for tuning in a subspace: every weight trained by AdamW, every weight sent.

    w_{t+1} = sum_i p_i w_i,    p_i = n_i / sum n        (McMahan et al. 2017)

A bare loop on the same devices, cohorts, batches and evaluation as Fedloom's runs; bytes are the float32 weights, down
and up, and nothing else. Fedloom does not offer it: it would send 91 MB where the sketch sends 6 kB.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from fedloom.client.data import Dataset, batches
from fedloom.client.evaluation import evaluate
from fedloom.client.model import load_model
from fedloom.client.parts import parameter_names
from fedloom.client.training import forward_logits, loss_sum
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import DeviceReport, Hello, ModelSpec
from fedloom.protocols.seeds import derive_seed
from fedloom.server.pooling import pool
from fedloom.server.roster import Roster
from fedloom.simulations.fleet import Fleet
from fedloom.simulations.world import base_model


def full_fedavg(config: RunConfig) -> list[dict[str, Any]]:
    """Run a recipe's devices under full FedAvg; a record an evaluated round, as metrics.jsonl has them."""
    torch.set_num_threads(config.simulation.threads)
    resident, fleet = load_model(base_model(config), config.lora, seed=config.seed), Fleet(config)
    names = [fleet.name(i) for i in range(config.fleet.devices)]
    train, test = (
        [
            Dataset(getattr(fleet.holding(i), part), resident, max_length=config.data.max_length, name=name)
            for i, name in enumerate(names)
        ]
        for part in ("train", "test")
    )
    reports = [DeviceReport(device=name, examples=len(data), rank=1) for name, data in zip(names, train, strict=True)]
    spec = ModelSpec(base_hash="", matrices={})
    roster = Roster({i: Hello(report=report, spec=spec) for i, report in enumerate(reports)})
    weights = list(parameter_names(resident.model).values())
    size = 4 * sum(weight.numel() for weight in weights)
    records, seconds, sent = [], 0.0, 0
    with resident.adapters.disabled():
        for round in range(config.server.rounds + 1):
            if round:
                began = time.perf_counter()
                cohort = [
                    names.index(r.device) for r in roster.draw(config.server.cohort, seed=config.seed, round=round)
                ]
                _round(config, resident, weights, train, cohort, round)
                seconds += time.perf_counter() - began
                sent += 2 * size * len(cohort)
            every = config.eval.every
            if round in (0, config.server.rounds) or (every and round % every == 0):
                measured = {name: evaluate(resident, data, config.eval) for name, data in zip(names, test, strict=True)}
                pooled = pool(list(measured.values()))
                records.append(
                    {"round": round, "evaluation": pooled, "devices": measured, "seconds": seconds, "bytes": sent}
                )
    return records


def _round(
    config: RunConfig, resident: Any, weights: list[Any], train: list[Dataset], cohort: list[int], round: int
) -> None:
    start = [weight.detach().clone() for weight in weights]
    mean = [torch.zeros_like(weight) for weight in start]
    total = sum(len(train[i]) for i in cohort)
    for i in cohort:
        _train(config, resident, weights, train[i], round)
        for weight, before, into in zip(weights, start, mean, strict=True):
            into.add_(weight.detach(), alpha=len(train[i]) / total)
            weight.data.copy_(before)
    for weight, value in zip(weights, mean, strict=True):
        weight.data.copy_(value)


def _train(config: RunConfig, resident: Any, weights: list[Any], data: Dataset, round: int) -> None:
    knobs = config.train
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "fedavg", round, data.name))
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=knobs.lr, weight_decay=knobs.weight_decay)
    for batch in batches(data, knobs.batch_size, knobs.steps, generator):
        (loss_sum(forward_logits(resident, batch), batch.labels) / batch.tokens).backward()
        torch.nn.utils.clip_grad_norm_(weights, knobs.clip)
        optimizer.step()
        optimizer.zero_grad()
    for weight in weights:
        weight.requires_grad_(False)
