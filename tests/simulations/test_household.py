"""The household task: its text is deterministic and consistent, and the committed base model fits it."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.simulations import household as package
from fedloom.simulations.household import Example, general_examples, household
from fedloom.simulations.household.functions import FUNCTIONS
from fedloom.simulations.household.grammar import SEPARATOR
from fedloom.simulations.household.lexicon import ALIASES, GENERAL, NAMES
from fedloom.simulations.household.pretrain import collate, encode, learning_rate, pretrain

MODEL = Path(package.__file__).parents[1] / "models" / "household"
FLEET = [household(index, seed=0) for index in range(20)]


def mentions(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text.lower()) is not None


def exact_matches(model: Any, tokenizer: Any, examples: list[Example]) -> int:
    """Greedy decoding is exact if and only if every argmax is right under teacher forcing."""
    samples = encode(tokenizer, examples)
    ids_BL, _ = collate(samples, tokenizer.pad_token_id)  # noqa: N806
    with torch.no_grad():
        best_BL = model(input_ids=ids_BL).logits.argmax(-1)  # noqa: N806
    return sum(
        best_BL[row, len(prompt) - 1 : len(prompt) + len(completion) - 1].tolist() == completion
        for row, (prompt, completion) in enumerate(samples)
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    loaded: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return loaded.eval()


def test_the_same_seed_gives_the_same_text() -> None:
    assert general_examples(50, 3) == general_examples(80, 3)[:50]
    assert general_examples(50, 3) != general_examples(50, 4)
    assert household(7, seed=0) == FLEET[7]
    assert household(7, seed=1) != FLEET[7]
    assert household(4321, seed=0).test


def test_text_is_pinned() -> None:
    assert general_examples(2, 0) == [
        Example(
            prompt="start happy sturnthiar 8:45\n",
            completion='{"call": "start_device", "device": "happy sturnthiar", "time": "08:45"}',
            label="start_device",
        ),
        Example(
            prompt="get 5 apples at the shop thank you\n",
            completion='{"call": "add_item", "item": "apples", "count": 5}',
            label="add_item",
        ),
    ]


def test_amounts_are_skewed_and_scale() -> None:
    sizes = [len(home.train) for home in FLEET]
    assert min(sizes) >= 30
    assert max(sizes) <= 300
    assert max(sizes) > 3 * min(sizes)
    half = household(2, seed=0, train_scale=0.5, test_size=10)
    assert len(half.train) == pytest.approx(sizes[2] / 2, abs=1)
    assert half.test == FLEET[2].test[:10]


@pytest.mark.parametrize("home", FLEET, ids=lambda home: str(home.index))
def test_no_test_request_is_in_train(home: package.Household) -> None:
    assert len(home.test) == 30
    assert not {example.prompt for example in home.test} & {example.prompt for example in home.train}


def test_every_completion_is_a_known_call() -> None:
    slots = {function.name: function.slots for function in FUNCTIONS}
    fleet = [example for home in FLEET for example in (*home.train, *home.test)]
    for example in (*general_examples(500, 1), *fleet):
        call = json.loads(example.completion)
        assert example.completion == json.dumps(call)
        assert call.pop("call") == example.label
        assert set(call) <= set(slots[example.label])
        assert example.prompt.endswith(SEPARATOR)
        assert example.prompt.count(SEPARATOR) == 1


def test_the_grammar_is_rich_enough() -> None:
    assert len({function.name for function in FUNCTIONS}) == len(FUNCTIONS) >= 14
    for function in FUNCTIONS:
        assert len(set(function.phrasings)) >= 6
        assert {slot for text in function.phrasings for slot in re.findall(r"{(\w+)}", text)} == set(function.slots)


def test_general_text_holds_no_alias() -> None:
    text = "\n".join(example.prompt + example.completion for example in general_examples(2000, 2))
    assert [alias for table in ALIASES.values() for alias in table if mentions(text, alias)] == []


def test_every_alias_has_one_meaning_which_the_base_model_can_say() -> None:
    surfaces = [alias for table in ALIASES.values() for alias in table]
    assert len(surfaces) == len(set(surfaces))
    for slot, table in ALIASES.items():
        known = {*GENERAL.get(slot, ()), *NAMES.get(slot, ())}
        assert not known & set(table)
        assert all(meaning in known for meaning in table.values() if isinstance(meaning, str))


def test_aliases_mean_the_same_in_every_household_and_are_shared() -> None:
    speakers: defaultdict[str, set[int]] = defaultdict(set)
    for home in FLEET:
        for example in (*home.train, *home.test):
            call = json.loads(example.completion)
            for slot, table in ALIASES.items():
                if slot not in call:
                    continue
                for alias, meaning in table.items():
                    if mentions(example.prompt, alias) and call[slot] == meaning:
                        speakers[alias].add(home.index)
    homes = [len(speakers[alias]) for table in ALIASES.values() for alias in table]
    assert sum(count >= 2 for count in homes) > 0.85 * len(homes)


def test_a_count_or_index_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be >= 0"):
        general_examples(-1, 0)
    with pytest.raises(ValueError, match="index >= 0"):
        household(-1, seed=0)


def test_the_model_is_small(model: Any) -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 10_000_000
    assert 2_000_000 <= model.num_parameters() <= 4_000_000


def test_the_tokenizer_keeps_text_and_is_brief(tokenizer: Any) -> None:
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.padding_side == "right"
    lengths = []
    for example in [example for home in FLEET for example in home.train]:
        prompt, completion = tokenizer(example.prompt)["input_ids"], tokenizer(example.completion)["input_ids"]
        assert tokenizer.decode(prompt) == example.prompt
        assert tokenizer.decode(completion) == example.completion
        lengths.append(len(prompt) + len(completion) + 1)
    assert max(lengths) <= 96
    assert sum(lengths) / len(lengths) <= 48


def test_the_base_model_answers_the_public_but_not_aliases(model: Any, tokenizer: Any) -> None:
    assert exact_matches(model, tokenizer, general_examples(64, 991)) >= 52  # measured: 59
    fleet = [example for home in FLEET for example in home.test]
    coded = [e for e in fleet if any(mentions(e.prompt, alias) for table in ALIASES.values() for alias in table)]
    assert exact_matches(model, tokenizer, coded[:64]) <= 6


def test_pretraining_goes_on_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name, value in {"BATCH": 4, "BUCKET": 2, "CHECKPOINT_EVERY": 3, "TOKENIZER_EXAMPLES": 100}.items():
        monkeypatch.setattr(f"fedloom.simulations.household.pretrain.{name}", value)
    pretrain(tmp_path / "whole", seed=0, steps=5)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(
            "fedloom.simulations.household.pretrain.learning_rate", lambda step, steps: _fail_at(4, step, steps)
        )
        with pytest.raises(InterruptedError):
            pretrain(tmp_path / "parts", seed=0, steps=5)
    pretrain(tmp_path / "parts", seed=0, steps=5)
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=0)


def _fail_at(last: int, step: int, steps: int) -> float:
    if step == last:
        raise InterruptedError
    return learning_rate(step, steps)
