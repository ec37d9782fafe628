"""A pruned model as a folder, and back: transformers cannot load layers of unequal widths by itself.

    model.safetensors       the weights that are left
    config.json             of the whole model, and generation_config.json and the tokenizer's files as anywhere
    manifest.json           what was kept of each group, and the SHA-256 of every file

`load_pruned` makes the model of the config without memory for its weights, narrows its shapes by the manifest, and
gives it the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.client.pruning.cut import linears
from fedloom.client.pruning.manifest import MANIFEST, WEIGHTS, Manifest, hash_file, read_manifest, write_manifest
from fedloom.client.pruning.narrowing import Prunable
from fedloom.client.pruning.proof import set_attributes
from fedloom.client.pruning.structure import kept
from fedloom.protocols.validate import check_keep
from fedloom.strategies.choosing import whole
from fedloom.strategies.masked import Keep


def save_pruned(prunable: Prunable, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write a model as it is, pruned.

    Args:
        state: its tensors by the names that they have without adapters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = prunable.model
    owners: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        owner = owners.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), name)
        if owner != name:
            tied[name] = owner
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name not in tied}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {
        path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST
    }
    manifest = Manifest(
        architecture=type(model).__name__,
        structure=prunable.structure,
        keep=prunable.keep,
        biases=tuple(prunable.added_biases),
        tied=tied,
        files=files,
    )
    write_manifest(manifest, folder)


def load_pruned(folder: Path | str, keep: Keep | None = None) -> Any:
    """A transformers model, in eval mode, from a folder that `fedloom export --format pruned` wrote.

    Args:
        keep: what it must have kept, if that is known.

    Raises:
        ValueError: for a folder that is no such model or was altered, or one with another keep.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if keep is not None:
        check_keep("keep", keep, manifest.structure.units)
        for name, bits in whole(keep, manifest.structure.units).items():
            if not np.array_equal(bits, manifest.keep[name]):
                raise ValueError(f"{folder} must have the keep that is asked for, {name} is kept otherwise")
    try:
        model = _skeleton(manifest, folder)
        _narrow(model, manifest)
        _fill(model, manifest, load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} must hold a pruned model that fits its manifest: {problem}") from None
    return model.eval()


def _skeleton(manifest: Manifest, folder: Path) -> Any:
    """The whole model without memory for its parameters; buffers are real."""
    kind = getattr(transformers, manifest.architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"its architecture must be a model of transformers, got {manifest.architecture[:80]!r}")
    config = AutoConfig.from_pretrained(folder)
    with _weightless(), torch.random.fork_rng():
        model = kind(config)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters that modules register inside the block lose their memory at once."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def _narrow(model: Any, manifest: Manifest) -> None:
    """Give a skeleton the shapes of what was kept."""
    structure, layers = manifest.structure, linears(model)
    rows, columns = structure.rows, structure.columns
    for name in dict.fromkeys((*rows, *columns)):
        layer = layers[name]
        transposed = isinstance(layer, Conv1D)
        d_out, d_in = layer.weight.shape[::-1] if transposed else layer.weight.shape
        out, into = kept(rows.get(name), d_out, manifest.keep), kept(columns.get(name), d_in, manifest.keep)
        d_out, d_in = d_out if out is None else len(out), d_in if into is None else len(into)
        layer.weight = nn.Parameter(torch.empty((d_in, d_out) if transposed else (d_out, d_in), device="meta"))
        if layer.bias is not None or name in manifest.biases:
            layer.bias = nn.Parameter(torch.empty(d_out, device="meta"))
        if transposed:
            layer.nf, layer.nx = d_out, d_in
        else:
            layer.out_features, layer.in_features = d_out, d_in
    places = [place for group in structure.groups.values() for place in group.attributes]
    full = {place: getattr(model.get_submodule(place[0]), place[1]) for place in places}
    odd = [f"{module}.{attribute}" for (module, attribute), value in full.items() if type(value) is not int]
    if odd:
        raise ValueError(f"what shrinks with its units must be a whole number, {odd[0]} is none")
    set_attributes(model, structure.groups, manifest.keep, full)


def _fill(model: Any, manifest: Manifest, state: dict[str, Tensor]) -> None:
    state |= {name: state[owner] for name, owner in manifest.tied.items()}
    unknown = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unknown or empty:
        raise ValueError(f"its weights must be those of the model, got a mismatch at {[*unknown, *empty][0]!r}")
