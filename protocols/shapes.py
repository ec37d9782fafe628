"""The shapes of a transformer that costs depend on: what a device tells a server, which holds no model.

Legend: h hidden, q = heads * head_dim, f FFN channels, V columns of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

Family = Literal["llama", "gpt2", "bert"]
Reads = Literal["attention", "mixed", "mlp", "channels", "pooled"]  # what q k v read, o, gate up, down; and a pooler
FAMILIES: Final = get_args(Family)
READS: Final = get_args(Reads)


@dataclass(frozen=True, kw_only=True)
class Block:
    """The widths of one transformer block; a pruned one is narrower than its neighbours."""

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One frozen matrix that may carry an adapter, [d_out, d_in], and which of its block's inputs it reads."""

    block: int
    reads: Reads
    d_out: int
    d_in: int

    @property
    def size(self) -> int:
        return self.d_out * self.d_in


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """All that costs depend on of a model. Two models of the same shapes cost the same."""

    family: Family
    hidden: int
    blocks: tuple[Block, ...]
    linears: Mapping[str, Linear]  # by module name
    columns: int  # of the logits: the vocabulary, or the classes
    other: int  # bytes of parameters and buffers that are in no linear and not trained: embeddings, norms, biases
    head: int = 0  # numbers in a classifier's head, trained in full
    item: int = 4  # bytes of a number in the base's dtype
