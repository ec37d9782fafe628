"""A pass through a model whose linear layers are cut: each gives random numbers (a leaf) in place of its product.

What the next layer reads then depends on the leaves just before it alone, and no weight is multiplied: a pass through a
model of billions of weights takes milliseconds a layer. Shapes: x [1, TOKENS, d_in], leaves [1, TOKENS, d_out].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TOKENS = 8
_SEED = 20231


def linears(model: nn.Module) -> dict[str, Any]:
    """Every linear layer by its name; one that has an adapter with its adapter, as one layer."""
    found: dict[str, Any] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, LoraLinear):
            inside = (*inside, f"{name}.")
        if isinstance(module, (LoraLinear, nn.Linear, Conv1D)):
            found[name] = module
    return found


def plain(layer: Any) -> Any:
    """The nn.Linear or Conv1D of a layer that may have an adapter."""
    return layer.base_layer if isinstance(layer, LoraLinear) else layer


def logical(layer: Any) -> Tensor:
    """The weight of a layer as [d_out, d_in]: a view."""
    weight: Tensor = plain(layer).weight
    return weight.t() if isinstance(plain(layer), Conv1D) else weight


class Cut:
    """One model, cut."""

    def __init__(self, model: Any) -> None:
        """The model is changed inside `run` alone."""
        self.model, self.layers = model, linears(model)
        self.backbone = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
        self.generator = torch.Generator().manual_seed(_SEED)
        table = model.get_input_embeddings().weight
        self._ids = torch.randint(0, table.shape[0], (1, TOKENS), generator=self.generator).to(table.device)
        known = inspect.signature(self.backbone.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in known else {}

    def draw(self, like: Tensor) -> Tensor:
        """Numbers in [0.5, 1.5): no ReLU is off and no softmax saturated."""
        values = torch.rand(like.shape, generator=self.generator) + 0.5
        return values.to(device=like.device, dtype=like.dtype)

    def run(self, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One pass; `values` are the leaves' numbers by layer, drawn and added where they lack.

        Returns:
            what each layer read, and the leaves, by layer in the order of the pass.

        Raises:
            ValueError: when a layer runs twice.
        """
        inputs: dict[str, Tensor] = {}
        leaves: dict[str, Tensor] = {}

        def forward(name: str, x: Tensor) -> Tensor:
            if name in inputs:
                raise ValueError(f"{name} must run once in a pass to be pruned, it ran twice")
            inputs[name] = x
            if name not in values:
                values[name] = self.draw(x.new_empty((*x.shape[:-1], logical(self.layers[name]).shape[0])))
            leaves[name] = values[name].clone().requires_grad_(True)
            return leaves[name].clone()  # some models add to it in place

        with self._replaced(forward), torch.enable_grad():
            self.backbone(input_ids=self._ids, **self._options)
        return inputs, leaves

    @contextmanager
    def _replaced(self, forward: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        before = {name: layer.__dict__.get("forward") for name, layer in self.layers.items()}
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            for name, layer in self.layers.items():
                layer.forward = lambda x, *_, _name=name, **__: forward(_name, x)
            yield
        finally:
            for name, layer in self.layers.items():
                del layer.forward
                if before[name] is not None:
                    layer.forward = before[name]
            for module in training:
                module.training = True


def touched(output: Tensor, leaves: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The rows of the named leaves that a scalar depends on, [d_out] bool; leaves that it does not see are left out."""
    if not output.requires_grad or not names:
        return {}
    grads = torch.autograd.grad(output, [leaves[n] for n in names], retain_graph=True, allow_unused=True)
    seen = {n: (g != 0).flatten(0, -2).any(0) for n, g in zip(names, grads, strict=True) if g is not None}
    return {name: rows for name, rows in seen.items() if bool(rows.any())}


def mixes_positions(x: Tensor, leaves: Mapping[str, Tensor], names: Sequence[str]) -> bool:
    """Whether what is read at the last position depends on the named leaves at others."""
    last = x.reshape(-1, x.shape[-1])[-1].sum()
    grads = torch.autograd.grad(last, [leaves[n] for n in names], retain_graph=True, allow_unused=True)
    return any(bool((g.reshape(-1, g.shape[-1])[:-1] != 0).any()) for g in grads if g is not None)
