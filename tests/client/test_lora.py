"""Adapters against peft's own, at every rank and scale."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fedloom.client.fused import adapted_linear
from fedloom.client.lora import Adapters, find_targets
from fedloom.client.model import Resident, load_model
from fedloom.protocols import config
from fedloom.protocols.messages import LowRank, Payload

IDS = torch.tensor([[5, 9, 20, 33, 7, 3]])


def _logits(resident: Resident) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = resident.model(input_ids=IDS).logits
        return logits


def _fresh_peft(path: Path, factors: dict[str, LowRank]) -> torch.Tensor:
    """Logits of a new peft wrap that holds these factors."""
    first = next(iter(factors.values()))
    settings = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        use_rslora=first.rslora,
        target_modules=list(factors),  # type: ignore[arg-type]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), settings)
    weights = {}
    for name, factor in factors.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.tensor(factor.a)
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.tensor(factor.b)
    set_peft_model_state_dict(model, weights)  # type: ignore[no-untyped-call]
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
        return logits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_change_of_rank_equals_a_fresh_peft_wrap(
    kind: str, rslora: bool, request: pytest.FixtureRequest, payload_for: Callable[..., Payload]
) -> None:
    resident: Resident = request.getfixturevalue(kind)
    path: Path = request.getfixturevalue(f"tiny_{kind}")
    for rank in (4, 1, 16):
        drawn = payload_for(resident.spec, rank, rank).factors
        factors = {n: LowRank(b=f.b, a=f.a, alpha=3.0, rslora=rslora) for n, f in drawn.items()}
        resident.adapters.set_factors(factors)
        torch.testing.assert_close(_logits(resident), _fresh_peft(path, factors), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6.0 / 4), (True, 6.0 / math.sqrt(4))])
def test_scaling(llama: Resident, payload_for: Callable[..., Payload], rslora: bool, scale: float) -> None:
    drawn = payload_for(llama.spec, 0, 4).factors
    llama.adapters.set_factors({n: LowRank(b=f.b, a=f.a, alpha=6.0, rslora=rslora) for n, f in drawn.items()})
    assert {layer.scaling["default"] for layer in llama.adapters.layers.values()} == {scale}
    back = llama.adapters.get_factors()
    assert all(factor.alpha == 6.0 and factor.rank == 4 and factor.rslora is rslora for factor in back.values())
    for name, factor in back.items():
        np.testing.assert_array_equal(factor.a, drawn[name].a)
        np.testing.assert_array_equal(factor.b, drawn[name].b)


def test_auto_targets_leave_the_heads_out(llama: Resident, gpt2: Resident, classifier: Resident) -> None:
    assert {name.rpartition(".")[2] for name in llama.spec.matrices} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert gpt2.spec.matrices["transformer.h.0.attn.c_attn"].kind == "conv1d"
    assert (gpt2.spec.matrices["transformer.h.0.mlp.c_fc"].d_out, 32) == (128, 32)
    assert not any(name.startswith("classifier") for name in classifier.spec.matrices)
    assert classifier.spec.dense == {"classifier.weight": (3, 32), "classifier.bias": (3,)}


def test_a_classification_head_of_several_layers_is_trained_whole() -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    settings = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    targets = find_targets(RobertaForSequenceClassification(settings), "auto", "classify")
    assert targets
    assert all(name.startswith("roberta.") for name in targets)


def test_targets_by_suffix(tiny_llama: Path) -> None:
    resident = load_model(config.Model(path=str(tiny_llama)), config.Lora(targets=("q_proj", "mlp.up_proj")), seed=0)
    assert {name.rpartition(".")[2] for name in resident.spec.matrices} == {"q_proj", "up_proj"}
    assert len(resident.spec.matrices) == 4


def test_a_target_that_matches_nothing_lists_candidates(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"lora.targets must name linear layers of the model \(q_proj, .*got 'query'"):
        load_model(config.Model(path=str(tiny_llama)), config.Lora(targets=("query",)), seed=0)


def test_tied_weights_are_no_target(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="tied weights, got 'lm_head'"):
        load_model(config.Model(path=str(tiny_llama)), config.Lora(targets=("lm_head",)), seed=0)


def test_rank_above_a_matrix(llama: Resident, payload_for: Callable[..., Payload]) -> None:
    factors = payload_for(llama.spec, 0, 33).factors
    with pytest.raises(ValueError, match=r"rank must be in 1..32 for model.layers.0.mlp.down_proj \[32, 64\], got 33"):
        llama.adapters.set_factors(factors)


def test_factors_must_cover_and_fit_the_model(llama: Resident, payload_for: Callable[..., Payload]) -> None:
    factors = dict(payload_for(llama.spec, 0).factors)
    name = "model.layers.1.self_attn.q_proj"
    odd = factors.pop(name)
    with pytest.raises(ValueError, match=f"each of 14 modules, got a mismatch at '{name}'"):
        llama.adapters.set_factors(factors)
    factors[name] = LowRank(b=odd.b[:-1], a=odd.a, alpha=1.0)
    with pytest.raises(ValueError, match=r"q_proj must make a \[32, 32\] matrix, got \[31, 32\]"):
        llama.adapters.set_factors(factors)


def test_disabled_adapters_leave_the_plain_model(
    llama: Resident, tiny_llama: Path, payload_for: Callable[..., Payload]
) -> None:
    llama.adapters.set_factors(payload_for(llama.spec, 5).factors)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad(), llama.adapters.disabled():
        assert torch.equal(_logits(llama), plain(input_ids=IDS).logits)
    assert not torch.equal(_logits(llama), plain(input_ids=IDS).logits)


@pytest.mark.parametrize("layer", ["linear", "no bias", "conv1d"])
def test_fused_gradients_equal_autograd(layer: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = draw(5, 7).t() if layer == "conv1d" else draw(7, 5)
    bias = None if layer == "no bias" else draw(7)
    x, a, b = draw(2, 3, 5).requires_grad_(), draw(4, 5).requires_grad_(), draw(7, 4).requires_grad_()
    slow = x @ weight.t() + (0 if bias is None else bias) + 1.5 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(adapted_linear(x, weight, bias, a, b, 1.5), slow)
    grad = draw(2, 3, 7)
    fast = torch.autograd.grad(adapted_linear(x, weight, bias, a, b, 1.5), (x, a, b), grad)
    torch.testing.assert_close(fast, torch.autograd.grad(slow, (x, a, b), grad))


def test_conv1d_and_linear_agree() -> None:
    """The same logical weight, stored either way, with the same adapter, gives the same function."""
    generator = torch.Generator().manual_seed(2)
    linear, conv = nn.Linear(6, 4), Conv1D(4, 6)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(4, 6, generator=generator))
        linear.bias.zero_()
        conv.weight.copy_(linear.weight.t())
    models = [nn.ModuleDict({"layer": copy.deepcopy(layer)}) for layer in (linear, conv)]
    x = torch.randn(3, 6, generator=generator)
    a, b = (torch.randn(shape, generator=generator).numpy() for shape in ((2, 6), (4, 2)))
    outputs = []
    for model in models:
        model.get_output_embeddings = lambda: None  # type: ignore[assignment, union-attr]
        adapters = Adapters(model, find_targets(model, "auto", "causal"))
        adapters.set_factors({"layer": LowRank(b=b, a=a, alpha=4.0)})
        outputs.append(model["layer"](x))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_the_head_is_the_same_on_every_device_and_leaves_the_global_generator_alone(tiny_llama: Path) -> None:
    wanted = config.Model(path=str(tiny_llama), task="classify", labels=4)
    state = torch.get_rng_state()
    first, second = (load_model(wanted, config.Lora(), seed=3) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.spec == second.spec
    assert first.spec.dense == {"score.weight": (4, 32)}
    assert load_model(wanted, config.Lora(), seed=4).spec.base_hash != first.spec.base_hash


def test_the_base_of_a_classifier_is_what_its_checkpoint_says(tiny_classifier: Path, classifier: Resident) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_classifier).eval()
    with torch.no_grad(), classifier.adapters.disabled():
        torch.testing.assert_close(classifier.model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
