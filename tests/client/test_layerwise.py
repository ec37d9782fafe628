"""Perturbed forward passes, one layer's weights at a time, against the same weights written into the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from subspaces import IDS, clean, data_of, logits, point, same, space, task_for, weights
from torch import Tensor, nn

from fedloom.client.data import Example
from fedloom.client.layerwise import Layerwise
from fedloom.client.model import Resident
from fedloom.client.parts import Part, parameter_names, parts_of
from fedloom.client.place import Place, version_fill
from fedloom.client.training import forward_logits
from fedloom.client.zeroth_order import zeroth_order
from fedloom.protocols.directions import FAMILIES
from fedloom.protocols.messages import Scope

KINDS = ["llama", "gpt2", "classifier"]
Log = list[tuple[str, list[int] | None, int]]


def _spy(log: Log) -> Callable[[Part, Tensor, Tensor, Tensor | None], None]:
    """A fill that leaves the weights as they are, and notes what it is asked for."""

    def fill(part: Part, out: Tensor, base: Tensor, rows: Tensor | None) -> None:
        log.append((part.name, None if rows is None else rows.tolist(), out.numel()))
        out.copy_(base if rows is None else base[rows])

    return fill


def _hooks(model: nn.Module) -> int:
    modules = list(model.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    return hooks + sum("forward" in m.__dict__ for m in modules)


def _parts(model: nn.Module) -> list[Part]:
    return [Part(name=name, parameter=parameter) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_is_that_of_rewritten_weights(kind: str, family: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit: products have the same shapes, in another place in memory."""
    resident: Resident = clean(request.getfixturevalue(kind))
    subspace = space(family)
    held, before, plain = point(subspace, only=6), weights(resident), logits(resident)
    with Place(resident, subspace, held, "version") as place:
        place.prepare(lambda: logits(resident))
        assert resident.rebuilt.layerwise
        with place.at(version_fill(subspace, held.values())):
            layered = logits(resident)
        assert same(before, weights(resident))
        place.rebuild()
        rewritten = logits(resident)
    assert torch.equal(layered, rewritten)
    assert float((layered - plain).abs().max()) > 1e-3
    clean(resident)
    assert torch.equal(logits(resident), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_stay_where_they_are(kind: str, request: pytest.FixtureRequest) -> None:
    """The same bits at the same addresses, after a pass and after one that fails in its midst."""
    resident: Resident = clean(request.getfixturevalue(kind))
    subspace, model = space(), resident.model
    before, places = weights(resident), {n: p.data_ptr() for n, p in model.named_parameters()}
    held = version_fill(subspace, point(subspace).values())
    deepest = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    layerwise = Layerwise(model, parts_of(resident, Scope.ALL))
    with resident.adapters.disabled():
        with layerwise.at(held):
            first = logits(resident)
        scratch = len(layerwise._scratch)
        stop = deepest.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), layerwise.at(held):
            logits(resident)
        stop.remove()
        assert same(before, weights(resident))
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
        with layerwise.at(held):
            again = logits(resident)
    assert len(layerwise._scratch) == scratch
    layerwise.close()
    assert torch.equal(first, again)
    assert same(before, weights(resident))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places


def test_a_fill_that_fails_leaves_the_weights(llama: Resident) -> None:
    before = weights(clean(llama))
    layerwise = Layerwise(llama.model, parts_of(llama, Scope.ALL))

    def broken(part: Part, out: Tensor, base: Tensor, rows: Tensor | None) -> None:
        out.fill_(torch.nan)
        if "layers.1" in part.name:
            raise KeyError(part.name)

    with pytest.raises(KeyError), layerwise.at(broken), llama.adapters.disabled():
        logits(llama)
    layerwise.close()
    assert same(before, weights(llama))


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_table_the_batch_s_rows_are_made(kind: str, request: pytest.FixtureRequest) -> None:
    """Every part once a pass (a tied table twice: a few rows for the embedding, all of it for the output)."""
    resident: Resident = clean(request.getfixturevalue(kind))
    log: Log = []
    layerwise = Layerwise(resident.model, parts_of(resident, Scope.ALL))
    with resident.adapters.disabled(), layerwise.at(_spy(log)):
        got = logits(resident)
    layerwise.close()
    assert torch.equal(got, logits(resident))
    sizes = {name: parameter.numel() for name, parameter in parameter_names(resident.model).items()}
    rows = {name: wanted for name, wanted, _ in log if wanted is not None}
    words, positions = sorted(set(IDS.flatten().tolist())), list(range(IDS.shape[1]))
    assert (
        rows
        == {
            "llama": {"model.embed_tokens.weight": words},
            "gpt2": {"transformer.wte.weight": words, "transformer.wpe.weight": positions},
            "classifier": {
                "bert.embeddings.word_embeddings.weight": words,
                "bert.embeddings.position_embeddings.weight": positions,
                "bert.embeddings.token_type_embeddings.weight": [0],
            },
        }[kind]
    )
    whole = [name for name, wanted, _ in log if wanted is None]
    tied = {"model.embed_tokens.weight", "transformer.wte.weight"}
    assert sorted(whole) == sorted(sizes.keys() - (rows.keys() - tied))
    assert all(made == (sizes[name] if wanted is None else len(wanted) * 32) for name, wanted, made in log)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scratch_memory_is_one_module_s(kind: str, request: pytest.FixtureRequest) -> None:
    resident: Resident = clean(request.getfixturevalue(kind))
    layerwise = Layerwise(resident.model, parts_of(resident, Scope.ALL))
    log: Log = []
    with resident.adapters.disabled(), layerwise.at(_spy(log)):
        logits(resident)
    layerwise.close()
    largest = 0
    for module in resident.model.modules():
        own = list(module.parameters(recurse=False))
        if own and not isinstance(module, nn.Embedding):
            largest = max(largest, sum(-(-p.numel() * p.element_size() // 64) * 64 for p in own))
    assert len(layerwise._scratch) == largest


def test_what_a_failed_task_left_is_no_evidence(llama: Resident) -> None:
    """Weights that are no numbers go back to W0 before it is tried whether the model runs layer by layer."""
    clean(llama)
    with Place(llama, space(), None, "v") as place:
        llama.rebuilt.write(place.parts, lambda part, out, base, rows: out.fill_(torch.nan))
    with Place(llama, space(), None, "v") as place:
        assert bool(logits(llama).isnan().all())
        place.prepare(lambda: logits(llama))
        assert llama.rebuilt.at_base
    assert llama.rebuilt.layerwise
    clean(llama)


class _Nested(nn.Module):
    """Modules with weights of their own around modules with weights, used before and after what is within."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.shift = nn.Parameter(torch.randn(4))
        self.inner = _Nested(depth - 1) if depth else nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x * self.gain)
        return self.inner(y + self.shift) * self.gain + self.shift


def test_nested_modules_keep_their_weights_while_the_inner_ones_run() -> None:
    torch.manual_seed(1)
    model, x = _Nested(3).eval(), torch.randn(5, 4)
    moved = {name: parameter.detach() * 1.5 + 0.25 for name, parameter in model.named_parameters()}
    wanted = torch.func.functional_call(model, moved, (x,))
    layerwise = Layerwise(model, _parts(model))
    for _ in range(2):  # the second pass has its scratch memory whole
        with torch.inference_mode(), layerwise.at(lambda part, out, base, rows: out.copy_(base * 1.5 + 0.25)):
            got = model(x)
        assert torch.equal(got, wanted)
    own = 2 * 64  # gain and shift, a cache line each
    assert len(layerwise._scratch) == 4 * own + 2 * 64
    layerwise.close()


def test_what_was_hooked_before_stays_hooked(llama: Resident) -> None:
    model, seen = clean(llama).model, []
    table = model.get_input_embeddings()
    plain = table.forward
    table.forward = lambda ids: (seen.append(len(ids)), plain(ids))[1]
    try:
        count, forward = _hooks(model), table.forward
        before = logits(llama)
        layerwise = Layerwise(model, parts_of(llama, Scope.ALL))
        assert _hooks(model) > count
        assert torch.equal(logits(llama), before)  # idle hooks do nothing
        layerwise.close()
        layerwise.close()
        assert _hooks(model) == count
        assert table.forward is forward
        assert seen == [2, 2]
    finally:
        del table.forward
    assert "forward" not in table.__dict__


def test_closing_takes_every_hook_off(classifier: Resident) -> None:
    count = _hooks(clean(classifier).model)
    layerwise = Layerwise(classifier.model, parts_of(classifier, Scope.ALL))
    layerwise.close()
    assert _hooks(classifier.model) == count
    with Place(classifier, space(), None, "v") as place:
        place.prepare(lambda: logits(classifier))
        assert _hooks(classifier.model) > count
    assert _hooks(classifier.model) == count


class _Two(nn.Module):
    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.use = nn.Linear(4, 4), nn.Linear(4, 4), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.two, self.one(x))


OUTSIDE: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "fails: product": lambda two, x: nn.functional.linear(x, two.weight),
    "fails: by index": lambda two, x: two(x) + two.bias[1],
    "fails: by shape": lambda two, x: two(x) / (0 if not two.weight.numel() else 1),
    "silent: a sum": lambda two, x: two(x) + two.weight.sum(),
    "silent: a mean": lambda two, x: two(x) * two.weight.mean(),
    "silent: an empty answer": lambda two, x: two(x)[:, :1] * two.bias,
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_weight_used_outside_its_module_is_noticed(how: str) -> None:
    torch.manual_seed(0)
    model, x = _Two(OUTSIDE[how]), torch.randn(3, 4)
    layerwise = Layerwise(model, _parts(model))
    with torch.inference_mode():
        before = model(x)
        assert not layerwise.works(lambda: model(x))
        layerwise.close()
        assert torch.equal(model(x), before)
        fine = _Two(lambda two, x: two(x))
        assert Layerwise(fine, _parts(fine)).works(lambda: fine(x))


def _strange(resident: Resident, silent: bool) -> Callable[[], None]:
    """Let the last norm use the first layer's weight: by a product, which fails when it is empty, or by its sum."""
    norm, other = resident.model.model.norm, resident.model.model.layers[0].input_layernorm
    plain = norm.forward
    norm.forward = lambda x: plain(x) * (other.weight.sum() / 32 if silent else other.weight)
    return lambda: norm.__dict__.pop("forward")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("silent", [False, True])
def test_a_strange_model_is_tuned_by_rewriting(
    llama: Resident, examples: list[Example], silent: bool, family: str
) -> None:
    """Its scalars are those of the weights written into the model, and W0 comes back."""
    subspace, data = space(family), data_of(clean(llama), examples)
    held, before = point(subspace, only=4), weights(llama)
    task = task_for(subspace, knobs={"steps": 3, "directions": 2, "lr": 1e-3})
    undo = _strange(llama, silent)
    try:
        with Place(llama, subspace, held, "v") as place:
            got, measured = zeroth_order(place, data, task)
        assert llama.rebuilt.layerwise is False
        clean(llama).rebuilt.layerwise = False
        with Place(llama, subspace, held, "v") as place:
            wanted, _ = zeroth_order(place, data, task)
        np.testing.assert_array_equal(got.values, wanted.values)
        clean(llama)
        assert same(before, weights(llama))
        assert np.isfinite(measured["loss_sum"])
    finally:
        undo()
        clean(llama)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_give_the_same_scalars(classifier: Resident, examples: list[Example], family: str) -> None:
    """Layer by layer or rewritten: bit for bit, for a sketch and for a pool whose master is beside the model."""
    subspace, found = space(family), []
    task = task_for(subspace, knobs={"steps": 4, "directions": 2, "estimator": "fzoo", "lr": 1e-3})
    for layerwise in (None, False):
        clean(classifier).rebuilt.layerwise = layerwise
        with Place(classifier, subspace, point(subspace, only=3), "v") as place:
            found.append(zeroth_order(place, data_of(classifier, examples), task)[0].values)
        assert classifier.rebuilt.layerwise is (layerwise is None)
    clean(classifier)
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0]).max() > 0


def test_whole_models_generate_layer_by_layer(gpt2: Resident) -> None:
    """With its cache of keys and values, token by token, as for Rouge."""
    subspace = space()
    held, made = point(subspace), []
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode(), Place(clean(gpt2), subspace, held, "v") as place:
        place.prepare(lambda: logits(gpt2))
        with place.serving():
            made.append(gpt2.model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **settings))
        place.rebuild()
        made.append(gpt2.model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **settings))
    clean(gpt2)
    assert torch.equal(made[0], made[1])
    assert made[0].shape == (2, 11)


def test_passes_without_gradients_leave_backpropagation_possible(llama: Resident, examples: list[Example]) -> None:
    """Parameters that were swapped under inference mode are ordinary ones afterwards."""
    clean(llama)
    data = data_of(llama, examples)
    with Place(llama, space(), None, "v") as place:
        zeroth_order(place, data, task_for(space()))
    batch = data.batch(range(4))
    for parameter in llama.model.parameters():
        assert not parameter.is_inference()
        assert not parameter.data.is_inference()
    table = llama.model.get_input_embeddings().weight.requires_grad_(True)
    forward_logits(llama, batch).sum().backward()
    assert table.grad is not None
    table.grad = None
    table.requires_grad_(False)
