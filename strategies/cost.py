"""What one local LoRA step costs, from shapes alone: peak memory, floating-point operations, bytes on the wire.

The server plans with it and holds no model; client/cost.py reads the shapes off a model and measures what is predicted.
Memory is bytes of live tensors at the worst moment of a step after the first (the optimiser's states exist by then):

    peak = weights(bits) + states * adapters + saved(batch, length, ranks) + max(3 logits, backward of a block)

`saved` counts what autograd keeps for the frozen-base path of client/fused.py, block by block, so that it knows that
nothing is kept below the lowest adapter, and that the adapters of q, k and v keep one input between them. QLoRA
(Dettmers et al. 2023, section 2) has the same terms; FedPipe's problem needs them apart, as `fixed` and `marginal`.

Legend: n = batch * length tokens, h hidden, q = heads * head_dim, f channels, V columns of the logits, r rank.
Sizes are counted in numbers (of `item` bytes in the base's dtype) until the last line of each function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from fedloom.protocols.shapes import Block, Linear, Shapes

BITS: Final = (16, 8, 4)
BLOCK: Final = {8: 128, 4: 64}  # weights that share one float32 scale (client/quantised.py)
FLOAT: Final = 4  # bytes of what is float32 whatever the base is: adapters, their gradients and states, logits
STATES: Final = {"adamw": 4, "sgd": 2, "momentum": 3}  # values, gradients, and the optimiser's moments
DEQUANTISE: Final = {16: 0.0, 8: 40.0, 4: 50.0}  # operations that making one weight takes the time of (measured, CPU)
CHUNK: Final = 2**18  # bytes of 4-bit codes that are made into weights at a time


@dataclass(frozen=True, kw_only=True)
class Work:
    """One training step: which adapters, on how much text, on a base of how many bits."""

    ranks: Mapping[str, int]  # by module; one that is absent, or of rank 0, has no adapter
    batch: int
    length: int  # tokens of the longest text, padding included
    width: int = 0  # columns at the right edge that logits are made of, for a language model: the longest completion
    bits: int = 16  # 16 leaves the base in its dtype
    optimizer: Literal["adamw", "sgd", "momentum"] = "adamw"
    padded: bool = True  # some text is shorter than the longest, so that attention needs a mask

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits}")
        if self.batch < 1 or self.length < 1 or not 0 <= self.width < self.length:
            raise ValueError(
                "batch and length must be >= 1 and width in 0..length - 1, "
                f"got batch {self.batch}, length {self.length}, width {self.width}"
            )

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by purpose; `reserve` is what the process takes beside tensors."""

    weights: int
    adapters: int  # values, gradients, optimiser states, a trained head's among them
    saved: int  # activations that wait for the backward pass
    working: int  # temporaries of the worst moment: logits and their gradients, or one block's backward pass
    reserve: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.saved + self.working + self.reserve


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a device makes of operations: `rate` in flop/s, `overhead` in seconds a step whatever its size."""

    rate: float
    overhead: float = 0.0

    def __post_init__(self) -> None:
        if not self.rate > 0 or self.overhead < 0:
            raise ValueError(f"rate must be > 0 and overhead >= 0, got {self.rate} and {self.overhead}")


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What a block keeps for its backward pass: numbers a token in the base's dtype and in float32, and T x T masks."""

    item: int = 0
    float32: int = 0
    masks: int = 0
    flows: bool = False  # whether the block's output takes a gradient


def linear_bytes(size: int, bits: int, item: int) -> int:
    """Bytes of a frozen matrix of `size` numbers: codes and one float32 scale a group of them, or the dtype's own."""
    if bits == 16:
        return size * item
    groups = -(-size // BLOCK[bits])
    return groups * (BLOCK[bits] * bits // 8 + FLOAT)


def weight_bytes(shapes: Shapes, bits: int) -> int:
    """Bytes of the base at rest, a trained head not among them."""
    return shapes.other + sum(linear_bytes(linear.size, bits, shapes.item) for linear in shapes.linears.values())


def memory(shapes: Shapes, work: Work, *, reserve: int = 0) -> Memory:
    """Peak bytes of a training step.

    Raises:
        ValueError: for a rank of a module that the model does not have, or one that does not fit it.
    """
    _check(shapes, work)
    n = work.tokens
    kept, top_flows = _kept(shapes, work)
    sizes = [
        n * (one.item * shapes.item + one.float32 * FLOAT) + one.masks * work.batch * work.length**2 * shapes.item
        for one in kept
    ]
    saved = sum(sizes)
    if top_flows and shapes.family != "bert":  # the last norm's input
        saved += n * (shapes.hidden + 2) * (FLOAT if shapes.family == "llama" else shapes.item)
        saved += n * shapes.hidden * FLOAT if shapes.head else 0  # what a trained head reads, of every token
    trained = sum(rank * (shapes.linears[m].d_out + shapes.linears[m].d_in) for m, rank in work.ranks.items())
    return Memory(
        weights=weight_bytes(shapes, work.bits),
        adapters=(trained + shapes.head) * FLOAT * STATES[work.optimizer],
        saved=saved,
        working=_working(shapes, work),
        reserve=reserve,
    )


def fixed(shapes: Shapes, work: Work, *, reserve: int = 0) -> int:
    """Peak bytes less every module's `marginal`, whatever ranks `work` names: fixed + sum of marginals = peak.

    Equal to the last byte where every module has an adapter; where some have none, an upper bound, since what their
    inputs keep is counted here.
    """
    ones = replace(work, ranks=dict.fromkeys(shapes.linears, 1))
    return memory(shapes, ones, reserve=reserve).total - sum(marginal(shapes, ones, name, 1) for name in shapes.linears)


def marginal(shapes: Shapes, work: Work, module: str, rank: int) -> int:
    """Bytes that an adapter of this rank on this module adds: its states, and x A' of every token."""
    linear = shapes.linears[module]
    tokens = 0 if linear.reads == "pooled" else work.tokens
    return rank * FLOAT * ((linear.d_out + linear.d_in) * STATES[work.optimizer] + tokens)


def flops(shapes: Shapes, work: Work) -> float:
    """Floating-point operations of one step, forward and backward.

    A frozen matrix costs 2 size a token forward and as much backward (the gradient of its input, none of itself), an
    adapter three times its forward, attention 3.5 times its own (its backward runs it again), re-made weights
    DEQUANTISE each way.
    """
    _check(shapes, work)
    n, base = work.tokens, sum(linear.size for linear in shapes.linears.values())
    forward = 2.0 * n * base
    attention = sum(4.0 * n * work.length * block.heads * block.head_dim for block in shapes.blocks)
    adapters = sum(flops_marginal(shapes, work, module, rank) for module, rank in work.ranks.items())
    rows = work.batch * (work.width + 1) if work.width else work.batch
    head = 4.0 * rows * shapes.hidden * shapes.columns
    return 2 * forward + 3.5 * attention + adapters + head + 2 * DEQUANTISE[work.bits] * base


def flops_marginal(shapes: Shapes, work: Work, module: str, rank: int) -> float:
    """Operations that an adapter adds to a step: 2 r (d_in + d_out) a token forward, twice that backward."""
    linear = shapes.linears[module]
    tokens = work.batch if linear.reads == "pooled" else work.tokens
    return 6.0 * tokens * rank * (linear.d_out + linear.d_in)


def seconds(shapes: Shapes, work: Work, speed: Speed, steps: int = 1) -> float:
    """Seconds of `steps` steps."""
    return steps * (flops(shapes, work) / speed.rate + speed.overhead)


def factor_bytes(shapes: Shapes, ranks: Mapping[str, int], *, item: int = FLOAT, a_too: bool = True) -> int:
    """Bytes on the wire of adapters in a dtype of `item` bytes, frames and scales not counted; B alone without `a_too`.

    A device sends this with its own ranks; it receives the sum over a cohort, or whatever its strategy's patch holds.
    """
    sizes = ((rank, shapes.linears[module]) for module, rank in ranks.items())
    return item * sum(rank * (linear.d_out + (linear.d_in if a_too else 0)) for rank, linear in sizes)


def _check(shapes: Shapes, work: Work) -> None:
    for module, rank in work.ranks.items():
        if module not in shapes.linears:
            raise ValueError(f"ranks must name linear layers of the model, got {module!r}")
        linear = shapes.linears[module]
        largest = min(shapes.hidden, max(linear.d_out, linear.d_in))  # a pruned one keeps the rank it was asked for
        if not 0 <= rank <= largest:
            raise ValueError(f"a rank must be in 0..{largest} for {module}, got {rank}")


def _kept(shapes: Shapes, work: Work) -> tuple[list[_Kept], bool]:
    """Each block's share of what is saved, from the bottom up, and whether the last output takes a gradient."""
    adapted: list[dict[str, list[Linear]]] = [{} for _ in shapes.blocks]
    ranks = [0] * len(shapes.blocks)
    for module, rank in work.ranks.items():
        linear = shapes.linears[module]
        if rank and linear.reads != "pooled":
            adapted[linear.block].setdefault(linear.reads, []).append(linear)
            ranks[linear.block] += rank
    kept, flows = [], False
    for block, on, rank in zip(shapes.blocks, adapted, ranks, strict=True):
        one = _block(shapes, block, on, flows, padded=work.padded)
        kept.append(replace(one, float32=one.float32 + rank))
        flows = one.flows
    return kept, flows


def _block(shapes: Shapes, block: Block, on: Mapping[str, list[Linear]], flows: bool, *, padded: bool) -> _Kept:
    """One block's share; `on`: its adapted matrices by what they read; `flows`: whether its input takes a gradient."""
    h, q, f = shapes.hidden, block.heads * block.head_dim, block.ffn
    keys = block.kv_heads * block.head_dim
    pre = shapes.family != "bert"
    item = float32 = masks = 0
    for linears in on.values():  # a float32 base keeps one input for all that read it, another a float32 copy for each
        if shapes.item == FLOAT:
            item += linears[0].d_in
        else:
            float32 += sum(linear.d_in for linear in linears)
    norms = int(pre and flows)
    if flows or "attention" in on:
        spread = padded and shapes.family == "llama"  # with a mask, keys and values are repeated for every query head
        item += q + 2 * (q if spread else keys)
        float32 += block.heads
        item += 0 if "mixed" in on and shapes.item == FLOAT else q  # its output is also what o reads
        masks += padded
        flows = True
    flows = flows or "mixed" in on
    norms += flows
    flows = flows or "mlp" in on
    if flows:
        item += {"llama": 3, "gpt2": 4, "bert": 1}[shapes.family] * f
    flows = flows or "channels" in on
    norms += flows and not pre
    if shapes.family == "llama":  # RMSNorm keeps its input in float32, LayerNorm in its own dtype
        float32 += norms * (h + 1)
    else:
        item, float32 = item + norms * h, float32 + 2 * norms
    return _Kept(item=item, float32=float32, masks=masks, flows=flows)


def _working(shapes: Shapes, work: Work) -> int:
    """Bytes of temporaries at the worst moment, on top of everything saved."""
    rows = work.batch * (work.width + 1) if work.width else work.batch
    logits = 3 * rows * shapes.columns * FLOAT
    h, f = shapes.hidden, max(block.ffn for block in shapes.blocks)
    if shapes.item == FLOAT:
        per_token = {"llama": 2 * f + h, "gpt2": 2 * f, "bert": f}[shapes.family]
    else:  # peft's own forward, which holds sums and their gradients in float32
        per_token = {"llama": 4 * f + h, "gpt2": 2 * (f + h), "bert": 2 * (f + h)}[shapes.family]
    backward = per_token * work.tokens * shapes.item
    if work.bits != 16:
        largest = max((linear.size for linear in shapes.linears.values()), default=0)
        backward += largest * shapes.item + (FLOAT * min(CHUNK, largest // 2) if work.bits == 4 else 0)
    return max(logits, backward)
