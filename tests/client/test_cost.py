"""Predicted memory against what training steps really hold, tensor by tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedloom.client.bits import hold
from fedloom.client.cost import Meter, attempt, fit_speed, held, out_of_memory, shapes_of
from fedloom.client.data import Batch
from fedloom.client.model import Resident, load_model
from fedloom.client.training import FlatParameters, forward_logits, loss_sum, make_optimizer
from fedloom.protocols import config
from fedloom.protocols.messages import LowRank
from fedloom.protocols.shapes import Block, Linear, Shapes
from fedloom.strategies import cost
from fedloom.strategies.cost import Speed, Work

MADE = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=3000,
            hidden_size=64,
            intermediate_size=200,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=900, n_positions=256, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(
            vocab_size=900,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=200,
            max_position_embeddings=256,
            num_labels=3,
        )
    ),
}
TOKENIZER = {"llama": "tiny_llama", "qwen2": "tiny_llama", "gpt2": "tiny_gpt2", "bert": "tiny_classifier"}


@pytest.fixture(scope="module")
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Resident]:
    known: dict[tuple[str, str], Resident] = {}

    def build(kind: str, dtype: str = "float32") -> Resident:
        if (kind, dtype) not in known:
            folder = tmp_path_factory.mktemp(kind)
            MADE[kind]().save_pretrained(folder)  # type: ignore[no-untyped-call]
            source: Path = request.getfixturevalue(TOKENIZER[kind])
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes((source / name).read_bytes())
            task = "classify" if kind == "bert" else "causal"
            model = config.Model(path=str(folder), task=task, labels=3, dtype=dtype)  # type: ignore[arg-type]
            known[kind, dtype] = load_model(model, config.Lora(), seed=0)
        return known[kind, dtype]

    return build


def _batch(resident: Resident, work: Work) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (work.batch, work.length), generator=generator)
    mask = torch.ones_like(ids)
    if work.padded:
        mask[0, slice(-3, None) if resident.config.task == "classify" else slice(3)] = 0
    shape = (work.batch, work.width) if work.width else (work.batch,)
    labels = torch.randint(0, 3, shape, generator=generator)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    return Batch(ids=ids, mask=mask, positions=positions, labels=labels, width=work.width, tokens=labels.numel())


def _set_ranks(resident: Resident, ranks: dict[str, int]) -> None:
    generator = np.random.default_rng(0)
    resident.adapters.set_factors(
        {
            name: LowRank(
                b=np.zeros((size.d_out, ranks[name]), np.float32),
                a=generator.normal(size=(ranks[name], size.d_in)).astype(np.float32),
                alpha=1.0,
            )
            for name, size in resident.spec.matrices.items()
        }
    )


def _measure(resident: Resident, work: Work) -> int:
    """Peak bytes of three steps of the lora tuner."""
    _set_ranks(resident, dict(work.ranks))
    batch = _batch(resident, work)

    def run() -> None:
        flat = FlatParameters([*resident.adapters.parameters(), *resident.base.heads.values()])
        momentum = 0.9 if work.optimizer == "momentum" else 0.0
        knobs = config.Train(optimizer="adamw" if work.optimizer == "adamw" else "sgd", momentum=momentum)
        optimizer = make_optimizer(flat.values, knobs)
        for _ in range(3):
            loss_sum(forward_logits(resident, batch), batch.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            flat.grad.zero_()

    _, trial = attempt(run, metered=True, watch=held(resident))
    return trial.peak_bytes


def _work(resident: Resident, batch: int, length: int, width: int, rank: int, **more: object) -> Work:
    classify = resident.config.task == "classify"
    ranks = {name: rank + index % 3 for index, name in enumerate(resident.spec.matrices)}
    return Work(ranks=ranks, batch=batch, length=length, width=0 if classify else width, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize(
    ("batch", "length", "width", "rank", "more"),
    [
        (1, 16, 5, 4, {}),
        (8, 64, 10, 8, {}),
        (8, 64, 40, 24, {"optimizer": "sgd"}),
        (4, 200, 4, 2, {}),
        (4, 200, 4, 2, {"padded": False, "optimizer": "momentum"}),
        (8, 64, 10, 8, {"bits": 8}),
        (8, 64, 10, 8, {"bits": 4}),
    ],
)
def test_the_peak_is_predicted(
    make: Callable[..., Resident], kind: str, batch: int, length: int, width: int, rank: int, more: dict[str, object]
) -> None:
    resident = make(kind)
    work = _work(resident, batch, length, width, rank, **more)
    hold(resident, work.bits)
    try:
        measured = _measure(resident, work)
        predicted = cost.memory(shapes_of(resident), work)
    finally:
        hold(resident, 16)
    assert predicted.total == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("kind", MADE)
def test_the_peak_in_bfloat16(make: Callable[..., Resident], kind: str) -> None:
    resident = make(kind, "bfloat16")
    work = _work(resident, 4, 200, 4, 4)
    assert cost.memory(shapes_of(resident), work).total == pytest.approx(_measure(resident, work), rel=0.08)


@pytest.mark.parametrize("kind", MADE)
def test_fixed_and_marginal_add_up(make: Callable[..., Resident], kind: str) -> None:
    resident = make(kind)
    shapes, work = shapes_of(resident), _work(resident, 4, 40, 4, 3)
    parts = sum(cost.marginal(shapes, work, module, rank) for module, rank in work.ranks.items())
    assert cost.fixed(shapes, work) + parts == cost.memory(shapes, work).total
    few = replace(work, ranks=dict.fromkeys(list(work.ranks)[:2], 4))
    parts = sum(cost.marginal(shapes, few, module, rank) for module, rank in few.ranks.items())
    assert cost.fixed(shapes, few) + parts >= cost.memory(shapes, few).total


def test_nothing_is_saved_below_the_lowest_adapter(make: Callable[..., Resident]) -> None:
    shapes = shapes_of(make("llama"))
    tops = [
        cost.memory(shapes, Work(ranks={f"model.layers.{at}.mlp.down_proj": 4}, batch=4, length=100, width=4)).saved
        for at in (2, 1, 0)
    ]
    blocks = [b - a for a, b in itertools.pairwise(tops)]
    assert blocks[0] == blocks[1] > 0
    assert tops[0] < blocks[0]


def test_shapes_are_the_models_own(make: Callable[..., Resident]) -> None:
    resident = make("llama")
    shapes = shapes_of(resident)
    base = [tensor for name, tensor in resident.model.named_parameters() if ".lora_" not in name]  # tied ones once
    assert cost.weight_bytes(shapes, 16) == sum(tensor.nbytes for tensor in (*base, *resident.model.buffers()))
    assert (shapes.hidden, shapes.columns, len(shapes.blocks)) == (96, 1000, 3)
    assert shapes.blocks[0] == Block(heads=6, kv_heads=2, head_dim=16, ffn=256)
    hold(resident, 4)
    try:
        assert shapes_of(resident) == shapes
        assert resident.bits.nbytes() == cost.weight_bytes(shapes, 4) - shapes.other
    finally:
        hold(resident, 16)


def test_a_narrower_model_costs_less_in_proportion(make: Callable[..., Resident]) -> None:
    shapes = shapes_of(make("llama"))
    halved = {
        name: replace(
            linear,
            d_out=linear.d_out // 2 if linear.reads in ("attention", "mlp") else linear.d_out,
            d_in=linear.d_in // 2 if linear.reads in ("mixed", "channels") else linear.d_in,
        )
        for name, linear in shapes.linears.items()
    }
    blocks = tuple(replace(b, heads=b.heads // 2, kv_heads=b.kv_heads // 2, ffn=b.ffn // 2) for b in shapes.blocks)
    narrow = replace(shapes, linears=halved, blocks=blocks)
    work = Work(ranks=dict.fromkeys(shapes.linears, 4), batch=4, length=100, width=4)
    linear = cost.weight_bytes(shapes, 16) - shapes.other
    assert cost.weight_bytes(narrow, 16) - shapes.other == linear / 2
    assert cost.flops(narrow, work) < 0.6 * cost.flops(shapes, work)
    assert cost.memory(narrow, work).saved < 0.75 * cost.memory(shapes, work).saved


def test_flops_in_closed_form() -> None:
    linear = Linear(block=0, reads="mlp", d_out=20, d_in=10)
    block = Block(heads=2, kv_heads=2, head_dim=5, ffn=20)
    shapes = Shapes(family="llama", hidden=10, blocks=(block,), linears={"up": linear}, columns=7, other=0)
    work = Work(ranks={"up": 3}, batch=2, length=6, width=2)
    n, head = 12, 4 * 2 * 3 * 10 * 7
    assert cost.flops(shapes, work) == 4 * n * 200 + 3.5 * 4 * n * 6 * 10 + 3 * 2 * n * 3 * 30 + head
    assert cost.seconds(shapes, work, Speed(rate=1e3, overhead=0.5), steps=2) == 2 * (
        cost.flops(shapes, work) / 1e3 + 0.5
    )
    assert cost.factor_bytes(shapes, work.ranks) == 4 * 3 * 30
    assert cost.factor_bytes(shapes, work.ranks, item=2, a_too=False) == 2 * 3 * 20


def test_speed_is_found_again() -> None:
    points = [(flops, flops / 5e9 + 0.01) for flops in (1e8, 1e9, 4e9)]
    found = fit_speed(points)
    assert (found.rate, found.overhead) == (pytest.approx(5e9), pytest.approx(0.01))
    with pytest.raises(ValueError, match="two different amounts"):
        fit_speed([(1e9, 1.0)])
    with pytest.raises(ValueError, match="grow with the work"):
        fit_speed([(1e9, 2.0), (2e9, 1.0)])


def test_a_meter_counts_what_is_alive() -> None:
    with Meter() as meter:
        first = torch.zeros(1000)
        second = first + 1
        assert meter.live == 8000
        del first
        view = second.view(10, 100)
        assert (meter.live, meter.peak) == (4000, 8000)
        del view, second
    assert (meter.live, meter.peak) == (0, 8000)


def test_a_task_that_passes_the_limit_is_out_of_memory(make: Callable[..., Resident]) -> None:
    resident = make("llama")
    work = _work(resident, 4, 100, 4, 4)
    peak = _measure(resident, work)
    _set_ranks(resident, dict(work.ranks))
    batch = _batch(resident, work)

    def step() -> float:
        loss = loss_sum(forward_logits(resident, batch), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss)

    result, trial = attempt(step, limit=peak, metered=True, watch=held(resident))
    assert result is not None
    assert not trial.oom
    result, trial = attempt(step, limit=int(0.8 * trial.peak_bytes), metered=True, watch=held(resident))
    assert (result, trial.oom) == (None, True)
    begun: list[int] = []
    assert attempt(lambda: begun.append(1), limit=10, predicted=11)[1].oom
    assert not begun
    with pytest.raises(RuntimeError, match="another matter"):
        attempt(_fail)


def _fail() -> None:
    raise RuntimeError("another matter")


def test_torchs_own_words_for_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes do not fit"))


def test_what_costs_are_not_known_of(make: Callable[..., Resident], monkeypatch: pytest.MonkeyPatch) -> None:
    resident = make("llama")
    monkeypatch.setattr(resident.model.config, "model_type", "mamba")
    with pytest.raises(ValueError, match=r"costs are known of bert, .*got a model of type 'mamba'"):
        shapes_of(resident)
    monkeypatch.undo()
    shapes = shapes_of(resident)
    with pytest.raises(ValueError, match="ranks must name linear layers of the model, got 'x'"):
        cost.memory(shapes, Work(ranks={"x": 1}, batch=1, length=4))
    with pytest.raises(ValueError, match=r"a rank must be in 0\.\.96 for .*got 97"):
        cost.memory(shapes, Work(ranks={"model.layers.0.self_attn.q_proj": 97}, batch=1, length=4))
    with pytest.raises(ValueError, match="width 4"):
        Work(ranks={}, batch=1, length=4, width=4)
    with pytest.raises(ValueError, match=r"bits must be one of \(16, 8, 4\), got 2"):
        Work(ranks={}, batch=1, length=4, bits=2)
