"""Private text as batches: examples become token ids once, and batches are put together from those.

Language models: prompt (begin token first, if the tokenizer adds one) + completion + end token, padded on the LEFT, so
that all completions end at the right edge and logits are needed for a strip of columns only. Labels are -100 off the
completion. Classifiers: the text with its special tokens, cut on the right, padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.client.model import Resident
from fedloom.protocols.sections import nearest

IGNORED = -100  # the label of a token that no loss is taken of


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example: a prompt and its completion, a chat, or (with `prompt` as the text) a labelled text."""

    prompt: str
    completion: str = ""
    label: str = ""
    owner: str = ""
    messages: tuple[Mapping[str, str], ...] = ()  # a chat that ends in the assistant's turn; stands for the two above


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One example as ids; `answer` is how many of the last ids are the completion, or the class of a text."""

    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tensors of one forward pass.

    ids, mask, positions [n, length]; labels [n, width]: of the last `width` columns for a language model, or [n], the
    classes; tokens: how many labels count towards the loss.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    width: int
    tokens: int


class Dataset:
    """A device's examples, tokenised once."""

    def __init__(self, examples: Sequence[Example], resident: Resident, *, max_length: int, name: str) -> None:
        """
        Args:
            max_length: longest sequence in tokens; prompts are cut from the left, completions never.
            name: whose data this is, for errors.

        Raises:
            ValueError: for no examples, a completion that does not fit, or a label that the model does not know.
        """
        if not examples:
            raise ValueError(f"{name} must have at least one example, got none")
        self.name, self.examples = name, examples
        self.task = resident.config.task
        self._pad, self._device = resident.tokenizer.pad_token_id, resident.device
        encode = _Encoder(resident, max_length)
        self.encoded = [encode(example, f"{name}, example {index}") for index, example in enumerate(examples)]

    def __len__(self) -> int:
        return len(self.encoded)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Put examples together, padded to the longest of them."""
        chosen = [self.encoded[index] for index in indices]
        length = max(len(one.ids) for one in chosen)
        causal = self.task == "causal"
        ids, mask = [], []
        for one in chosen:
            fill = length - len(one.ids)
            ids.append([self._pad] * fill + list(one.ids) if causal else list(one.ids) + [self._pad] * fill)
            mask.append([0] * fill + [1] * len(one.ids) if causal else [1] * len(one.ids) + [0] * fill)
        width = max(one.answer for one in chosen) if causal else 0
        if causal:
            labels = [[IGNORED] * (width - one.answer) + list(one.ids[-one.answer :]) for one in chosen]
        tokens = sum(one.answer for one in chosen) if causal else len(chosen)
        mask_nl = torch.tensor(mask, device=self._device)
        return Batch(
            ids=torch.tensor(ids, device=self._device),
            mask=mask_nl,
            positions=(mask_nl.cumsum(1) - 1).clamp_(min=0),
            labels=torch.tensor(labels if causal else [one.answer for one in chosen], device=self._device),
            width=width,
            tokens=tokens,
        )

    def by_length(self, batch_size: int) -> list[list[int]]:
        """All examples once, in groups of similar length."""
        order = sorted(range(len(self)), key=lambda index: len(self.encoded[index].ids))
        return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def batches(dataset: Dataset, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Batch]:
    """`steps` batches off an endless stream of epochs, each in an order of its own.

    A batch never holds more than the dataset does: a device with one example has batches of one.
    """
    size = min(batch_size, len(dataset))
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            queue += torch.randperm(len(dataset), generator=generator).tolist()
        yield dataset.batch(queue[:size])
        del queue[:size]


def class_id(label: str, labels: Sequence[str]) -> int:
    """The class that a label names, by its name or its number.

    Raises:
        ValueError: for a label that is not one of `labels`.
    """
    if label in labels:
        return labels.index(label)
    if label.isdecimal() and int(label) < len(labels):
        return int(label)
    raise ValueError(f"a label must be one of {len(labels)} classes, got {label!r}; {nearest(label, labels)}")


class _Encoder:
    """Examples to ids, with what only depends on the tokenizer found out once."""

    def __init__(self, resident: Resident, max_length: int) -> None:
        self._tokenizer, self._labels = resident.tokenizer, resident.labels
        self._classify = resident.config.task == "classify"
        limit = getattr(resident.model.config.get_text_config(), "max_position_embeddings", None) or max_length
        self._room = min(max_length, limit, self._tokenizer.model_max_length)
        begin = self._tokenizer.bos_token_id
        added = self._tokenizer("a")["input_ids"]
        self._begin = [begin] if begin is not None and added[:1] == [begin] else []

    def __call__(self, example: Example, where: str) -> Encoded:
        try:
            return self._text(example) if self._classify else self._completion(example)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _text(self, example: Example) -> Encoded:
        ids = self._tokenizer(example.prompt, truncation=True, max_length=self._room)["input_ids"]
        if not ids:
            raise ValueError("a text must have at least one token, got an empty one")
        return Encoded(ids=tuple(ids), answer=class_id(example.label, self._labels))

    def _completion(self, example: Example) -> Encoded:
        prompt, completion, begin = self._split(example)
        end = self._tokenizer.eos_token_id
        answer = self._ids(completion)
        if end in answer:  # a chat template wrote its own end; nothing after it is asked for
            answer = answer[: len(answer) - answer[::-1].index(end)]
        else:
            answer.append(end)
        room = self._room - len(answer) - len(begin)
        before = self._ids(prompt)
        before = begin + (before[-room:] if room > 0 else [])
        if room < 0 or (room == 0 and not before):
            raise ValueError(
                f"a completion must fit into {self._room - 1} tokens (data.max_length less a prompt), got {len(answer)}"
            )
        if not before:
            raise ValueError("a prompt must have at least one token, got an empty one")
        return Encoded(ids=(*before, *answer), answer=len(answer))

    def _split(self, example: Example) -> tuple[str, str, list[int]]:
        """Prompt, completion, and the begin token where the text does not hold it already."""
        if not example.messages:
            return example.prompt, example.completion, self._begin
        *before, last = example.messages
        if not self._tokenizer.chat_template:
            prompt = "".join(f"{turn['role']}: {turn['content']}\n" for turn in before) + f"{last['role']}: "
            return prompt, last["content"], self._begin
        turns = [dict(turn) for turn in before]
        prompt = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = self._tokenizer.apply_chat_template([*turns, dict(last)], tokenize=False)
        completion = whole.removeprefix(prompt) if whole.startswith(prompt) else last["content"]
        begin = self._begin if not prompt.startswith(self._tokenizer.bos_token or "\0") else []
        return prompt, completion, begin

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
