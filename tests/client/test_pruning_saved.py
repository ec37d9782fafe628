"""Pruned models on disk: the same logits and texts as the masked model, and one error for whatever was altered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunings import ENCODERS, KINDS, inputs, logits, make_resident, random_factors, random_keep
from transformers import AutoTokenizer

from fedloom.client.export import export_pruned
from fedloom.client.model import Resident, hash_state
from fedloom.client.pruning.manifest import MANIFEST, indices_of, read_keep
from fedloom.client.pruning.narrowing import masked
from fedloom.client.pruning.saved import load_pruned
from fedloom.protocols.messages import Coefficients, Payload, Subspace
from fedloom.strategies.masked import Bits, slice_payload


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path, tiny_classifier: Path) -> Callable[..., Resident]:
    def made(kind: str, dtype: str = "float32") -> Resident:
        return make_resident(kind, tmp_path / kind, tiny_classifier if kind in ENCODERS else tiny_llama, dtype)

    return made


def _payload(resident: Resident) -> Payload:
    heads = {name: np.full(shape, 0.25, np.float32) for name, shape in resident.spec.dense.items()}
    return Payload(factors=random_factors(dict(resident.spec.matrices), 4, 3), dense=heads)


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_the_masked_model(
    kind: str, recover: bool, make: Callable[..., Resident], tmp_path: Path
) -> None:
    resident = make(kind)
    before, batch = hash_state(resident.model), inputs(kind)
    keep, payload = random_keep(dict(resident.spec.groups), 2), _payload(resident)
    assert resident.prunable is not None
    structure = resident.prunable.structure
    biases = {sink: torch.linspace(-1, 1, 24) for sink in structure.columns} if recover else None
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    resident.base.apply("v", payload)
    with resident.adapters.disabled(), masked(resident.model, structure, keep, biases):
        wanted = logits(resident.model, batch).detach()
        told = resident.model.generate(**batch, **options) if kind not in ENCODERS else None
    resident.base.restore()

    export_pruned(payload, resident, tmp_path / "out", keep, biases)
    assert hash_state(resident.model) == before
    model = load_pruned(tmp_path / "out", keep)
    assert type(model) is type(resident.model)
    torch.testing.assert_close(logits(model, batch).detach(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    if told is not None:
        assert torch.equal(model.generate(**batch, **options), told)
    else:
        assert model.config.id2label == {0: "lamp", 1: "oven", 2: "alarm"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("turn on")["input_ids"] == resident.tokenizer("turn on")["input_ids"]
    kept = json.loads((tmp_path / "out" / MANIFEST).read_text())["groups"]
    assert {name: entry["kept"] for name, entry in kept.items() if name in keep} == indices_of(keep)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < sum(p.numel() * 4 for n, p in resident.model.named_parameters() if ".lora_" not in n)

    export_pruned(slice_payload(payload, resident.spec, keep), resident, tmp_path / "again", keep, biases)
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (tmp_path / "out" / MANIFEST).read_bytes()


def test_a_loaded_model_is_trained_like_any_other(make: Callable[..., Resident], tmp_path: Path) -> None:
    resident = make("llama")
    export_pruned(Payload(), resident, tmp_path / "out", random_keep(dict(resident.spec.groups), 2))
    model = load_pruned(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    batch = inputs("llama")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16_stays(make: Callable[..., Resident], tmp_path: Path) -> None:
    resident = make("qwen3", "bfloat16")
    keep = random_keep(dict(resident.spec.groups), 2)
    export_pruned(_payload(resident), resident, tmp_path / "out", keep)
    model = load_pruned(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


ALTERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight": (
        lambda at: _flip(at / "model.safetensors"),
        r"model\.safetensors must be the file that",
    ),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), "it is missing or altered"),
    "the config": (
        lambda at: _edit(at / "config.json", '"num_attention_heads": 6', '"num_attention_heads": 3'),
        "altered",
    ),
    "a tokenizer": (lambda at: _flip(at / "tokenizer.json"), r"tokenizer\.json must be the file"),
    "the keep": (
        lambda at: _edit(at / MANIFEST, '"kept": [\n    0', '"kept": [\n    1'),
        "is not the manifest .* digest",
    ),
    "a width": (lambda at: _edit(at / MANIFEST, '"width": 8', '"width": 4'), "is not the manifest .* digest"),
    "no manifest": (lambda at: (at / MANIFEST).unlink(), "is not the manifest of a pruned model"),
    "half a manifest": (lambda at: (at / MANIFEST).write_text("{"), "is not the manifest of a pruned model"),
    "a list": (lambda at: (at / MANIFEST).write_text("[]"), "is not the manifest of a pruned model"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_what_was_altered_is_not_loaded(what: str, make: Callable[..., Resident], tmp_path: Path) -> None:
    alter, message = ALTERED[what]
    resident = make("llama")
    keep: dict[str, Bits] = {name: np.arange(units) % 3 != 2 for name, units in resident.spec.groups.items()}
    export_pruned(Payload(), resident, tmp_path / "out", keep)
    load_pruned(tmp_path / "out", keep)
    alter(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path / "out", keep)


def test_a_forged_manifest_must_still_fit_the_weights(make: Callable[..., Resident], tmp_path: Path) -> None:
    """Whoever makes the digest right as well still meets the shapes, and cannot leave a file out."""
    from fedloom.client.pruning import manifest

    resident = make("llama")
    keep = {name: np.arange(units) % 3 != 2 for name, units in resident.spec.groups.items()}
    export_pruned(Payload(), resident, tmp_path / "out", keep)
    text = (tmp_path / "out" / MANIFEST).read_text()

    def forge(change: Callable[[dict[str, Any]], object], message: str) -> None:
        about = json.loads(text)
        change(about)
        del about["digest"]
        about["digest"] = manifest._digest(about)
        (tmp_path / "out" / MANIFEST).write_text(json.dumps(about))
        with pytest.raises(ValueError, match=message):
            load_pruned(tmp_path / "out")

    ffn = "model.layers.1.ffn"
    unfit = "must hold a pruned model that fits its manifest: "
    forge(lambda about: about["groups"][ffn]["kept"].remove(19), f"{unfit}.*size mismatch")
    forge(lambda about: about["groups"][ffn].update(sink="elsewhere"), unfit)
    forge(lambda about: about["groups"][ffn].update(attributes=[["model", "training"]]), f"{unfit}.*whole number")
    forge(lambda about: about.update(architecture="AutoTokenizer"), f"{unfit}.*a model of transformers")
    forge(lambda about: about["groups"][ffn].update(units=10**15), "must have 1 to 16777216 units")
    forge(lambda about: about["files"].pop("config.json"), r"it names no config\.json")
    forge(lambda about: about["files"].update({"../x": "0"}), "must be the file that")


def test_another_keep_is_refused(make: Callable[..., Resident], tmp_path: Path) -> None:
    resident = make("llama")
    keep = {name: np.arange(units) % 3 != 2 for name, units in resident.spec.groups.items()}
    export_pruned(Payload(), resident, tmp_path / "out", keep)
    other = {**keep, "model.layers.1.ffn": np.arange(20) % 3 != 1}
    with pytest.raises(ValueError, match=r"the keep that is asked for, model\.layers\.1\.ffn is kept otherwise"):
        load_pruned(tmp_path / "out", other)
    with pytest.raises(ValueError, match=r"the keep that is asked for, .* is kept otherwise"):
        load_pruned(tmp_path / "out", {})
    sliced = slice_payload(_payload(resident), resident.spec, other)
    with pytest.raises(ValueError, match="must have the keep that is exported, got another"):
        export_pruned(sliced, resident, tmp_path / "no", keep)
    space = Subspace(family="sketch", k=4, seed=1)
    moved = Payload(coefficients=Coefficients(subspace=space, exponent=0, steps=np.ones(4, np.int64)))
    with pytest.raises(ValueError, match="exported whole"):
        export_pruned(moved, resident, tmp_path / "no", keep)
    assert not (tmp_path / "no").exists()


def test_keeps_are_read_from_json(make: Callable[..., Resident], tmp_path: Path) -> None:
    units = {"a": 3, "b": 2}
    path = tmp_path / "keep.json"
    path.write_text('{"a": [0, 2]}')
    assert {name: bits.tolist() for name, bits in read_keep(path, units).items()} == {"a": [True, False, True]}
    for text, message in (
        ('{"c": [0]}', "must name groups of the model, got 'c'"),
        ('{"a": [0, 3]}', r"a must list units in 0\.\.2"),
        ('{"a": []}', "ascending and at least one"),
        ('{"a": [2, 0]}', "ascending and at least one"),
        ('{"a": [true]}', r"a must list units in 0\.\.2"),
        ("[1]", "a keep must be JSON with lists of kept units"),
        ("{", "a keep must be JSON with lists of kept units"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_keep(path, units)
    with pytest.raises(ValueError, match="a keep must be JSON with lists of kept units"):
        read_keep(tmp_path / "nowhere.json", units)
    resident = make("gpt2")
    keep = {name: np.arange(count) % 3 != 2 for name, count in resident.spec.groups.items()}
    export_pruned(Payload(), resident, tmp_path / "out", keep)
    again = read_keep(tmp_path / "out" / MANIFEST, resident.spec.groups)
    assert all(np.array_equal(again[name], bits) for name, bits in keep.items())
