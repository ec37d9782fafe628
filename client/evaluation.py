"""Judging the model on held-out examples: sums and counts, so that a server can pool them over devices.

Exact match takes one forward pass and no generation: greedy decoding gives back the reference (end token and all) if
and only if every token of it is the argmax under teacher forcing. Where all are, greedy decoding has the reference's
own prefix before it at each step; where one is not, it leaves the reference there. `rouge` generates as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import GenerationConfig

from fedloom.client.data import IGNORED, Batch, Dataset
from fedloom.client.model import Resident
from fedloom.client.progress import report
from fedloom.client.training import forward_logits, loss_sum
from fedloom.protocols.config import Evaluation


def evaluate(resident: Resident, dataset: Dataset, settings: Evaluation) -> Mapping[str, float]:
    """Evaluate the resident's model as it stands; each batch is a step that is reported, and may be the last.

    Returns:
        `n` examples, `loss_sum` over `tokens` (for classifiers: texts), of which `token_hits` were predicted right, and
        by task `exact_match_sum` or `accuracy_sum`; with `rouge`, `rouge_l_sum` and `generated_match_sum` as well.
    """
    total: dict[str, float] = {}
    groups = dataset.by_length(settings.batch_size)
    written = groups if settings.rouge and dataset.task == "causal" else []
    of = len(groups) + len(written)
    with torch.inference_mode():
        for step, group in enumerate(groups, 1):
            batch = dataset.batch(group)
            _add(total, _measure(forward_logits(resident, batch), batch))
            report(step, of, total["loss_sum"] / total["tokens"])
        for step, group in enumerate(written, len(groups) + 1):
            _add(total, _judge_text(resident, dataset, group, settings.max_new_tokens))
            report(step, of, total["loss_sum"] / total["tokens"])
    return total


def nothing(task: str) -> dict[str, float]:
    """The sums over no examples, for a device that holds none out."""
    names = ("n", "loss_sum", "tokens", "token_hits", "exact_match_sum" if task == "causal" else "accuracy_sum")
    return dict.fromkeys(names, 0.0)


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


def _measure(logits: Tensor, batch: Batch) -> dict[str, float]:
    right = (logits.argmax(-1) == batch.labels) | (batch.labels == IGNORED)
    measured: dict[str, float] = {
        "n": len(batch.ids),
        "loss_sum": loss_sum(logits, batch.labels).item(),
        "tokens": batch.tokens,
        "token_hits": int(right.sum()) - int((batch.labels == IGNORED).sum()),
    }
    if batch.width:
        measured["exact_match_sum"] = int(right.all(-1).sum())
    else:
        measured["accuracy_sum"] = measured["token_hits"]
    return measured


def generate(resident: Resident, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations of prompts (as ids), each up to and without the end token."""
    end, pad = resident.tokenizer.eos_token_id, resident.tokenizer.pad_token_id
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts], device=resident.device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=pad
    )
    out = resident.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    tails = [row[length:] for row in out.tolist()]
    return [tail[: tail.index(end)] if end in tail else tail for tail in tails]


def _judge_text(resident: Resident, dataset: Dataset, group: list[int], max_new_tokens: int) -> dict[str, float]:
    chosen = [dataset.encoded[index] for index in group]
    made = generate(resident, [list(one.ids[: -one.answer]) for one in chosen], max_new_tokens)
    decode = resident.tokenizer.decode
    texts = [decode(ids, skip_special_tokens=True) for ids in made]
    wanted = [decode(list(one.ids[-one.answer :]), skip_special_tokens=True) for one in chosen]
    scorer = RougeScorer(["rougeL"])
    rouge = sum(scorer.score(want, text)["rougeL"].fmeasure for want, text in zip(wanted, texts, strict=True))
    same = sum(want == text for want, text in zip(wanted, texts, strict=True))
    return {"rouge_l_sum": float(rouge), "generated_match_sum": float(same)}
