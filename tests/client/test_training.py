"""The tuner: which tokens count, what accumulates, what stays frozen, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import RobertaConfig, RobertaForSequenceClassification

from fedloom.client.data import Dataset, Example
from fedloom.client.model import Resident, load_model
from fedloom.client.starting import starting_payload
from fedloom.client.training import forward_logits, loss_sum, tune
from fedloom.protocols import config
from fedloom.protocols.messages import LowRank, Payload, Start, Task


def _task(**knobs: Any) -> Task:
    return Task(device="a", round=1, rank=4, alpha=8.0, start_from=Start.FRESH, knobs=knobs)


def _train(resident: Resident, examples: list[Example], task: Task) -> tuple[Mapping[str, float], dict[str, LowRank]]:
    resident.base.apply(("test", object()), Payload())
    start = starting_payload(task, resident.spec, {}, None)
    resident.adapters.set_factors(start.factors, train_a=task.train_a)
    metrics = tune(resident, Dataset(examples, resident, max_length=64, name="a"), task)
    return metrics, resident.adapters.get_factors()


def _distance(x: Mapping[str, LowRank], y: Mapping[str, LowRank]) -> float:
    return max(float(np.abs(x[name].b - y[name].b).max() + np.abs(x[name].a - y[name].a).max()) for name in x)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_that_of_completions_alone(
    kind: str, request: pytest.FixtureRequest, examples: list[Example]
) -> None:
    """A padded batch, with logits for a strip of columns, against each example alone under transformers' own loss."""
    resident: Resident = request.getfixturevalue(kind)
    resident.base.restore()
    data = Dataset(examples, resident, max_length=64, name="a")
    batch = data.batch(range(4))
    total = 0.0
    with torch.no_grad(), resident.adapters.disabled():
        got = loss_sum(forward_logits(resident, batch), batch.labels).item()
        for one in data.encoded:
            labels = torch.tensor([[-100] * (len(one.ids) - one.answer) + list(one.ids[-one.answer :])])
            total += resident.model(input_ids=torch.tensor([one.ids]), labels=labels).loss.item() * one.answer
    assert got == pytest.approx(total, rel=1e-5)
    assert batch.tokens == sum(one.answer for one in data.encoded)


def test_what_fills_a_batch_has_no_effect(llama: Resident, examples: list[Example]) -> None:
    """Ids under the padding can be anything, and so can the prompts of other rows."""
    data = Dataset(examples, llama, max_length=64, name="a")
    batch = data.batch(range(4))
    with torch.no_grad():
        before = forward_logits(llama, batch)
        batch.ids[batch.mask == 0] = 17
        torch.testing.assert_close(forward_logits(llama, batch), before)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulation_equals_one_big_batch(llama: Resident, examples: list[Example], optimizer: str) -> None:
    """Batches of unequal lengths: the mean is over all their tokens, not of their means."""
    many = [Example(prompt=e.prompt, completion=e.completion * times) for e in examples for times in (1, 3)]
    lr = 1e-2 if optimizer == "adamw" else 1.0
    whole = _train(llama, many, _task(batch_size=8, accumulate=1, steps=3, optimizer=optimizer, lr=lr))
    parts = _train(llama, many, _task(batch_size=2, accumulate=4, steps=3, optimizer=optimizer, lr=lr))
    assert parts[0]["tokens"] == whole[0]["tokens"]
    assert parts[0]["loss_sum"] == pytest.approx(whole[0]["loss_sum"], rel=1e-5)
    assert _distance(whole[1], parts[1]) < (2e-3 if optimizer == "adamw" else 2e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_equal_plain_torch(llama: Resident, examples: list[Example], optimizer: str) -> None:
    """The flat vector, the fused layer and the clipping against torch's own, parameter by parameter."""
    knobs: dict[str, Any] = {
        "lr": 0.01,
        "steps": 3,
        "batch_size": 4,
        "weight_decay": 0.1,
        "clip": 0.05,
        "momentum": 0.9,
    }
    task = _task(optimizer=optimizer, **knobs)
    _, got = _train(llama, examples, task)
    data = Dataset(examples, llama, max_length=64, name="a")
    llama.adapters.set_factors(starting_payload(task, llama.spec, {}, None).factors)
    parameters = llama.adapters.parameters()
    if optimizer == "adamw":
        reference: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    else:
        reference = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        reference.zero_grad()
        batch = data.batch(range(4))
        F.cross_entropy(forward_logits(llama, batch).flatten(0, 1), batch.labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        reference.step()
    assert _distance(got, llama.adapters.get_factors()) < (1e-3 if optimizer == "adamw" else 1e-6)


def test_a_frozen_a_stays(llama: Resident, examples: list[Example]) -> None:
    task = Task(
        device="a", round=1, rank=4, alpha=8.0, start_from=Start.FRESH, train_a=False, knobs={"steps": 2, "lr": 0.01}
    )
    start = starting_payload(task, llama.spec, {}, None)
    _, after = _train(llama, examples, task)
    for name, factor in after.items():
        np.testing.assert_array_equal(factor.a, start.factors[name].a)
        assert np.abs(factor.b).max() > 0


def test_the_base_stays(llama: Resident, examples: list[Example]) -> None:
    llama.base.restore()
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items() if ".lora_" not in name}
    _train(llama, examples, _task(steps=2))
    after = llama.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_is_deterministic_and_leaves_the_global_generator_alone(
    llama: Resident, examples: list[Example], dropout: float
) -> None:
    state = torch.get_rng_state()
    first, again = (_train(llama, examples, _task(steps=3, dropout=dropout)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert first[0] == again[0]
    assert _distance(first[1], again[1]) == 0


def test_dropout_does_something(llama: Resident, examples: list[Example]) -> None:
    plain, dropped = (_train(llama, examples, _task(steps=3, dropout=rate))[1] for rate in (0.0, 0.5))
    assert _distance(plain, dropped) > 0


def test_the_dtype_of_the_base(tiny_llama: Path, examples: list[Example]) -> None:
    """On a bfloat16 base the adapter trains in float32, and the loss falls."""
    resident = load_model(config.Model(path=str(tiny_llama), dtype="bfloat16"), config.Lora(), seed=0)
    early, _ = _train(resident, examples, _task(steps=1))
    _, factors = _train(resident, examples, _task(steps=30, lr=0.01))
    data = Dataset(examples, resident, max_length=64, name="a")
    batch = data.batch(range(4))
    with torch.no_grad():
        late = loss_sum(forward_logits(resident, batch), batch.labels).item()
    assert late < early["loss_sum"] - 5
    assert {factor.b.dtype for factor in factors.values()} == {np.dtype(np.float32)}


def test_divergence_is_an_error(llama: Resident, examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="training diverged: "):
        _train(llama, examples, _task(steps=20, lr=1e20, optimizer="sgd", clip=0.0))


def test_bad_knobs(llama: Resident, examples: list[Example]) -> None:
    with pytest.raises(ValueError, match=r"training knobs must be as in a recipe: steps: .*, got 0"):
        _train(llama, examples, _task(steps=0))


def test_a_classifier_trains_its_head(classifier: Resident, examples: list[Example]) -> None:
    classifier.base.restore()
    before = {name: head.detach().clone() for name, head in classifier.base.heads.items()}
    metrics, _ = _train(classifier, examples, _task(steps=20, lr=0.01))
    assert metrics["tokens"] == metrics["n"] == 80
    assert metrics["loss_sum"] / 80 < math.log(3)
    assert all(not torch.equal(head, before[name]) for name, head in classifier.base.heads.items())
    classifier.base.restore()
    assert all(torch.equal(head, before[name]) for name, head in classifier.base.heads.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batches_need_only_a_strip_of_logits(
    kind: str, request: pytest.FixtureRequest, examples: list[Example]
) -> None:
    resident: Resident = request.getfixturevalue(kind)
    assert "logits_to_keep" in resident.forward_options
    batch = Dataset(examples, resident, max_length=64, name="a").batch(range(4))
    assert forward_logits(resident, batch).shape == (4, batch.width, 300)
    assert batch.width < batch.ids.shape[1]


def test_classifiers_keep_their_own_positions(classifier: Resident, examples: list[Example]) -> None:
    """RoBERTa counts positions from its padding id: texts must not be given others."""
    settings = RobertaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        pad_token_id=classifier.tokenizer.pad_token_id,
    )
    resident = replace(classifier, model=RobertaForSequenceClassification(settings).eval())
    data = Dataset(examples, resident, max_length=64, name="a")
    with torch.no_grad():
        got = forward_logits(resident, data.batch(range(4)))
        for row, one in enumerate(data.encoded):
            alone = resident.model(input_ids=torch.tensor([one.ids])).logits[0]
            torch.testing.assert_close(got[row], alone, atol=1e-5, rtol=1e-4)


def test_models_without_the_option_give_the_same(
    llama: Resident, examples: list[Example], payload_for: Callable[..., Payload]
) -> None:
    llama.adapters.set_factors(payload_for(llama.spec, 0).factors)
    batch = Dataset(examples, llama, max_length=64, name="a").batch(range(4))
    plain = replace(llama, forward_options=llama.forward_options - {"logits_to_keep", "use_cache"})
    with torch.no_grad():
        torch.testing.assert_close(forward_logits(plain, batch), forward_logits(llama, batch))
