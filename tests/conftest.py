"""Tiny random models with tokenizers of their own, made once per session, and a few examples."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: tests ask no hub
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fedloom.client.data import Example

# The same examples every time, so that a red run can be run again; FEDLOOM_EXPLORE=1 looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("explore" if os.environ.get("FEDLOOM_EXPLORE") else "repeatable")


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """Commands set up Fedloom's loggers for a process of their own; tests share one."""
    known = [logging.getLogger(name) for name in ("fedloom", "fedloom.server", "fedloom.client")]
    before = [(logger.level, logger.propagate, logger.disabled, list(logger.handlers)) for logger in known]
    yield
    for logger, (level, propagate, disabled, handlers) in zip(known, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.disabled, logger.handlers = propagate, disabled, handlers


VOCABULARY = 300
_CORPUS = ["turn on the lamp", "turn off the oven", "set the alarm to seven", 'lamp(state="on")', 'oven(state="off")']


def _tokenizer(special: dict[str, str], template: str = "") -> PreTrainedTokenizerFast:
    """Byte-level BPE over a handful of sentences."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    tokens = list(special.values())
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=tokens, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(_CORPUS, trainer)
    if template:
        ids = [(token, core.token_to_id(token)) for token in tokens if token in template]
        core.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _seeded(make: Any, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = make(config)
        return model


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 2-layer Llama; its tokenizer adds a begin token and has no padding token."""
    tokenizer = _tokenizer({"bos_token": "<s>", "eos_token": "</s>"}, "<s> $A")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(tmp_path_factory.mktemp("llama"), _seeded(LlamaForCausalLM, config), tokenizer)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 2-layer GPT-2, whose layers are Conv1D."""
    tokenizer = _tokenizer({"eos_token": "<|endoftext|>"})
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=end, eos_token_id=end
    )
    return _save(tmp_path_factory.mktemp("gpt2"), _seeded(GPT2LMHeadModel, config), tokenizer)


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 2-layer BERT for sequence classification."""
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = _tokenizer(special, "[CLS] $A [SEP]")
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=3,
    )
    return _save(tmp_path_factory.mktemp("bert"), _seeded(BertForSequenceClassification, config), tokenizer)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Four requests with different answers, of different lengths."""
    return [
        Example(prompt="turn on the lamp", completion='lamp(state="on")', label="lamp", owner="a"),
        Example(prompt="turn off the oven", completion='oven(state="off")', label="oven", owner="a"),
        Example(prompt="lamp off", completion='lamp(state="off")', label="lamp", owner="b"),
        Example(prompt="set the alarm to seven", completion="alarm(7)", label="alarm", owner="b"),
    ]
