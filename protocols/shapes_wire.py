"""A model's shapes as a record, and what they must hold."""

from __future__ import annotations

from typing import Final

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import validate
from fedloom.protocols.shapes import FAMILIES, READS, Block, Linear, Shapes

MAX_BLOCKS: Final = 4096
WIDEST: Final = 2**24  # of a width: some sixty times the largest vocabulary
LARGEST: Final = 2**40  # of bytes, and of numbers in a head; with these, bytes of a step of 2^19 tokens fit 63 bits
MOST: Final = 2**44  # numbers of all matrices together: ten times the largest model
MOST_BYTES: Final = 16  # of a number


def write_shapes(shapes: Shapes | None) -> pb.Shapes | None:
    """The record of a model's shapes; none for none.

    Raises:
        ValueError: for what `check_shapes` refuses.
    """
    if shapes is None:
        return None
    check_shapes("shapes", shapes)
    return pb.Shapes(
        family=shapes.family,
        hidden=shapes.hidden,
        blocks=[
            pb.ShapeBlock(heads=one.heads, kv_heads=one.kv_heads, head_dim=one.head_dim, ffn=one.ffn)
            for one in shapes.blocks
        ],
        linears=[
            pb.ShapeLinear(name=name, block=one.block, reads=one.reads, d_out=one.d_out, d_in=one.d_in)
            for name, one in shapes.linears.items()
        ],
        columns=shapes.columns,
        other=shapes.other,
        head=shapes.head,
        item=shapes.item,
    )


def read_shapes(record: pb.Shapes) -> Shapes:
    """The shapes of a record.

    Raises:
        ValueError: for names that are not unique, or what `check_shapes` refuses.
    """
    validate.names("shapes.linears", (one.name for one in record.linears), len(record.linears))
    shapes = Shapes(
        family=record.family,  # type: ignore[arg-type]  # checked below
        hidden=record.hidden,
        blocks=tuple(
            Block(heads=one.heads, kv_heads=one.kv_heads, head_dim=one.head_dim, ffn=one.ffn) for one in record.blocks
        ),
        linears={
            one.name: Linear(block=one.block, reads=one.reads, d_out=one.d_out, d_in=one.d_in)  # type: ignore[arg-type]
            for one in record.linears
        },
        columns=record.columns,
        other=record.other,
        head=record.head,
        item=record.item,
    )
    check_shapes("shapes", shapes)
    return shapes


def check_shapes(where: str, shapes: Shapes) -> None:
    """Raise ValueError on the first of a model's shapes that breaks its bounds."""
    if shapes.family not in FAMILIES:
        raise ValueError(f"{where}.family must be one of {', '.join(FAMILIES)}, got {str(shapes.family)[:80]!r}")
    for field, largest in (("hidden", WIDEST), ("columns", WIDEST), ("item", MOST_BYTES)):
        validate.integer(f"{where}.{field}", getattr(shapes, field), largest + 1, least=1)
    for field in ("other", "head"):
        validate.integer(f"{where}.{field}", getattr(shapes, field), LARGEST)
    if not 1 <= len(shapes.blocks) <= MAX_BLOCKS:
        raise ValueError(f"{where} must have 1..{MAX_BLOCKS} blocks, got {len(shapes.blocks)}")
    for block in shapes.blocks:
        for field in ("heads", "kv_heads", "head_dim", "ffn"):
            validate.integer(f"{field} of a block of {where}", getattr(block, field), WIDEST + 1, least=1)
        if block.heads % block.kv_heads:
            raise ValueError(f"heads of a block must be a multiple of {block.kv_heads} kv_heads, got {block.heads}")
    validate.names(f"{where}.linears", shapes.linears, len(shapes.linears))
    for name, linear in shapes.linears.items():
        if linear.reads not in READS:
            raise ValueError(f"what {name!r} reads must be one of {', '.join(READS)}, got {str(linear.reads)[:80]!r}")
        for field in ("d_out", "d_in"):
            validate.integer(f"{field} of {name!r}", getattr(linear, field), WIDEST + 1, least=1)
        validate.integer(f"block of {name!r}", linear.block, len(shapes.blocks))
    _check_products(where, shapes)


def _check_products(where: str, shapes: Shapes) -> None:
    """Raise ValueError where good widths make a model that is out of this world."""
    for block in shapes.blocks:
        if (width := block.heads * block.head_dim) > WIDEST:
            raise ValueError(f"heads x head_dim of a block of {where} must be <= {WIDEST}, got {width}")
    inside = sum(2 * (one.heads + one.kv_heads) * one.head_dim + 3 * one.ffn for one in shapes.blocks)
    sizes = {
        "its blocks": shapes.hidden * inside,
        "its linear layers": sum(linear.size for linear in shapes.linears.values()),
        "its logits' layer": shapes.hidden * shapes.columns,
    }
    for what, size in sizes.items():
        if size > MOST:
            raise ValueError(f"{where} must have <= {MOST} numbers in {what}, got {size}")
