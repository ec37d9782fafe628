"""Examples as ids and batches: what is padded, cut, labelled and drawn."""

from __future__ import annotations

import pytest
import torch

from fedloom.client.data import IGNORED, Dataset, Example, batches, class_id
from fedloom.client.model import Resident


def _dataset(resident: Resident, examples: list[Example], max_length: int = 64) -> Dataset:
    return Dataset(examples, resident, max_length=max_length, name="a's training data")


def test_prompt_completion_and_end(llama: Resident, examples: list[Example]) -> None:
    encode = lambda text: llama.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    one = _dataset(llama, examples).encoded[0]
    answer = [*encode('lamp(state="on")'), llama.tokenizer.eos_token_id]
    assert list(one.ids) == [llama.tokenizer.bos_token_id, *encode("turn on the lamp"), *answer]
    assert one.answer == len(answer)


def test_no_begin_token_where_the_tokenizer_adds_none(gpt2: Resident, examples: list[Example]) -> None:
    one = _dataset(gpt2, examples).encoded[0]
    assert gpt2.tokenizer.decode(one.ids[: -one.answer]) == "turn on the lamp"


def test_completions_end_at_the_right_edge(llama: Resident, examples: list[Example]) -> None:
    data = _dataset(llama, examples)
    batch = data.batch([0, 2, 3])
    length = batch.ids.shape[1]
    for row, index in enumerate((0, 2, 3)):
        one = data.encoded[index]
        fill = length - len(one.ids)
        assert batch.ids[row, fill:].tolist() == list(one.ids)
        assert batch.mask[row].tolist() == [0] * fill + [1] * len(one.ids)
        assert batch.positions[row].tolist() == [0] * fill + list(range(len(one.ids)))
        counted = batch.labels[row] != IGNORED
        assert batch.labels[row][counted].tolist() == list(one.ids[-one.answer :])
        assert counted.tolist() == sorted(counted.tolist())
    assert batch.tokens == int((batch.labels != IGNORED).sum())


def test_long_prompts_are_cut_from_the_left(llama: Resident) -> None:
    whole = _dataset(llama, [Example(prompt="abcdefghijklmnop", completion="xyz")]).encoded[0]
    cut = _dataset(llama, [Example(prompt="abcdefghijklmnop", completion="xyz")], max_length=9).encoded[0]
    assert len(cut.ids) == 9
    assert cut.ids == (whole.ids[0], *whole.ids[-8:])
    assert llama.tokenizer.decode(cut.ids[1 : -cut.answer]) == "mnop"


def test_a_completion_that_does_not_fit(llama: Resident) -> None:
    data = [Example(prompt="a", completion="b"), Example(prompt="a", completion="xyz" * 20)]
    with pytest.raises(
        ValueError, match=r"a's training data, example 1: a completion must fit into 9 tokens .* got 61"
    ):
        _dataset(llama, data, max_length=10)


def test_an_empty_prompt(gpt2: Resident, llama: Resident) -> None:
    assert len(_dataset(llama, [Example(prompt="", completion="b")]).encoded[0].ids) == 3
    with pytest.raises(ValueError, match="example 0: a prompt must have at least one token"):
        _dataset(gpt2, [Example(prompt="", completion="b")])


def test_a_device_without_examples(llama: Resident) -> None:
    with pytest.raises(ValueError, match="a's training data must have at least one example, got none"):
        _dataset(llama, [])


CHAT = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "lamp on"},
    {"role": "assistant", "content": "done"},
)


def test_chats_without_a_template_join_roles(llama: Resident) -> None:
    one = _dataset(llama, [Example(prompt="", messages=CHAT)]).encoded[0]
    text = llama.tokenizer.decode(one.ids[1:])
    assert text == "system: be brief\nuser: lamp on\nassistant: done</s>"
    assert llama.tokenizer.decode(one.ids[-one.answer :]) == "done</s>"


@pytest.mark.parametrize(("end", "begin"), [("</s>\n", ""), ("|", ""), ("</s>", "<s>")])
def test_chats_with_a_template(llama: Resident, monkeypatch: pytest.MonkeyPatch, end: str, begin: str) -> None:
    template = (
        begin + "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(llama.tokenizer, "chat_template", template)
    one = _dataset(llama, [Example(prompt="", messages=CHAT)]).encoded[0]
    answer = llama.tokenizer.decode(one.ids[-one.answer :])
    assert answer == ("done</s>" if "</s>" in end else "done|</s>")
    assert list(one.ids).count(llama.tokenizer.bos_token_id) == 1
    assert llama.tokenizer.decode(one.ids[: -one.answer]).endswith("[assistant]")


def test_texts_and_classes(classifier: Resident, examples: list[Example]) -> None:
    data = _dataset(classifier, examples)
    batch = data.batch([0, 2])
    assert batch.labels.tolist() == [0, 0]
    assert batch.ids[0, 0] == classifier.tokenizer.cls_token_id
    short = len(data.encoded[2].ids)
    assert batch.mask[1].tolist() == [1] * short + [0] * (batch.ids.shape[1] - short)
    assert batch.tokens == 2
    cut = _dataset(classifier, examples, max_length=5).encoded[1]
    assert cut.ids[:4] == data.encoded[1].ids[:4]
    assert len(cut.ids) == 5
    assert cut.ids[-1] == classifier.tokenizer.sep_token_id


@pytest.mark.parametrize(("label", "number"), [("oven", 1), ("2", 2), ("0", 0)])
def test_labels(label: str, number: int) -> None:
    assert class_id(label, ("lamp", "oven", "alarm")) == number


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("oben", "one of 3 classes, got 'oben'; did you mean 'oven'"),
        ("3", "got '3'; known: alarm, lamp, oven"),
        ("", "got ''"),
        ("-1", "got '-1'"),
    ],
)
def test_bad_labels(label: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_id(label, ("lamp", "oven", "alarm"))


def test_batches_go_through_epochs(llama: Resident) -> None:
    data = _dataset(llama, [Example(prompt=letter, completion="x") for letter in "abcdef"])

    def order(seed: int) -> list[list[int]]:
        drawn = batches(data, 2, 6, torch.Generator().manual_seed(seed))
        return [batch.ids[:, 1].tolist() for batch in drawn]

    drawn = order(0)
    everything = sorted(one.ids[1] for one in data.encoded)
    for epoch in (drawn[:3], drawn[3:]):
        assert sorted(token for batch in epoch for token in batch) == everything
    assert drawn[:3] != drawn[3:]
    assert order(0) == drawn != order(1)


def test_a_device_with_one_example(llama: Resident) -> None:
    data = _dataset(llama, [Example(prompt="a", completion="x")])
    drawn = list(batches(data, 8, 3, torch.Generator()))
    assert [batch.ids.shape[0] for batch in drawn] == [1, 1, 1]
