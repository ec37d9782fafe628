"""How much modules matter: against the gradient that the adapter's own stand for, made dense, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prunings import inputs, logits, make_resident

from fedloom.client.bits import hold
from fedloom.client.lora import ADAPTER
from fedloom.client.model import Resident
from fedloom.client.module_scores import ModuleScores
from fedloom.client.pruning.fluctuation import effective


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Resident:
    return make_resident("gpt2", tmp_path_factory.mktemp("gpt2"), tiny_llama)  # Conv1D: weights lie the other way


def backward(resident: Resident, seed: int) -> None:
    resident.model.zero_grad(set_to_none=True)
    logits(resident.model, inputs("gpt2", seed)).square().mean().backward()  # type: ignore[no-untyped-call]


def dense_score(layer: Any) -> float:
    a, b = (part[ADAPTER].weight.double() for part in (layer.lora_A, layer.lora_B))
    grad_a, grad_b = (part[ADAPTER].weight.grad.double() for part in (layer.lora_A, layer.lora_B))
    g = grad_b @ a + b @ grad_a - grad_b @ grad_a
    return (g * effective(layer).double()).abs().sum().item()


def test_scores_follow_the_steps(resident: Resident) -> None:
    scores, wanted = ModuleScores(), dict[str, float]()
    for step in range(3):
        backward(resident, step)
        scores.observe(resident.adapters)
        for name, layer in resident.adapters.layers.items():
            now = dense_score(layer)
            wanted[name] = now if not step else 0.9 * wanted[name] + 0.1 * now
    assert scores.metrics() == {f"score/{name}": pytest.approx(value, rel=1e-4) for name, value in wanted.items()}


@pytest.mark.parametrize("bits", [8, 4])
def test_a_base_of_few_bits_is_scored_by_the_weights_that_its_codes_stand_for(resident: Resident, bits: int) -> None:
    hold(resident, bits)
    try:
        backward(resident, 0)
        scores = ModuleScores()
        scores.observe(resident.adapters)
        names = list(resident.adapters.layers)
        dense = {name: resident.adapters.layers[name].base_layer.quantised.dense() for name in names}
        grads = {name: _grads(resident.adapters.layers[name]) for name in names}
    finally:
        hold(resident, 16)
    for name in names:
        layer = resident.adapters.layers[name]
        before = layer.base_layer.weight.data
        layer.base_layer.weight.data = dense[name]
        for part, grad in zip((layer.lora_A, layer.lora_B), grads[name], strict=True):
            part[ADAPTER].weight.grad = grad
        assert scores.scores[name] == pytest.approx(dense_score(layer), rel=1e-4)
        layer.base_layer.weight.data = before


def _grads(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (part[ADAPTER].weight.grad.clone() for part in (layer.lora_A, layer.lora_B))
    return a, b


def test_bare_modules_have_no_score(resident: Resident) -> None:
    some = dict(list(resident.adapters.get_factors().items())[::2])
    every = resident.adapters.get_factors()
    resident.adapters.set_factors(some, partial=True)
    backward(resident, 0)
    scores = ModuleScores()
    scores.observe(resident.adapters)
    assert scores.scores.keys() == some.keys()
    resident.adapters.set_factors(every)
