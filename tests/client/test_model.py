"""Loading: errors in one line, dtypes, the base's hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedloom.client.model import Resident, load_model
from fedloom.protocols import config


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder that holds a model \(config.json\)"):
        load_model(config.Model(path=str(tmp_path)), config.Lora(), seed=0)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path must be a folder or a Hugging Face id"):
        load_model(config.Model(path=str(tmp_path / "no" / "where")), config.Lora(), seed=0)


def test_an_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model.path 'nobody/nothing-here' cannot be loaded") as caught:
        load_model(config.Model(path="nobody/nothing-here"), config.Lora(), seed=0)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_broken_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be loaded for 'causal'"):
        load_model(config.Model(path=str(tmp_path)), config.Lora(), seed=0)


def test_padding_falls_back_to_the_end_token(llama: Resident) -> None:
    assert llama.tokenizer.pad_token_id == llama.tokenizer.eos_token_id


def test_an_unknown_torch_device(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"model.device must be a torch device of this machine, got 'abacus'"):
        load_model(config.Model(path=str(tiny_llama), device="abacus"), config.Lora(), seed=0)


def test_the_hash_is_of_the_base_alone(tiny_llama: Path, llama: Resident) -> None:
    other = load_model(config.Model(path=str(tiny_llama)), config.Lora(targets=("q_proj",)), seed=7)
    assert other.spec.base_hash == llama.spec.base_hash
    half = load_model(config.Model(path=str(tiny_llama), dtype="bfloat16"), config.Lora(), seed=0)
    assert half.spec.base_hash != llama.spec.base_hash


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_are_float32_on_any_base(tiny_llama: Path, dtype: str) -> None:
    resident = load_model(config.Model(path=str(tiny_llama), dtype=dtype), config.Lora(), seed=0)
    assert resident.model.lm_head.weight.dtype == getattr(torch, dtype)
    assert {p.dtype for p in resident.adapters.parameters()} == {torch.float32}
