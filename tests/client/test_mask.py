"""Sparse masks: which weights they hold, and what a file of them must be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from subspaces import clean, data_of, point, same, some_mask, space, weights

from fedloom.client.data import Example
from fedloom.client.mask import hash_mask, make_mask, read_mask, write_mask
from fedloom.client.model import Resident, load_model
from fedloom.client.parts import parameter_names
from fedloom.client.place import Place
from fedloom.client.training import forward_logits
from fedloom.protocols import config
from fedloom.protocols.messages import Scope

KINDS = ["llama", "gpt2", "classifier"]


def _squared_gradients(resident: Resident, examples: list[Example], batch_size: int) -> dict[str, torch.Tensor]:
    """(sum over batches of dL/dw)^2 of every parameter, by torch.autograd.grad, one batch at a time."""
    data, named = data_of(resident, examples), parameter_names(resident.model)
    flags = {name: p.requires_grad for name, p in named.items()}
    total = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in named.items()}
    for parameter in named.values():
        parameter.requires_grad_(True)
    for group in data.by_length(batch_size):
        batch = data.batch(group)
        with resident.adapters.disabled():
            logits = forward_logits(resident, batch)
        loss = F.cross_entropy(logits.flatten(0, -2), batch.labels.flatten(), reduction="sum") / batch.tokens
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, found, strict=True):
            total[name] += 0 if gradient is None else gradient.flatten().double()
    for name, parameter in named.items():
        parameter.requires_grad_(flags[name])
    return {name: value.square() for name, value in total.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("share", "batch_size"), [(0.001, 4), (0.05, 1), (1.0, 2), (1e-9, 2)])
def test_the_mask_holds_the_largest_squared_gradients(
    kind: str, share: float, batch_size: int, request: pytest.FixtureRequest, examples: list[Example]
) -> None:
    """Of all weights outside a head together, at least one; and the head whole."""
    resident: Resident = clean(request.getfixturevalue(kind))
    before = weights(resident)
    flags = {name: (p.requires_grad, p.grad) for name, p in resident.model.named_parameters()}
    mask = make_mask(resident, data_of(resident, examples), share=share, batch_size=batch_size)
    assert {name: (p.requires_grad, p.grad) for name, p in resident.model.named_parameters()} == flags
    assert same(before, weights(resident))
    scores = _squared_gradients(resident, examples, batch_size)
    heads = set(resident.base.heads)
    body = torch.cat([score for name, score in scores.items() if name not in heads])
    count = max(1, round(share * len(body)))
    chosen = {name: index for name, index in mask.items() if name not in heads}
    assert sum(len(index) for index in chosen.values()) == count
    held = torch.cat([scores[name][index] for name, index in chosen.items()])
    least = body.sort(descending=True).values[count - 1]
    assert float(held.min()) >= float(least) * (1 - 1e-4) - 1e-14
    assert float(held.sum()) == pytest.approx(float(body.topk(count).values.sum()), rel=1e-6)
    for name in heads:
        assert torch.equal(mask[name], torch.arange(scores[name].numel()))
    assert list(mask) == sorted(mask)
    for index in mask.values():
        assert index.dtype == torch.int64
        assert bool((index.diff() > 0).all())


def test_a_mask_is_made_at_the_base(llama: Resident, examples: list[Example]) -> None:
    """Whatever version the model is at, and with the adapters off."""
    data = data_of(clean(llama), examples)
    wanted = hash_mask(make_mask(llama, data, share=0.01, batch_size=2))
    with Place(llama, space(), point(space()), "v") as place:
        place.rebuild()
    assert hash_mask(make_mask(llama, data, share=0.01, batch_size=2)) == wanted
    lora = space(scope=Scope.LORA)
    with Place(llama, lora, point(lora), "v") as place:
        place.rebuild()
        assert hash_mask(make_mask(llama, data, share=0.01, batch_size=2)) == wanted
    clean(llama)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_out_of_range(llama: Resident, examples: list[Example], share: float) -> None:
    with pytest.raises(ValueError, match=rf"share must be in \(0, 1\], got {share}"):
        make_mask(clean(llama), data_of(llama, examples), share=share, batch_size=2)


def test_a_mask_goes_through_a_file(classifier: Resident, tiny_classifier: Path, tmp_path: Path) -> None:
    """Whatever the order of its names; and a model that is loaded with it says which one it holds."""
    mask = some_mask(clean(classifier))
    turned = dict(reversed(list(mask.items())))
    path = tmp_path / "some" / "where" / "mask.safetensors"
    digest = write_mask(turned, path)
    again, known = read_mask(path)
    assert known == digest == hash_mask(mask) == hash_mask(turned)
    assert list(again) == sorted(mask)
    assert all(torch.equal(again[name], index) for name, index in mask.items())
    settings = config.Model(path=str(tiny_classifier), task="classify", labels=3, mask=str(path))
    loaded = load_model(settings, config.Lora(), seed=0)
    assert loaded.spec.mask == digest
    assert list(loaded.mask) == sorted(mask)
    assert not load_model(settings.model_copy(update={"mask": ""}), config.Lora(), seed=0).spec.mask


def test_the_hash_is_what_it_says() -> None:
    """SHA-256 of `name|count|` and little-endian int64 places, by sorted name: it must never change."""
    mask = {"b": torch.tensor([0, 2]), "a": torch.tensor([7])}
    wanted = hashlib.sha256(b"a|1|" + (7).to_bytes(8, "little") + b"b|2|" + bytes(8) + (2).to_bytes(8, "little"))
    assert hash_mask(mask) == wanted.hexdigest()
    assert hash_mask(mask) == hash_mask({"a": torch.tensor([7]), "b": torch.tensor([0, 2])})
    others = [{"b": torch.tensor([0, 3]), "a": torch.tensor([7])}, {"b": torch.tensor([0, 2, 7])}, {"c": mask["b"]}]
    assert len({hash_mask(mask), *map(hash_mask, others)}) == 4


def test_every_bad_file_is_one_error(tmp_path: Path, tiny_llama: Path) -> None:
    good = torch.tensor([1, 5, 9])
    bad: dict[str, dict[str, torch.Tensor] | bytes | None] = {
        "missing": None,
        "empty file": b"",
        "no safetensors": b"PK\x03\x04 something else entirely, long enough for a header",
        "a long header": (2**40).to_bytes(8, "little") + b"{}",
        "no tensors": {},
        "falling": {"w": torch.tensor([5, 1])},
        "twice": {"good": good, "w": torch.tensor([1, 1])},
        "int32": {"w": good.int()},
        "float": {"w": good.double()},
        "bool": {"w": torch.ones(9, dtype=torch.bool)},
        "a matrix": {"w": good.view(1, 3)},
        "a number": {"w": torch.tensor(3)},
        "no places": {"w": good[:0]},
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.safetensors"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            save_file(content, path)
        with pytest.raises(ValueError, match=r"a mask of w must hold ascending int64 places, got|model.mask must be"):
            read_mask(path)
        settings = config.Model(path=str(tiny_llama), mask=str(path))
        with pytest.raises(ValueError, match=r"a mask of w must hold|model.mask must be"):
            load_model(settings, config.Lora(), seed=0)
    with pytest.raises(ValueError, match=r"model.mask must be a file that `fedloom mask` made"):
        read_mask(tmp_path)
    whole = tmp_path / "whole.safetensors"
    write_mask({"w": good}, whole)
    for cut in range(0, whole.stat().st_size, 7):
        short = tmp_path / "short.safetensors"
        short.write_bytes(whole.read_bytes()[:cut])
        with pytest.raises(ValueError, match=r"model.mask must be"):
            read_mask(short)


def test_a_mask_of_16_bit_weights(tiny_llama: Path, examples: list[Example]) -> None:
    """Most of what it holds is what a float32 model's mask holds."""
    whole = load_model(config.Model(path=str(tiny_llama)), config.Lora(), seed=0)
    half = load_model(config.Model(path=str(tiny_llama), dtype="bfloat16"), config.Lora(), seed=0)
    masks = [make_mask(one, data_of(one, examples), share=0.02, batch_size=4) for one in (whole, half)]
    shared = sum(len(np.intersect1d(index, masks[1].get(name, index[:0]))) for name, index in masks[0].items())
    assert shared > 0.9 * sum(len(index) for index in masks[0].values())
