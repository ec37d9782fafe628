"""Structures found by probing: the units that the architecture has, and a plain refusal of what cannot be described."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from prunings import DECODERS, KINDS, make_model

from fedloom.client.lora import Adapters, find_targets
from fedloom.client.model import hash_state
from fedloom.client.pruning.describe import describe
from fedloom.client.pruning.structure import Structure, kept, with_structure
from fedloom.protocols.messages import Axis, ModelSpec
from fedloom.strategies.choosing import GroupKind

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA: dict[str, Any] = {**SMALL, "num_key_value_heads": 3}

# layer, output projection, its columns per unit, and the rows per unit of what it reads
WANTED = {
    "llama": ("model.layers.{}", "self_attn.o_proj", 8, {"q_proj": 8, "k_proj": 4, "v_proj": 4}, (0,)),
    "qwen2": ("model.layers.{}", "self_attn.o_proj", 8, {"q_proj": 8, "k_proj": 4, "v_proj": 4}, (0,)),
    "qwen3": ("model.layers.{}", "self_attn.o_proj", 12, {"q_proj": 12, "k_proj": 6, "v_proj": 6}, (0,)),
    "gpt2": ("transformer.h.{}", "attn.c_proj", 4, {"c_attn": 4}, (0, 24, 48)),
    "bert": ("bert.encoder.layer.{}", "attention.output.dense", 4, {"query": 4, "key": 4, "value": 4}, (0,)),
    "roberta": ("roberta.encoder.layer.{}", "attention.output.dense", 4, {"query": 4, "key": 4, "value": 4}, (0,)),
}
FFN = {
    "llama": ("mlp.down_proj", {"mlp.gate_proj", "mlp.up_proj"}),
    "qwen2": ("mlp.down_proj", {"mlp.gate_proj", "mlp.up_proj"}),
    "qwen3": ("mlp.down_proj", {"mlp.gate_proj", "mlp.up_proj"}),
    "gpt2": ("mlp.c_proj", {"mlp.c_fc"}),
    "bert": ("output.dense", {"intermediate.dense"}),
    "roberta": ("output.dense", {"intermediate.dense"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_and_channel_is_found(kind: str) -> None:
    structure = describe(make_model(kind))
    layer, sink, width, sources, offsets = WANTED[kind]
    heads = 3 if kind in DECODERS and kind != "gpt2" else 6
    assert structure.layers == 3
    assert structure.units == {
        f"{layer.format(i)}.{what}": units for i in range(3) for what, units in (("attention", heads), ("ffn", 20))
    }
    for number in range(3):
        group = structure.groups[f"{layer.format(number)}.attention"]
        assert (group.kind, group.layer) == (GroupKind.ATTENTION, number)
        assert group.sink == f"{layer.format(number)}.{sink}"
        assert (group.columns.width, group.columns.offsets) == (width, (0,))
        assert {name.rpartition(".")[2]: axis.width for name, axis in group.sources.items()} == sources
        assert all(axis.offsets == offsets for axis in group.sources.values())
        ffn = structure.groups[f"{layer.format(number)}.ffn"]
        assert (ffn.kind, ffn.layer) == (GroupKind.FFN, number)
        down, up = FFN[kind]
        assert ffn.sink == f"{layer.format(number)}.{down}"
        assert ffn.sources.keys() == {f"{layer.format(number)}.{name}" for name in up}
        assert all((axis.width, axis.offsets) == (1, (0,)) for axis in (ffn.columns, *ffn.sources.values()))


def test_gpt2_shrinks_what_it_splits_by() -> None:
    group = describe(make_model("gpt2")).groups["transformer.h.1.attention"]
    assert set(group.attributes) == {("transformer.h.1.attn", "num_heads"), ("transformer.h.1.attn", "split_size")}


@pytest.mark.parametrize("kind", KINDS)
def test_describing_leaves_no_trace(kind: str) -> None:
    model = make_model(kind).train()
    before, state, drawn = describe(model), hash_state(model), torch.random.get_rng_state()
    plain = {name: set(module.__dict__) for name, module in model.named_modules()}
    assert describe(model) == before
    assert hash_state(model) == state
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == plain
    model.eval()
    targets = find_targets(model, "auto", "causal" if kind in DECODERS else "classify")
    Adapters(model, targets)
    assert describe(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_half_precision_is_described_alike(kind: str, dtype: torch.dtype) -> None:
    assert describe(make_model(kind).to(dtype)) == describe(make_model(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_says_what_may_be_pruned(kind: str) -> None:
    model = make_model(kind)
    targets = find_targets(model, "auto", "causal" if kind in DECODERS else "classify")
    structure = describe(model)
    spec = with_structure(ModelSpec(base_hash="h", matrices=targets), structure)
    assert spec.groups == structure.units
    for name, size in spec.matrices.items():
        pooler = name.endswith("pooler.dense")  # outside the layers: adapted, but never pruned
        assert pooler or (size.rows is None) != (size.columns is None)  # one side of each, as FedSpine has it
        for axis, side in ((size.rows, size.d_out), (size.columns, size.d_in)):
            assert axis is None or axis.width * spec.groups[axis.group] * len(axis.offsets) == side


MORE: dict[str, Callable[[], Any]] = {
    "a fused gate and up": lambda: t.Glm4ForCausalLM(t.Glm4Config(**GQA, head_dim=8)),
    "interleaved q, k, v": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL)),
    "ReLU": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=64,
            hidden_size=48,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            word_embed_proj_dim=48,
        )
    ),
    "sliding windows": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GQA, head_dim=8)),
    "narrow embeddings": lambda: t.ElectraForSequenceClassification(t.ElectraConfig(**SMALL, embedding_size=16)),
    "parallel blocks": lambda: t.PhiForCausalLM(t.PhiConfig(**GQA)),
    "disentangled attention": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**SMALL)),
    "n_heads": lambda: t.DistilBertModel(
        t.DistilBertConfig(vocab_size=64, dim=48, hidden_dim=80, n_layers=2, n_heads=6)
    ),
}


@pytest.mark.parametrize("what", MORE)
def test_other_families(what: str) -> None:
    units = list(describe(MORE[what]()).units.values())
    assert units in ([3, 80, 3, 80], [6, 80, 6, 80])


def test_a_fused_gate_and_up_has_two_parts() -> None:
    structure = describe(MORE["a fused gate and up"]())
    assert structure.rows["model.layers.0.mlp.gate_up_proj"].offsets == (0, 80)


def test_a_single_key_value_head_stays_whole() -> None:
    structure = describe(t.LlamaForCausalLM(t.LlamaConfig(**{**GQA, "num_key_value_heads": 1})))
    assert {group.kind for group in structure.groups.values()} == {GroupKind.FFN}
    assert len(structure.groups) == 2


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "experts": (
        lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(**GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
        r"layers\.0\.mlp\.experts\.gate_up_proj must be the weight of a linear layer .* \(a mixture of experts",
    ),
    "a fused q, k, v of unequal parts": (
        lambda: t.Phi3ForCausalLM(t.Phi3Config(**GQA)),
        r"layers\.0\.self_attn\.qkv_proj must make 3 equal units, .* takes 32 of 96 rows, from \[0, 48, 72\]",
    ),
    "a norm over all heads": (
        lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**GQA)),
        r"layers\.0\.self_attn\.q_proj must make .* all inputs of model\.layers\.0\.self_attn\.o_proj hang together",
    ),
    "slopes by head": (
        lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=64, hidden_size=48, n_layer=2, n_head=6)),
        r"transformer\.h\.0\.attention cannot be pruned: without some of its units the model fails",
    ),
    "an encoder with a decoder": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=2)),
        "must be an encoder or a decoder to be pruned, got T5ForConditionalGeneration",
    ),
    "one layer many times": (
        lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**SMALL, embedding_size=16)),
        "must have a list of its 2 layers to be pruned, AlbertForSequenceClassification has none",
    ),
    "no attention": (
        lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)),
        r"backbone\.layers\.0\.mixer\.A_log must be the weight of a linear layer",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_described_is_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        describe(make())


def test_kept_indices_go_through_every_part() -> None:
    keep = {"g": np.array([False, True, True])}
    assert kept(Axis(group="g", width=2, offsets=(0, 6)), 12, keep) is not None
    np.testing.assert_array_equal(kept(Axis(group="g", width=2, offsets=(0, 6)), 12, keep), [2, 3, 4, 5, 8, 9, 10, 11])
    assert kept(Axis(group="other", width=1), 3, keep) is None
    assert kept(None, 3, keep) is None
    assert Structure(layers=0, groups={}).units == {}
