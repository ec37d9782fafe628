"""The shapes of a model for strategies/cost.py, and what a task really costs: seconds, peak bytes, out of memory.

What is measured is bytes of live tensors, counted by a dispatch mode at every operation (`Meter`). It is the same on
every run and on every device, so that a pretend device of 4 GB fails where a real one would; the process's resident
memory has the interpreter, the libraries and the allocator's slack on top, which benchmarks/cost.py sets beside it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from fedloom.client.bits import quantised
from fedloom.protocols.shapes import Block, Family, Linear, Reads, Shapes
from fedloom.strategies.cost import Speed

if TYPE_CHECKING:
    from fedloom.client.model import Resident

T = TypeVar("T")

_MODELS: Final[Mapping[str, Family]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2"), "llama"),
    "gpt2": "gpt2",
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), "bert"),
}
_READS: Final[Mapping[str, Reads]] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn.c_attn", "query", "key", "value"), "attention"),
    **dict.fromkeys(("o_proj", "attn.c_proj", "attention.output.dense"), "mixed"),
    **dict.fromkeys(("gate_proj", "up_proj", "mlp.c_fc", "intermediate.dense"), "mlp"),
    **dict.fromkeys(("down_proj", "mlp.c_proj", "output.dense"), "channels"),
    "pooler.dense": "pooled",
}  # by the end of a module's name, the first that fits


def shapes_of(resident: Resident) -> Shapes:
    """What costs depend on of a loaded model, pruned or not, whatever bits it is held in.

    Raises:
        ValueError: for an architecture whose saved activations are not known, or one that does not attend by sdpa.
    """
    model, task = resident.model, resident.config.task
    settings = model.config.get_text_config()
    family = _MODELS.get(settings.model_type)
    if family is None:
        raise ValueError(
            f"costs are known of {', '.join(sorted(_MODELS))}, got a model of type {settings.model_type!r}"
        )
    if settings._attn_implementation != "sdpa":
        raise ValueError(f"costs are known of attention by 'sdpa', got {settings._attn_implementation!r}")
    sizes = {name: _size(layer) for name, layer in resident.bits.layers.items()}
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    linears = {name: _linear(name, size, settings.num_hidden_layers) for name, size in sizes.items()}
    dtype = getattr(torch, resident.config.dtype)
    outside = sum(t.numel() * t.element_size() for t in _outside(resident, sizes))
    return Shapes(
        family=family,
        hidden=settings.hidden_size,
        blocks=tuple(_block(family, linears, at, head_dim) for at in range(settings.num_hidden_layers)),
        linears=linears,
        columns=settings.vocab_size if task == "causal" else len(resident.labels),
        other=outside,
        head=sum(head.numel() for head in resident.base.heads.values()),
        item=dtype.itemsize,
    )


def _size(layer: Any) -> tuple[int, int]:
    """d_out, d_in; a quantised layer's weight is empty."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def _linear(name: str, size: tuple[int, int], blocks: int) -> Linear:
    reads = next((reads for end, reads in _READS.items() if name.endswith(f".{end}")), None)
    if reads is None:
        raise ValueError(f"costs are known of linear layers named {', '.join(_READS)}, got {name!r}")
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return Linear(block=numbers[0] if numbers else blocks - 1, reads=reads, d_out=size[0], d_in=size[1])


def _block(family: Family, linears: Mapping[str, Linear], at: int, head_dim: int) -> Block:
    """A block's widths, off its own matrices: pruned ones differ from what the model's settings say."""
    here = {name: linear for name, linear in linears.items() if linear.block == at}
    mixed = next(linear for linear in here.values() if linear.reads == "mixed")
    ffn = next(linear for linear in here.values() if linear.reads == "channels")
    keys = next((linear.d_out for name, linear in here.items() if name.endswith(".k_proj")), mixed.d_in)
    return Block(heads=mixed.d_in // head_dim, kv_heads=keys // head_dim, head_dim=head_dim, ffn=ffn.d_in)


def _outside(resident: Resident, linears: Mapping[str, object]) -> Iterator[Tensor]:
    """Parameters and buffers of no adapter, no linear's weight and no trained head, each storage once."""
    trained = {id(head) for head in resident.base.heads.values()}
    seen: set[int] = set()
    for name, tensor in [*resident.model.named_parameters(), *resident.model.named_buffers()]:
        owner, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        if ".lora_" in name or id(tensor) in trained or (leaf == "weight" and owner in linears):
            continue
        if tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            yield tensor


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that is made inside the block, until it is freed.

    `live` and `peak` are bytes. What an operation allocates and frees within itself is not seen; mapped files, which
    the system may drop, do not count.
    """

    def __init__(self, *, limit: int = 0) -> None:
        """`limit`: bytes above which an operation raises MemoryError; 0 sets none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.live, self.peak = limit, 0, 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._count(tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in the block, and guarding each call against it is half of what a call costs."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if self.limit and self.live > self.limit:
            raise MemoryError(f"tensors must fit into {self.limit} bytes, got {self.live} at {func}")
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size or storage.filename is not None:
            return
        self._known[key] = weakref.ref(storage, partial(self._forget, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: object) -> None:
        if self._known.pop(key, None) is not None:
            self.live -= size


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a task cost: seconds, peak bytes of tensors (0: not counted), and whether memory ran out."""

    seconds: float
    peak_bytes: int = 0
    oom: bool = False


def attempt(
    run: Callable[[], T],
    *,
    limit: int = 0,
    predicted: int = 0,
    metered: bool = False,
    watch: Iterable[Tensor] = (),
) -> tuple[T | None, Trial]:
    """Run a task on a device of limited memory; None where it ran out, and what it cost.

    Args:
        limit: bytes for the model and its training; 0 sets no limit.
        predicted: bytes that the task is expected to need (strategies.cost.memory): beyond `limit` it is not begun.
        metered: count tensors, and stop where they pass the limit; else only the machine's own refusal counts.
        watch: tensors that exist already and count (a model's: `held`).
    """
    if limit and predicted > limit:
        return None, Trial(seconds=0.0, peak_bytes=predicted, oom=True)
    meter = Meter(limit=limit) if metered else None
    began, result, oom = time.perf_counter(), None, False
    try:
        if meter is not None:
            meter.watch(watch)
        with meter or nullcontext():
            result = run()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        oom = True
    return result, Trial(seconds=time.perf_counter() - began, peak_bytes=meter.peak if meter else predicted, oom=oom)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: Python's, the accelerator's, or torch's RuntimeError on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def held(resident: Resident) -> list[Tensor]:
    """Every tensor that a resident model keeps in memory: its base, codes of a quantised one, and adapters."""
    codes = [code for layer in resident.bits.layers.values() if (code := quantised(layer))]
    tensors = [tensor for code in codes for tensor in (code.codes, code.scales)]
    return [*resident.model.parameters(), *resident.model.buffers(), *tensors]


def fit_speed(points: Sequence[tuple[float, float]]) -> Speed:
    """The rate and the overhead that best explain (flops, seconds) of steps, by least squares of relative errors.

    Raises:
        ValueError: for fewer than two different amounts of work, or times that do not grow with it.
    """
    if len({flops for flops, _ in points}) < 2:
        raise ValueError(f"two different amounts of work must be timed, got {len(points)} of one")
    rows = torch.tensor([[flops / seconds, 1 / seconds] for flops, seconds in points], dtype=torch.float64)
    scale = rows.amax(0)
    ones = torch.ones(len(points), 1, dtype=torch.float64)
    slope, overhead = torch.linalg.lstsq(rows / scale, ones).solution.flatten()
    inverse = float(slope / scale[0])
    if inverse <= 0:
        raise ValueError(f"times must grow with the work, got {list(points)}")
    return Speed(rate=1 / inverse, overhead=max(0.0, float(overhead / scale[1])))
