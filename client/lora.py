"""LoRA adapters (Hu et al. 2021) on one model: placed once by peft, given another rank, start or scale every round.

h = W x + s B A x with s = alpha / r, or alpha / sqrt(r) for rsLoRA; A [r, d_in] and B [d_out, r] are always float32.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.client.bits import quantised
from fedloom.client.fused import adapted_linear
from fedloom.protocols.messages import LowRank, MatrixSpec

ADAPTER = "default"


def head_modules(model: nn.Module, task: str) -> dict[str, nn.Module]:
    """What no adapter goes on by default: the output embedding, or every part of a classifier beside its backbone.

    The parts of a classifier (`score`, `classifier`, `pre_classifier`, a whole ClassificationHead) are trained in full.
    """
    if task == "classify":
        backbone = str(getattr(model, "base_model_prefix", ""))
        children = model.named_children()
        return {name: part for name, part in children if name != backbone and any(True for _ in part.parameters())}
    output = model.get_output_embeddings()  # type: ignore[operator]
    return {name: module for name, module in model.named_modules() if module is output}


def candidates(model: nn.Module, skip: Mapping[str, nn.Module]) -> dict[str, MatrixSpec]:
    """Every nn.Linear and Conv1D outside `skip`, with its logical size."""
    found: dict[str, MatrixSpec] = {}
    for name, module in model.named_modules():
        if any(name == head or name.startswith(f"{head}.") for head in skip):
            continue
        if isinstance(module, nn.Linear):
            found[name] = MatrixSpec(d_out=module.out_features, d_in=module.in_features)
        elif isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            found[name] = MatrixSpec(d_out=d_out, d_in=d_in, kind="conv1d")
    return found


def find_targets(model: nn.Module, wanted: str | Sequence[str], task: str) -> dict[str, MatrixSpec]:
    """The modules that get an adapter: all candidates for `auto`, else those whose name ends in one of `wanted`.

    Raises:
        ValueError: for a name that matches nothing, or a weight that two modules share.
    """
    heads = head_modules(model, task)
    known = candidates(model, heads if wanted == "auto" or task == "classify" else {})
    if wanted == "auto":
        chosen = known
    else:
        suffixes = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        for suffix in suffixes:
            if not any(_ends_with(name, suffix) for name in known):
                some = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known))
                raise ValueError(f"lora.targets must name linear layers of the model ({some}), got {suffix!r}")
        chosen = {name: size for name, size in known.items() if any(_ends_with(name, suffix) for suffix in suffixes)}
    if not chosen:
        raise ValueError(f"the model must have a linear layer to adapt, got a {type(model).__name__} without")
    _refuse_shared(model, chosen)
    return dict(sorted(chosen.items()))


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _refuse_shared(model: nn.Module, targets: Mapping[str, MatrixSpec]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for target in targets:
        shared = owners[id(model.get_submodule(target).weight)]
        if len(shared) > 1:
            raise ValueError(f"lora.targets must not name tied weights, got {target!r} ({' = '.join(shared)})")


def check_rank(rank: int, matrices: Mapping[str, MatrixSpec]) -> None:
    """Raise ValueError unless every matrix is large enough for an adapter of this rank."""
    for name, size in matrices.items():
        if not 1 <= rank <= min(size.d_out, size.d_in):
            raise ValueError(
                f"rank must be in 1..{min(size.d_out, size.d_in)} for {name} [{size.d_out}, {size.d_in}], got {rank}"
            )


class Adapters:
    """The adapters of one model; there is one such object per model, whatever the rank of the round."""

    def __init__(self, model: nn.Module, matrices: Mapping[str, MatrixSpec]) -> None:
        """Wrap the modules that `matrices` names, in place, at B = 0. The model keeps its class and its names."""
        self.matrices = dict(matrices)  # the sizes as they are, which pruning changes
        self.whole = dict(matrices)
        self._bare: set[str] = set()  # modules that have no adapter now
        self.on_gradients: Callable[[Adapters], None] | None = None  # told between backward and the optimiser's step
        model.requires_grad_(False)
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # peft says that it sets fan_in_fan_out for Conv1D by itself
            inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=list(matrices)), model)
        wrapped = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
        if wrapped.keys() != self.matrices.keys():
            raise ValueError(f"peft must wrap {len(matrices)} modules, got {len(wrapped)}")
        self.layers: dict[str, Any] = {name: wrapped[name] for name in self.matrices}  # LoraLinear: untyped
        for layer in self.layers.values():
            layer.forward = types.MethodType(_forward, layer)
        self.clear()

    def clear(self) -> None:
        """Adapters of rank 1 that add nothing: whatever the task before left is gone."""
        self.set_factors({name: _zero(size) for name, size in self.matrices.items()})

    def set_factors(self, factors: Mapping[str, LowRank], *, train_a: bool = True, partial: bool = False) -> None:
        """Put these factors in place of the adapters, of whatever rank and scale they are.

        With `partial`, modules that get none have no adapter until the next call.

        Raises:
            ValueError: unless there is one for every adapted module and each fits its module.
        """
        if partial and factors and factors.keys() <= self.matrices.keys():
            bare = {name: _zero(self.matrices[name]) for name in self.matrices if name not in factors}
        else:
            bare = {}
        if factors.keys() | bare.keys() != self.matrices.keys():
            odd = sorted(factors.keys() ^ self.matrices.keys())
            raise ValueError(
                f"factors must be given for each of {len(self.matrices)} modules, got a mismatch at {odd[0]!r}"
            )
        for name, factor in factors.items():
            size = self.matrices[name]
            if (factor.b.shape[0], factor.a.shape[1]) != (size.d_out, size.d_in):
                raise ValueError(
                    f"factors of {name} must make a [{size.d_out}, {size.d_in}] matrix, "
                    f"got [{factor.b.shape[0]}, {factor.a.shape[1]}]"
                )
            check_rank(factor.rank, {name: self.whole[name]})
        for name, factor in {**factors, **bare}.items():
            _set_layer(self.layers[name], factor, train_a)
        self._bare = set(bare)
        for name, layer in self.layers.items():
            layer._disable_adapters = name in self._bare
            for part in (layer.lora_A, layer.lora_B):
                part[ADAPTER].weight.requires_grad_(name not in self._bare and part[ADAPTER].weight.requires_grad)

    def get_factors(self) -> dict[str, LowRank]:
        """The adapters as they stand: float32 copies, with alpha and rank explicit."""
        found = {}
        for name, layer in self.active.items():
            a, b = (part[ADAPTER].weight.detach().cpu().float().numpy().copy() for part in (layer.lora_A, layer.lora_B))
            alpha = float(layer.lora_alpha[ADAPTER])
            found[name] = LowRank(b=b, a=a, alpha=alpha, rslora=bool(layer.use_rslora[ADAPTER]))
        return found

    @property
    def active(self) -> dict[str, Any]:
        """The layers that have an adapter now, by module name."""
        return {name: layer for name, layer in self.layers.items() if name not in self._bare}

    def parameters(self) -> list[nn.Parameter]:
        """The trainable factors, A before B, by module name."""
        pairs = [(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for layer in self.layers.values()]
        return [factor for pair in pairs for factor in pair if factor.requires_grad]

    def set_dropout(self, rate: float) -> None:
        """Dropout on the adapters' input while training; 0 is none."""
        for layer in self.layers.values():
            layer.lora_dropout[ADAPTER] = nn.Dropout(rate).train() if rate else nn.Identity()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute the plain model inside the block."""
        for layer in self.layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer._disable_adapters = name in self._bare


def _zero(size: MatrixSpec) -> LowRank:
    b, a = np.zeros((size.d_out, 1), np.float32), np.zeros((1, size.d_in), np.float32)
    return LowRank(b=b, a=a, alpha=1.0)


def _set_layer(layer: Any, factor: LowRank, train_a: bool) -> None:
    device = layer.base_layer.weight.device
    for part, values, trains in ((layer.lora_A, factor.a, train_a), (layer.lora_B, factor.b, True)):
        linear = part[ADAPTER]
        weight = torch.tensor(values, dtype=torch.float32, device=device)
        linear.weight = nn.Parameter(weight, requires_grad=trains)
        linear.out_features, linear.in_features = weight.shape
    layer.r[ADAPTER] = factor.rank
    layer.lora_alpha[ADAPTER] = factor.alpha
    layer.use_rslora[ADAPTER] = factor.rslora
    layer.scaling[ADAPTER] = factor.scale


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """peft's forward, with the plain case (one float32 adapter, no dropout) fused."""
    if layer._disable_adapters:
        return layer.base_layer(x)  # type: ignore[no-any-return]
    base, dropout = layer.base_layer, layer.lora_dropout[ADAPTER]
    weight = base.weight
    if args or kwargs or weight.dtype != torch.float32 or x.dtype != torch.float32 or isinstance(dropout, nn.Dropout):
        return LoraLinear.forward(layer, x, *args, **kwargs)
    codes = quantised(base)
    logical = codes if codes else weight.t() if layer.fan_in_fan_out else weight
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return adapted_linear(x, logical, base.bias, a, b, layer.scaling[ADAPTER])
