"""How much of a model is pruned, and what a server foretells of the shapes that are left."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unequal_fleet import READS, cut_shapes, random_keep, transformer

from fedloom.protocols.shapes import Block
from fedloom.strategies.cost import Work, flops, memory, weight_bytes
from fedloom.strategies.sparsity import cubic, most_ratio, narrowed, pruned_share, removed, spared_layers


def work(shapes, rank=2, **other):
    return Work(ranks=dict.fromkeys(shapes.linears, rank), batch=2, length=8, width=4, **other)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(2, 24),
    st.floats(0, 1),
    st.sampled_from([16, 8, 4]),
    st.integers(0, 999),
)
def test_sums_over_alike_layers_are_those_of_any_choice(layers, kv, per, ffn, share, bits, seed):
    spec = transformer(layers=layers, kv=kv, per=per, ffn=ffn)
    ratio = share * most_ratio(spec.shapes)
    keep = random_keep(spec, ratio, np.random.default_rng(seed))
    real, foretold = cut_shapes(spec, keep), narrowed(spec.shapes, ratio)
    one, other = (memory(shapes, work(shapes, rank=1, bits=bits)) for shapes in (foretold, real))
    assert (one.adapters, one.saved) == (other.adapters, other.saved)
    assert one.working >= other.working
    scales = 0 if bits == 16 else 4 * len(real.linears) + 68 * len(real.linears)  # a group of weights is whole
    assert one.weights == pytest.approx(other.weights, abs=scales)
    assert flops(foretold, work(foretold, rank=1, bits=bits)) == pytest.approx(
        flops(real, work(real, rank=1, bits=bits)), rel=1e-12
    )
    assert pruned_share(keep, spec.groups) <= ratio + 1e-9


@pytest.mark.parametrize(("kv", "per", "ffn"), [(1, 6, 20), (3, 2, 20), (6, 1, 7)])
def test_nothing_pruned_is_the_model_itself_and_more_never_costs_more(kv, per, ffn):
    shapes = transformer(layers=5, kv=kv, per=per, ffn=ffn).shapes
    assert narrowed(shapes, 0.0) == shapes
    ratios = np.linspace(0, most_ratio(shapes), 40)
    needs = [memory(narrowed(shapes, ratio), work(shapes, rank=1)).total for ratio in ratios]
    assert needs == sorted(needs, reverse=True)
    assert needs[-1] < needs[0]


def test_each_kind_loses_its_share_and_spared_layers_stay():
    shapes = transformer(layers=11, kv=4, per=2, ffn=30).shapes
    small = narrowed(shapes, 0.5)
    assert spared_layers(11) == {0, 10}
    assert [small.blocks[at] for at in (0, 10)] == [shapes.blocks[0]] * 2
    assert sum(block.kv_heads for block in small.blocks) == 44 - 22
    assert sum(block.ffn for block in small.blocks) == 330 - 165
    assert all(block.heads == 2 * block.kv_heads for block in small.blocks)
    free = [block.kv_heads for block in small.blocks[1:-1]]
    assert max(free) - min(free) <= 1
    assert (small.linears["3.q"].d_out, small.linears["3.k"].d_out) == (12 * small.blocks[3].kv_heads, 6 * free[2])
    assert (small.linears["3.o"].d_in, small.linears["3.o"].d_out) == (12 * small.blocks[3].kv_heads, 24)
    assert (small.linears["3.up"].d_out, small.linears["3.down"].d_in) == (small.blocks[3].ffn,) * 2


def test_a_fused_projection_loses_from_each_part_and_a_pooler_nothing():
    shapes = transformer(layers=3, kv=4, per=1, head_dim=5).shapes
    fused = replace(shapes.linears["0.q"], d_out=3 * 20)
    pooler = replace(shapes.linears["2.o"], reads="pooled", d_out=24, d_in=24)
    small = narrowed(replace(shapes, linears={"fused": fused, "pooler": pooler}), 0.25)
    assert small.linears["fused"].d_out == 15 * small.blocks[0].kv_heads < 60
    assert small.linears["pooler"] == pooler


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 30))
def test_the_most_that_can_go_leaves_a_unit_of_each_kind_everywhere(layers, kv, ffn):
    shapes = transformer(layers=layers, kv=kv, ffn=ffn).shapes
    most = most_ratio(shapes)
    small = narrowed(shapes, most)
    spared = spared_layers(layers)
    for at, (block, before) in enumerate(zip(small.blocks, shapes.blocks, strict=True)):
        assert block == before if at in spared else min(block.kv_heads, block.ffn) >= 1
    if kv > 1 or ffn > 1:
        with pytest.raises(ValueError, match="a pruning ratio must be <= "):
            narrowed(shapes, most + 1 / min(layers * n for n in (kv, ffn) if n > 1))
    else:
        assert most == 0.0


def test_a_single_key_value_head_stays():
    shapes = transformer(layers=4, kv=1, per=4, ffn=10).shapes
    small = narrowed(shapes, 0.5)
    assert {(block.heads, block.kv_heads) for block in small.blocks} == {(4, 1)}
    assert sum(block.ffn for block in small.blocks) == 20
    assert most_ratio(shapes) == 27 / 40
    assert not any(group.endswith("heads") for group in transformer(kv=1).groups)


def test_a_model_that_is_narrower_already_loses_where_it_has():
    shapes = transformer(layers=4, kv=2, per=1, ffn=10).shapes
    uneven = (2, 10), (1, 3), (2, 10), (2, 10)
    blocks = tuple(Block(heads=kv, kv_heads=kv, head_dim=6, ffn=ffn) for kv, ffn in uneven)
    small = narrowed(replace(shapes, blocks=blocks, linears={}), 2 / 7)
    assert [block.kv_heads for block in small.blocks] == [1, 1, 1, 2]
    assert min(block.ffn for block in small.blocks) >= 1
    assert sum(block.ffn for block in small.blocks) == 33 - 9


def test_schedule_and_rounding():
    assert [cubic(t, 4, 0.8) for t in (0, 4, 9)] == [0.0, 0.8, 0.8]
    assert cubic(1, 4, 0.8) == pytest.approx(0.8 * (1 - 0.75**3))
    assert cubic(1, 2, 0.5, start=0.1) == pytest.approx(0.5 - 0.4 / 8)
    with pytest.raises(ValueError, match=r"shares in \[0, 1\), got 0 steps"):
        cubic(1, 0, 0.5)
    assert (removed(0.3, 10), removed(1 / 3, 3), removed(0.999, 10)) == (3, 1, 9)
    assert pruned_share({"a": np.array([True, False])}, {"a": 2, "b": 2}) == 0.25
    assert pruned_share({}, {}) == 0.0
    assert set(READS.values()) == {"attention", "mixed", "mlp", "channels"}


def test_bytes_at_rest_are_counted_by_hand():
    spec = transformer(layers=2, kv=2, per=1, head_dim=3, hidden=4, ffn=5)
    block = 4 * (6 * 4) + 3 * (5 * 4)
    assert weight_bytes(spec.shapes, 16) == 7000 + 4 * 2 * block
    small = narrowed(spec.shapes, 0.25)  # one of four heads, two of ten channels, all of the first layer
    assert weight_bytes(small, 16) == 7000 + 4 * (2 * block - 4 * 3 * 4 - 3 * 2 * 4)
