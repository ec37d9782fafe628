"""A small transformer that can be pruned, and devices that prune it at random and train some of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedloom.protocols.messages import Axis, Cost, Kind, MatrixSpec, ModelSpec, Payload, Task, Update
from fedloom.protocols.shapes import Block, Linear, Shapes
from fedloom.strategies.masked import pruned, slice_payload
from fedloom.strategies.sparsity import removed, spared_layers
from fedloom.strategies.unequal import DROP, MEASURE, RANK, RATIO, REPEATED, SCORE

READS = {"q": "attention", "k": "attention", "v": "attention", "o": "mixed", "up": "mlp", "gate": "mlp",
         "down": "channels"}  # fmt: skip


def transformer(
    *,
    layers: int = 3,
    kv: int = 3,
    per: int = 2,
    head_dim: int = 6,
    hidden: int = 24,
    ffn: int = 20,
    targets: tuple[str, ...] = tuple(READS),
    **other: Any,
) -> ModelSpec:
    """A decoder like a llama: `per` query heads for each of `kv` key-value heads; adapters on the targets alone."""
    q, keys = kv * per * head_dim, kv * head_dim
    sizes = {"q": (q, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, q), "up": (ffn, hidden),
             "gate": (ffn, hidden), "down": (hidden, ffn)}  # fmt: skip
    linears, matrices, groups = {}, {}, {}
    for at in range(layers):
        groups |= {f"{at}.heads": kv} if kv > 1 else {}
        groups |= {f"{at}.channels": ffn}
        for name, (d_out, d_in) in sizes.items():
            linears[f"{at}.{name}"] = Linear(block=at, reads=READS[name], d_out=d_out, d_in=d_in)  # type: ignore[arg-type]
            kind = "heads" if READS[name] in ("attention", "mixed") else "channels"
            side = d_in if READS[name] in ("mixed", "channels") else d_out
            axis = Axis(group=f"{at}.{kind}", width=side // (kv if kind == "heads" else ffn))
            axis_or_none = axis if axis.group in groups else None
            sides = {"columns" if READS[name] in ("mixed", "channels") else "rows": axis_or_none}
            if name in targets:
                matrices[f"{at}.{name}"] = MatrixSpec(d_out=d_out, d_in=d_in, **sides)
    block = Block(heads=kv * per, kv_heads=kv, head_dim=head_dim, ffn=ffn)
    shapes = Shapes(
        **{"family": "llama", "hidden": hidden, "blocks": (block,) * layers, "linears": linears, "columns": 50,
           "other": 7000, **other}
    )  # fmt: skip
    return ModelSpec(base_hash="toy", matrices=matrices, groups=groups, shapes=shapes)


def random_keep(spec: ModelSpec, ratio: float, rng: Any, allowed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A keep that drops a ratio of each kind's units at random, and no unit of a spared layer."""
    keep = {group: np.array((allowed or {}).get(group, np.ones(units, bool))) for group, units in spec.groups.items()}
    spared = spared_layers(len(spec.shapes.blocks))
    for kind in ("heads", "channels"):
        names = [group for group in keep if group.endswith(f".{kind}")]
        units = [(group, unit) for group in names for unit in np.flatnonzero(keep[group])]
        gone = sum(int((~keep[group]).sum()) for group in names)
        wanted = removed(ratio, sum(spec.groups[group] for group in names))
        for at in rng.permutation(len(units)):
            group, unit = units[at]
            if gone < wanted and int(group.split(".")[0]) not in spared and keep[group].sum() > 1:
                keep[group][unit] = False
                gone += 1
        assert gone >= wanted
    return keep


def cut_shapes(spec: ModelSpec, keep: Mapping[str, Any]) -> Shapes:
    """The shapes of a model of which a keep is left, layer by layer."""
    blocks = []
    for at, block in enumerate(spec.shapes.blocks):
        kv = int(keep[f"{at}.heads"].sum()) if f"{at}.heads" in keep else block.kv_heads
        per = block.heads // block.kv_heads
        blocks.append(replace(block, heads=kv * per, kv_heads=kv, ffn=int(keep[f"{at}.channels"].sum())))
    small = pruned(spec, keep).matrices
    linears = {
        name: replace(one, d_out=small[name].d_out, d_in=small[name].d_in) for name, one in spec.shapes.linears.items()
    }
    return replace(spec.shapes, blocks=tuple(blocks), linears=linears)


def adjusted(task: Task, payload: Payload, spec: ModelSpec, rng: Any) -> tuple[Payload, dict[str, float]]:
    """What a device sends of a whole payload when its task names modules, or lets it prune; and what it measures."""
    metrics = {name: float(task.knobs[name]) for name in REPEATED if name in task.knobs}
    if task.ranks:
        factors = {}
        for name, rank in task.ranks.items():
            term = payload.factors[name]
            factors[name] = replace(term, b=term.b[:, :rank], a=term.a[:rank], alpha=task.alpha_of(name))
        payload = replace(payload, factors=factors)
    if MEASURE in task.knobs:
        metrics |= {SCORE + name: float(rng.uniform(0.1, 3)) for name in task.ranks}
    if task.start.keep:
        keep = random_keep(spec, float(task.knobs.get("prune_ratio", 0.0)), rng, task.start.keep)
        payload = slice_payload(payload, spec, keep)
        metrics[DROP] = float(rng.uniform(0, 1))
    return payload, metrics


def ran_out(task: Task, examples: int = 3) -> Update:
    """What a device says when a task was too much for it."""
    metrics = {RATIO: float(task.knobs.get("prune_ratio", 0.0)), RANK: float(task.rank)}
    metrics |= {name: float(task.knobs[name]) for name in REPEATED if name in task.knobs}
    cost = Cost(seconds=1.0, out_of_memory=True)
    return Update(
        device=task.device,
        round=task.round,
        examples=examples,
        kind=Kind.TRAIN,
        run=task.run,
        nonce=task.nonce,
        metrics=metrics,
        cost=cost,
    )
