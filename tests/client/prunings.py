"""Residents of every family that can be pruned, tiny and random, with weights large enough for units to matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedloom.client.model import Resident, load_model
from fedloom.protocols import config
from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import LowRank, MatrixSpec
from fedloom.strategies.masked import Bits

DECODERS = ("llama", "qwen2", "qwen3", "gpt2")
ENCODERS = ("bert", "roberta")
KINDS = (*DECODERS, *ENCODERS)
LABELS = ("lamp", "oven", "alarm")

Residents = dict[str, Resident]

_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 20,
    "initializer_range": 0.3,
}
_GQA: dict[str, Any] = {**_SIZES, "num_key_value_heads": 3, "bos_token_id": 0, "eos_token_id": 1}
_ENCODER: dict[str, Any] = {**_SIZES, "max_position_embeddings": 80, "num_labels": 3}


def make_model(kind: str, **other: Any) -> Any:
    """A model of a family; 3 layers, 3 key-value heads of 2 query heads each (6 plain heads where there are none)."""
    makers: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**_GQA, "tie_word_embeddings": True, **other})),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**_GQA, **other})),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**_GQA, "head_dim": 6, **other})),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**{**_SIZES, "n_inner": 20, "n_positions": 80, **_ends(), **other})),
        "bert": lambda: BertForSequenceClassification(BertConfig(**{**_ENCODER, "pad_token_id": 2, **other})),
        "roberta": lambda: RobertaForSequenceClassification(
            RobertaConfig(**{**_ENCODER, "pad_token_id": 1, **_ends(), **other})
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = makers[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norms, which start at 0 and 1
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def _ends() -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": 1}


def make_resident(kind: str, folder: Path, tokenizer: Path, dtype: Any = "float32") -> Resident:
    """A resident of a family, loaded to be pruned, its adapters at random."""
    make_model(kind).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    task: Any = "classify" if kind in ENCODERS else "causal"
    settings = config.Model(path=str(folder), task=task, labels=LABELS, dtype=dtype)
    resident = load_model(settings, config.Lora(), seed=0, prunable=True)
    set_adapters(resident, 1)
    return resident


def set_adapters(resident: Resident, seed: int, rank: int = 2) -> None:
    """Random adapters, of the sizes that the model has now."""
    resident.adapters.set_factors(random_factors(resident.adapters.matrices, seed, rank))


def random_factors(matrices: dict[str, MatrixSpec], seed: int, rank: int = 2) -> dict[str, LowRank]:
    """Factors that move every matrix by about a third of its weights."""
    return {
        name: LowRank(
            b=initial_a(seed, f"{name}/b", size.d_out, rank), a=initial_a(seed, f"{name}/a", rank, size.d_in), alpha=4.0
        )
        for name, size in matrices.items()
    }


def random_keep(units: dict[str, int], seed: int) -> dict[str, Bits]:
    """Some units of most groups: from one to all, and now and then a group that is not named."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    keep = {}
    for name, count in units.items():
        bits = np.zeros(count, np.bool_)
        bits[generator.permutation(count)[: generator.integers(1, count + 1)]] = True
        if generator.random() < 0.9:
            keep[name] = bits
    return keep


def inputs(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Three texts of different lengths, padded on the side that Fedloom pads: left for decoders."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 5)):
        where = slice(9 - padding, 9) if kind in ENCODERS else slice(0, padding)
        mask[row, where] = 0
        ids[row, where] = {"bert": 2, "roberta": 1}.get(kind, 0)
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits where there is text."""
    found: torch.Tensor = model(**batch).logits
    return found if found.ndim == 2 else found[batch["attention_mask"].bool()]


def make_residents(factory: pytest.TempPathFactory, llama: Path, classifier: Path) -> Residents:
    """One of every kind, each in a folder of its own, with the tokenizer of one of these models."""
    return {
        kind: make_resident(kind, factory.mktemp(kind), classifier if kind in ENCODERS else llama) for kind in KINDS
    }
