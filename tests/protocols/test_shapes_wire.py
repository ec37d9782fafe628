"""A model's shapes, a device's memory and its word of running out: what travels, and what a stranger may not say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import framing
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import Cost, DeviceReport, Hello, ModelSpec, Update
from fedloom.protocols.shapes import FAMILIES, READS, Block, Linear, Shapes
from fedloom.protocols.shapes_wire import (
    LARGEST,
    MAX_BLOCKS,
    MOST,
    MOST_BYTES,
    WIDEST,
    check_shapes,
    read_shapes,
    write_shapes,
)
from fedloom.strategies.cost import Work, flops, memory

LIMIT = 64 << 20
SHAPES = Shapes(
    family="llama",
    hidden=24,
    blocks=(Block(heads=6, kv_heads=3, head_dim=4, ffn=20), Block(heads=2, kv_heads=1, head_dim=4, ffn=7)),
    linears={
        "0.q": Linear(block=0, reads="attention", d_out=24, d_in=24),
        "1.down": Linear(block=1, reads="channels", d_out=24, d_in=7),
    },
    columns=50,
    other=7000,
)


def hello(shapes: Shapes | None = SHAPES, memory: int = 0) -> Hello:
    report = DeviceReport(device="d", examples=1, rank=2, memory=memory)
    return Hello(report=report, spec=ModelSpec(base_hash="h", matrices={}, shapes=shapes))


def forged(change: Callable[[Any], Any]) -> bytes:
    """A greeting with right checksums around shapes that `change` has altered."""
    body, data = framing.unpack(encode(hello()), 3, ["", "Task", "Update", "Hello"], limit=LIMIT)
    record = pb.Hello.FromString(body)
    change(record.spec.shapes)
    return framing.pack(3, record.SerializeToString(deterministic=True), [data])


widths = st.integers(1, 2**12)


@st.composite
def any_shapes(draw: st.DrawFn) -> Shapes:
    kv = draw(st.lists(st.integers(1, 2**7), min_size=1, max_size=4))
    blocks = tuple(
        Block(heads=n * draw(st.integers(1, 2**5)), kv_heads=n, head_dim=draw(widths), ffn=draw(widths)) for n in kv
    )
    linears = {
        name: Linear(
            block=draw(st.integers(0, len(kv) - 1)),
            reads=draw(st.sampled_from(READS)),
            d_out=draw(widths),
            d_in=draw(widths),
        )
        for name in draw(st.lists(st.text("ab.0", max_size=4), unique=True, max_size=4))
    }
    sizes: dict[str, int] = {"hidden": draw(widths), "columns": draw(widths), "item": draw(st.integers(1, MOST_BYTES))}
    sizes |= {name: draw(st.integers(0, LARGEST - 1)) for name in ("other", "head")}
    return Shapes(family=draw(st.sampled_from(FAMILIES)), blocks=blocks, linears=linears, **sizes)


@settings(max_examples=60, deadline=None)
@given(shapes=any_shapes(), memory=st.integers(0, 2**63 - 1))
def test_any_shapes_survive_in_their_order(shapes: Shapes, memory: int) -> None:
    got = decode(encode(hello(shapes, memory)), Hello, limit=LIMIT)
    assert got == hello(shapes, memory)
    assert got.spec.shapes is not None
    assert list(got.spec.shapes.linears) == list(shapes.linears)


def test_no_shapes_and_no_memory_are_the_bytes_they_were() -> None:
    body, _ = framing.unpack(encode(hello(None)), 3, ["", "Task", "Update", "Hello"], limit=LIMIT)
    record = pb.Hello.FromString(body)
    assert "shapes" not in str(record)
    assert "memory" not in str(record)
    assert write_shapes(None) is None
    assert decode(encode(hello(None)), Hello, limit=LIMIT).spec.shapes is None


HUGE = 2**64 - 1
FORGERIES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda s: setattr(s, "family", "mamba"), r"shapes\.family must be one of llama, gpt2, bert, got 'mamba'"),
    (lambda s: setattr(s, "family", "x" * 10_000), rf"got '{'x' * 80}'$"),
    (lambda s: s.ClearField("family"), r"shapes\.family must be one of .* got ''"),
    (lambda s: s.Clear(), r"shapes\.family must be one of"),
    (lambda s: s.ClearField("blocks"), r"shapes must have 1\.\.4096 blocks, got 0"),
    (lambda s: s.blocks.extend([s.blocks[0]] * MAX_BLOCKS), r"shapes must have 1\.\.4096 blocks, got 4098"),
    (lambda s: setattr(s.blocks[0], "kv_heads", 0), "kv_heads of a block of shapes must be an integer in 1"),
    (lambda s: setattr(s.blocks[0], "heads", 0), "heads of a block of shapes must be an integer in 1"),
    (lambda s: setattr(s.blocks[1], "head_dim", 0), "head_dim of a block of shapes must be an integer in 1"),
    (lambda s: setattr(s.blocks[1], "ffn", HUGE), f"ffn of a block of shapes must be an integer in 1.*{HUGE}"),
    (lambda s: setattr(s.blocks[0], "heads", 7), "heads of a block must be a multiple of 3 kv_heads, got 7"),
    (lambda s: s.blocks.pop(), "block of '1.down' must be an integer in 0..0, got 1"),
    (lambda s: setattr(s.linears[0], "block", HUGE), r"block of '0\.q' must be an integer in 0\.\.1, got"),
    (lambda s: setattr(s.linears[0], "reads", "mind"), r"what '0\.q' reads must be one of attention, .* got 'mind'"),
    (lambda s: setattr(s.linears[0], "d_out", 0), r"d_out of '0\.q' must be an integer in 1"),
    (
        lambda s: setattr(s.linears[1], "d_in", WIDEST + 1),
        r"d_in of '1\.down' must be an integer in 1\.\.16777216, got",
    ),
    (lambda s: setattr(s, "item", MOST_BYTES + 1), r"shapes\.item must be an integer in 1\.\.16, got 17"),
    (lambda s: setattr(s.linears[1], "name", "0.q"), r"names in shapes\.linears must differ, got '0\.q' twice"),
    (lambda s: setattr(s.linears[1], "name", "a\nb"), r"a name in shapes\.linears must be one line"),
    (
        lambda s: [s.linears.add(name=str(i)) for i in range(100_001)],
        r"shapes\.linears must have <= 100000 entries, got 100003",
    ),
    *(
        (lambda s, field=field: setattr(s, field, HUGE), rf"shapes\.{field} must be an integer in")
        for field in ("hidden", "columns", "other", "head", "item")
    ),
    *(
        (lambda s, field=field: setattr(s, field, 0), rf"shapes\.{field} must be an integer in 1")
        for field in ("hidden", "columns", "item")
    ),
]


@pytest.mark.parametrize(("change", "match"), FORGERIES, ids=range(len(FORGERIES)))
def test_forged_shapes_are_refused(change: Callable[[Any], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decode(forged(change), Hello, limit=LIMIT)


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (replace(SHAPES, family="rnn"), r"shapes\.family must be one of"),  # type: ignore[arg-type]
        (replace(SHAPES, blocks=()), "must have 1..4096 blocks, got 0"),
        (replace(SHAPES, hidden=-1), r"shapes\.hidden must be an integer in 1\.\.16777216, got -1"),
        (replace(SHAPES, item=2.0), r"shapes\.item must be an integer"),  # type: ignore[arg-type]
        (replace(SHAPES, head=True), r"shapes\.head must be an integer"),
    ],
)
def test_bad_shapes_are_not_sent(shapes: Shapes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode(hello(shapes))
    with pytest.raises(ValueError, match=match):
        check_shapes("shapes", shapes)


def _widened(block: Block, **sizes: Any) -> Shapes:
    linear = Linear(block=0, reads="mixed", d_out=1, d_in=1)
    return replace(SHAPES, **{"hidden": 1, "columns": 1, "blocks": (block,), "linears": {"0.o": linear}} | sizes)


NARROW = Block(heads=1, kv_heads=1, head_dim=1, ffn=1)
SQUARE = Linear(block=0, reads="mixed", d_out=2**22, d_in=2**22)


@pytest.mark.parametrize(
    ("good", "bad", "match"),
    [
        (
            _widened(replace(NARROW, heads=2**12, head_dim=2**12)),
            _widened(replace(NARROW, heads=2**12, head_dim=2**12 + 1)),
            "heads x head_dim of a block of shapes must be <= 16777216, got 16781312",
        ),
        (
            _widened(NARROW, linears={"0.o": SQUARE}),
            _widened(NARROW, linears={"0.o": SQUARE, "0.p": replace(SQUARE, d_in=1)}),
            f"shapes must have <= {MOST} numbers in its linear layers, got {MOST + 2**22}",
        ),
        (
            _widened(NARROW, hidden=2**21, columns=2**23),
            _widened(NARROW, hidden=2**21, columns=2**23 + 1),
            f"shapes must have <= {MOST} numbers in its logits' layer, got {MOST + 2**21}",
        ),
        (
            _widened(replace(NARROW, ffn=(2**22 - 4) // 3), hidden=2**22),
            _widened(replace(NARROW, ffn=(2**22 - 4) // 3 + 1), hidden=2**22, blocks=(replace(NARROW, ffn=2**22),)),
            f"shapes must have <= {MOST} numbers in its blocks",
        ),
    ],
)
def test_good_widths_may_not_make_a_model_out_of_this_world(good: Shapes, bad: Shapes, match: str) -> None:
    assert decode(encode(hello(good)), Hello, limit=LIMIT) == hello(good)
    with pytest.raises(ValueError, match=match):
        check_shapes("shapes", bad)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_step_takes_of_the_widest_model_can_be_sent(family: Any) -> None:
    """A task's `need` is a whole number below 2^63."""
    wide = Block(heads=WIDEST, kv_heads=WIDEST, head_dim=1, ffn=WIDEST)
    linears = {
        f"{at}.{reads}": Linear(block=at, reads=reads, d_out=1, d_in=WIDEST)
        for at in range(MAX_BLOCKS)
        for reads in ("attention", "mixed", "mlp", "channels")
    }
    widest = Shapes(
        family=family,
        hidden=1,
        blocks=(wide,) * MAX_BLOCKS,
        linears=linears,  # type: ignore[arg-type]
        columns=WIDEST,
        other=LARGEST - 1,
        head=LARGEST - 1,
        item=MOST_BYTES,
    )
    check_shapes("shapes", widest)
    for batch, length in ((2**19 // 512, 512), (1, 2**19)):
        work = Work(ranks=dict.fromkeys(linears, 1), batch=batch, length=length, width=length // 2)
        assert memory(widest, work).total < 2**63
        assert math.isfinite(flops(widest, work))


def test_the_record_alone_goes_back_and_forth() -> None:
    record = write_shapes(SHAPES)
    assert record is not None
    assert read_shapes(record) == SHAPES


def test_a_devices_word_of_memory_survives() -> None:
    cost = Cost(seconds=0.5, peak_rss_bytes=3, peak_tensor_bytes=2**63 - 1, out_of_memory=True)
    sent = Update(device="d", round=1, examples=1, cost=cost, metrics={"ratio": 0.25, "rank": 4.0})
    assert decode(encode(sent), Update, limit=LIMIT) == sent
    with pytest.raises(ValueError, match=r"cost\.out_of_memory must be True or False, got 1"):
        encode(replace(sent, cost=replace(cost, out_of_memory=1)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"report\.memory must be an integer in 0"):
        encode(hello(memory=-1))
