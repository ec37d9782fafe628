"""Exports that others load: the same logits as the patched resident."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedloom.client.export import export_merged, export_peft
from fedloom.client.model import Resident, load_model
from fedloom.protocols import config
from fedloom.protocols.messages import LowRank, Payload

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
