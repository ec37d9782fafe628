"""Exports that others load: the same logits as the patched resident."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from subspaces import clean, masked, point, same, some_mask, space, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedloom.client.export import export_merged, export_peft
from fedloom.client.model import Resident, load_model
from fedloom.client.place import Place
from fedloom.protocols import config
from fedloom.protocols.directions import FAMILIES
from fedloom.protocols.messages import Coefficients, LowRank, Payload, Scope

IDS = torch.tensor([[5, 9, 20, 33, 7, 3]])


def _logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits  # type: ignore[operator]
        return logits


def _patched(resident: Resident, payload: Payload) -> torch.Tensor:
    resident.base.apply(("test", object()), payload)
    with resident.adapters.disabled():
        logits = _logits(resident.model)
    resident.base.restore()
    return logits


def _mixed(resident: Resident, payload_for: Callable[..., Payload]) -> Payload:
    """Ranks 1 to 3, rsLoRA on one, a dense matrix, factors and dense on another, one matrix left out."""
    names = list(resident.spec.matrices)
    factors = {name: payload_for(resident.spec, 0, 1 + number % 3).factors[name] for number, name in enumerate(names)}
    factors[names[0]] = LowRank(b=factors[names[0]].b, a=factors[names[0]].a, alpha=5.0, rslora=True)
    dense = {names[1]: factors.pop(names[1]).dense(), names[2]: 0.5 * factors[names[2]].dense()}
    del factors[names[3]]
    heads = payload_for(resident.spec, 1).dense
    return Payload(factors=factors, dense={**dense, **heads})


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_peft_loads_the_adapter(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, payload_for: Callable[..., Payload]
) -> None:
    resident: Resident = request.getfixturevalue(kind)
    payload = _mixed(resident, payload_for)
    export_peft(payload, resident, tmp_path / "adapter")
    if kind == "classifier":
        base = AutoModelForSequenceClassification.from_pretrained(resident.config.path, num_labels=3)
    else:
        base = AutoModelForCausalLM.from_pretrained(resident.config.path)
    before = _logits(base.eval())
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    wanted = _patched(resident, payload)
    torch.testing.assert_close(_logits(loaded), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-2
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["rank_pattern"] == settings["alpha_pattern"] != {}


def test_an_empty_payload_is_the_base(llama: Resident, tmp_path: Path) -> None:
    export_peft(Payload(), llama, tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama.config.path), tmp_path).eval()
    torch.testing.assert_close(_logits(loaded), _patched(llama, Payload()))


def test_a_dense_matrix_keeps_its_numerical_rank(
    llama: Resident, tmp_path: Path, payload_for: Callable[..., Payload]
) -> None:
    name = next(iter(llama.spec.matrices))
    full = np.random.Generator(np.random.Philox(key=1)).normal(size=(32, 64)).astype(np.float32)
    for dense, rank in ((full, 32), (payload_for(llama.spec, 0, 5).factors[name].dense(), 5)):
        export_peft(Payload(dense={name: dense}), llama, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["r"] == rank


def test_a_payload_of_another_model(llama: Resident, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a payload must name parts of the model, got 'elsewhere'"):
        export_peft(Payload(dense={"elsewhere": np.ones((2, 2), np.float32)}), llama, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_the_merged_model_loads(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, payload_for: Callable[..., Payload]
) -> None:
    resident: Resident = request.getfixturevalue(kind)
    payload = _mixed(resident, payload_for)
    export_merged(payload, resident, tmp_path)
    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    merged, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(_logits(merged.eval()), _patched(resident, payload))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("turn on")["input_ids"] == resident.tokenizer("turn on")["input_ids"]
    if kind == "classifier":
        assert merged.config.id2label == {0: "lamp", 1: "oven", 2: "alarm"}


def test_a_bfloat16_model_is_merged_in_its_dtype(
    tiny_llama: Path, tmp_path: Path, payload_for: Callable[..., Payload]
) -> None:
    resident = load_model(config.Model(path=str(tiny_llama), dtype="bfloat16"), config.Lora(), seed=0)
    payload = payload_for(resident.spec, 0)
    export_merged(payload, resident, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert merged.dtype == torch.bfloat16
    assert torch.equal(_logits(merged), _patched(resident, payload))


def _served(resident: Resident, held: Coefficients) -> torch.Tensor:
    with torch.inference_mode(), Place(resident, held.subspace, held, "v") as place:
        place.prepare(lambda: _logits(resident.model))
        with place.serving():
            return _logits(resident.model)


def _loaded(kind: str, folder: Path) -> torch.Tensor:
    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return _logits(model.eval())


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_a_model_tuned_in_a_subspace_is_merged(
    kind: str, family: str, scope: Scope, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The device's own model at the version: the same weights, bit for bit, but for adapters, which merging rounds."""
    resident: Resident = clean(request.getfixturevalue(kind))
    if scope == Scope.MASK:
        resident = masked(resident, some_mask(resident))
    before = weights(resident)
    held = point(space(family, scope=scope, mask=resident.spec.mask if scope == Scope.MASK else ""), only=5)
    wanted = _served(resident, held)
    clean(resident)
    plain = _logits(resident.model)
    export_merged(Payload(coefficients=held), resident, tmp_path)
    assert same(before, weights(resident))
    assert resident.rebuilt.at_base
    got, tolerance = _loaded(kind, tmp_path), 1e-5 if scope == Scope.LORA else 1e-6
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    if scope != Scope.LORA:
        with Place(resident, held.subspace, held, "v") as place:
            place.rebuild()
            here = weights(resident)
        there = load_file(tmp_path / "model.safetensors")
        assert len(there) == len(here)
        assert same({name.replace(".base_layer.", "."): value for name, value in here.items()}, there)
    assert float((wanted - plain).abs().max()) > 1e-4
    clean(resident)


def test_a_bfloat16_model_of_a_subspace_is_merged_in_its_dtype(tiny_llama: Path, tmp_path: Path) -> None:
    resident = load_model(config.Model(path=str(tiny_llama), dtype="bfloat16"), config.Lora(), seed=0)
    held = point(space())
    wanted = _served(resident, held)
    export_merged(Payload(coefficients=held), resident, tmp_path)
    got = _loaded("llama", tmp_path)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_adapters_of_a_subspace_are_a_peft_adapter(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    resident: Resident = clean(request.getfixturevalue(kind))
    before = weights(resident)
    held = point(space(scope=Scope.LORA, rank=3, alpha=5.0, rslora=True))
    wanted = _served(resident, held)
    export_peft(Payload(coefficients=held), resident, tmp_path)
    assert same(before, weights(clean(resident)))
    if kind == "classifier":
        base = AutoModelForSequenceClassification.from_pretrained(resident.config.path, num_labels=3)
    else:
        base = AutoModelForCausalLM.from_pretrained(resident.config.path)
    torch.testing.assert_close(_logits(PeftModel.from_pretrained(base, tmp_path).eval()), wanted, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_no_adapter(llama: Resident, tmp_path: Path, family: str) -> None:
    with pytest.raises(ValueError, match=r"must be exported whole \(format merged\), got format peft"):
        export_peft(Payload(coefficients=point(space(family))), clean(llama), tmp_path)
