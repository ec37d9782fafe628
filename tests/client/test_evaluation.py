"""Exact match by one forward pass against generation, and sums that do not depend on batching."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.client.data import Dataset, Example
from fedloom.client.evaluation import evaluate, generate
from fedloom.client.model import Resident, load_model
from fedloom.client.progress import Stopped, watching
from fedloom.client.starting import starting_payload
from fedloom.client.training import tune
from fedloom.protocols import config
from fedloom.protocols.config import Evaluation
from fedloom.protocols.messages import Start, Task


def _learn(resident: Resident, examples: list[Example], steps: int, lr: float = 0.01) -> None:
    task = Task(
        device="a",
        round=1,
        rank=8,
        alpha=16.0,
        start_from=Start.FRESH,
        knobs={"steps": steps, "lr": lr, "batch_size": 4},
    )
    resident.base.restore()
    resident.adapters.set_factors(starting_payload(task, resident.spec, {}, None).factors)
    tune(resident, Dataset(examples, resident, max_length=64, name="a"), task)


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def taught(request: pytest.FixtureRequest, examples: list[Example]) -> Iterator[Resident]:
    """A model that knows some of the examples by heart, and not others."""
    resident = load_model(config.Model(path=str(request.getfixturevalue(request.param))), config.Lora(), seed=0)
    _learn(resident, examples[:2], 60)
    return resident


def test_exact_match_is_what_greedy_decoding_gives(taught: Resident, examples: list[Example]) -> None:
    data = Dataset(examples, taught, max_length=64, name="a")
    prompts = [list(one.ids[: -one.answer]) for one in data.encoded]
    wanted = [list(one.ids[-one.answer : -1]) for one in data.encoded]
    longest = max(one.answer for one in data.encoded)
    generated = [made == want for made, want in zip(generate(taught, prompts, longest), wanted, strict=True)]
    alone = []
    for example in examples:
        one = Dataset([example], taught, max_length=64, name="a")
        alone.append(evaluate(taught, one, Evaluation())["exact_match_sum"] == 1)
    assert alone == generated
    assert 0 < sum(alone) < len(alone)
    metrics = evaluate(taught, data, Evaluation(rouge=True))
    assert metrics["exact_match_sum"] == metrics["generated_match_sum"] == sum(generated)
    assert metrics["generated_match_sum"] <= metrics["rouge_l_sum"] <= metrics["n"] == 4


def test_batched_generation_equals_one_by_one(taught: Resident, examples: list[Example]) -> None:
    data = Dataset(examples, taught, max_length=64, name="a")
    prompts = [list(one.ids[: -one.answer]) for one in data.encoded]
    assert generate(taught, prompts, 12) == [generate(taught, [prompt], 12)[0] for prompt in prompts]


def test_sums_do_not_depend_on_batching(taught: Resident, examples: list[Example]) -> None:
    data = Dataset(examples, taught, max_length=64, name="a")
    whole, single = (evaluate(taught, data, Evaluation(batch_size=size)) for size in (64, 1))
    assert whole == pytest.approx(single, rel=1e-5)
    assert whole["tokens"] == sum(one.answer for one in data.encoded)
    assert 0 < whole["token_hits"] < whole["tokens"]


def test_learning_is_real(tiny_llama: Path, examples: list[Example]) -> None:
    resident = load_model(config.Model(path=str(tiny_llama)), config.Lora(), seed=0)
    data = Dataset(examples, resident, max_length=64, name="a")
    before = evaluate(resident, data, Evaluation())
    _learn(resident, examples, 80)
    after = evaluate(resident, data, Evaluation())
    assert before["exact_match_sum"] == 0
    assert after["exact_match_sum"] == after["n"] == 4
    assert after["token_hits"] == after["tokens"]
    assert after["loss_sum"] < before["loss_sum"]


def test_classification(classifier: Resident, examples: list[Example]) -> None:
    _learn(classifier, examples, 200, lr=1e-3)  # faster, and the pooler's tanh saturates
    metrics = evaluate(classifier, Dataset(examples, classifier, max_length=64, name="a"), Evaluation(rouge=True))
    assert metrics["accuracy_sum"] == metrics["n"] == metrics["tokens"] == 4
    assert "exact_match_sum" not in metrics
    assert "rouge_l_sum" not in metrics


def test_decoder_classifiers(tiny_llama: Path, examples: list[Example]) -> None:
    """A Llama reads the class off a text's last token, wherever the padding is."""
    model = config.Model(path=str(tiny_llama), task="classify", labels=("lamp", "oven", "alarm"))
    resident = load_model(model, config.Lora(), seed=0)
    data = Dataset(examples, resident, max_length=64, name="a")
    whole, single = (evaluate(resident, data, Evaluation(batch_size=size)) for size in (64, 1))
    assert whole == pytest.approx(single, rel=1e-5)
    _learn(resident, examples, 40)
    assert evaluate(resident, data, Evaluation())["accuracy_sum"] == 4


def test_each_batch_is_a_step(taught: Resident, examples: list[Example]) -> None:
    data = Dataset(examples, taught, max_length=64, name="a")
    told: list[tuple[int, int, float]] = []
    with watching(lambda *step: told.append(step)):
        metrics = evaluate(taught, data, Evaluation(batch_size=2))
        evaluate(taught, data, Evaluation(batch_size=3, rouge=True, max_new_tokens=4))
    assert [step[:2] for step in told] == [(1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert told[1][2] == metrics["loss_sum"] / metrics["tokens"]


def test_an_evaluation_may_be_stopped_at_any_batch(taught: Resident, examples: list[Example]) -> None:
    data = Dataset(examples, taught, max_length=64, name="a")
    before = evaluate(taught, data, Evaluation())
    told: list[int] = []

    def stop(step: int, of: int, loss: float) -> None:
        told.append(step)
        raise Stopped

    with watching(stop), pytest.raises(Stopped):
        evaluate(taught, data, Evaluation(batch_size=1))
    assert told == [1]
    assert evaluate(taught, data, Evaluation()) == before
