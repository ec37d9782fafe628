"""Frozen weights as 8-bit integers or 4-bit NormalFloats, made dense again one layer at a time.

    int8   w ~ q s: one float32 scale s = max |w| / 127 for 128 weights, q = round(w / s); 8.25 bits a weight
    nf4    w ~ t[q] s: one float32 scale s = max |w| for 64 weights, t the 16 quantiles of a normal distribution that
           QLoRA calls NormalFloat (Dettmers et al. 2023, appendix E); 4.5 bits a weight

Groups run over the weight as it is stored; the last one is filled up with zeros. Every step is one rounding of IEEE
arithmetic, so all machines hold the same codes and, made dense in float32, the same weights: the codes of nf4 are those
of bitsandbytes. Plain torch, so it runs wherever torch does; benchmarks/quantised.py sets it beside the libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedloom.strategies.cost import BLOCK, CHUNK

BITS: Final = (8, 4)
NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A frozen weight as codes and scales.

    codes: int8 [groups, 128], or uint8 [groups, 32] with two codes a byte, the first in its upper half.
    scales: float32 [groups, 1].
    shape: of the weight as its layer stores it; `transposed` where that is [d_in, d_out] (Conv1D).
    """

    bits: int
    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def dense(self) -> Tensor:
        """The weight that the codes stand for, new, in the base's dtype."""
        size = BLOCK[self.bits]
        groups = len(self.codes)
        values = torch.empty((groups, size), dtype=torch.float32, device=self.codes.device)
        if self.bits == 8:
            values.copy_(self.codes)
        else:
            _look_up(self.codes.view(-1), values)
        values.mul_(self.scales)
        return values.view(-1)[: math.prod(self.shape)].view(self.shape).to(self.dtype)

    def logical(self) -> Tensor:
        """The same as [d_out, d_in]."""
        return self.dense().t() if self.transposed else self.dense()


def quantise(weight: Tensor, bits: int, *, transposed: bool = False, dtype: torch.dtype | None = None) -> Quantised:
    """A weight's codes; rounding is to the nearest, halves to even in int8 and down in nf4.

    Args:
        dtype: what it is made dense in; None: the weight's own.

    Raises:
        ValueError: for another number of bits, or a weight that is not finite.
    """
    if bits not in BITS:
        raise ValueError(f"a weight must be quantised to one of {BITS} bits, got {bits}")
    flat = weight.detach().reshape(-1)
    size = BLOCK[bits]
    short = -len(flat) % size
    groups = (torch.cat([flat, flat.new_zeros(short)]) if short else flat).view(-1, size).float()
    largest = groups.abs().amax(1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError(f"a weight must be finite to be quantised, got {float(largest.max())}")
    unit = largest.masked_fill(largest == 0, 1.0)  # a group of zeros
    if bits == 8:
        scales = unit / 127
        codes = (groups / scales).round_().to(torch.int8)
    else:
        scales = unit
        places = torch.bucketize(groups / scales, _tables(flat.device)[0]).to(torch.uint8)
        codes = (places[:, ::2] << 4) | places[:, 1::2]
    return Quantised(
        bits=bits,
        codes=codes,
        scales=scales,
        shape=tuple(weight.shape),
        dtype=dtype or weight.dtype,
        transposed=transposed,
    )


@lru_cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 15 middles between the values of NF4; and for each byte its two values, as one complex number."""
    table = torch.tensor(NF4, device=device)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)
    return (table[1:] + table[:-1]) / 2, torch.view_as_complex(pairs)


def _look_up(codes: Tensor, out: Tensor) -> None:
    """The NF4 values of pairs of codes: a byte takes one look-up."""
    pairs, flat = _tables(codes.device)[1], torch.view_as_complex(out.view(-1, 2))
    for at in range(0, len(codes), CHUNK):
        torch.index_select(pairs, 0, codes[at : at + CHUNK].int(), out=flat[at : at + CHUNK])


class FrozenLinear(torch.autograd.Function):
    """y = x W' + bias for a quantised W: what is kept for the backward pass is the codes, not W. x [tokens, d_in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantised, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        logical = weight.logical()
        y = flat @ logical.t() if bias is None else torch.addmm(bias, flat, logical.t())
        ctx.weight, ctx.shape = weight, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad.reshape(-1, grad.shape[-1]) @ ctx.weight.logical()).view(ctx.shape), None, None


def frozen_linear(x: Tensor, weight: Quantised, bias: Tensor | None) -> Tensor:
    """x W' + bias; x [..., d_in] to [..., d_out]."""
    result: Tensor = FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result
