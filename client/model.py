"""The one place that loads a model: a base, its tokenizer and its adapters, kept resident for round after round."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedloom.client.bits import Bits
from fedloom.client.cost import shapes_of
from fedloom.client.lora import Adapters, candidates, find_targets, head_modules
from fedloom.client.mask import read_mask
from fedloom.client.patching import PatchedBase
from fedloom.client.pruning.describe import describe
from fedloom.client.pruning.narrowing import Prunable
from fedloom.client.pruning.structure import with_structure
from fedloom.client.rebuilt import Rebuilt
from fedloom.protocols.config import Lora, Model
from fedloom.protocols.messages import ModelSpec
from fedloom.protocols.validate import one_line


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A base model with its adapters, and what is needed to bring it to any version."""

    config: Model
    model: Any  # a transformers PreTrainedModel, in eval mode: only the adapters' dropout is ever switched on
    tokenizer: Any
    adapters: Adapters
    base: PatchedBase
    spec: ModelSpec
    device: torch.device
    bits: Bits  # how many the linear layers are held in; `hold` changes it
    forward_options: frozenset[str]  # the optional arguments that this model's forward takes
    rebuilt: Rebuilt = field(default_factory=Rebuilt)
    mask: Mapping[str, torch.Tensor] = field(default_factory=dict)  # the places of a sparse mask, by parameter
    prunable: Prunable | None = None  # set: heads and channels can be removed (pruning/narrowing.py)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their ids; empty for a language model."""
        return label_names(self.config)


def label_names(config: Model) -> tuple[str, ...]:
    if config.task == "causal":
        return ()
    return tuple(str(i) for i in range(config.labels)) if isinstance(config.labels, int) else config.labels


def load_model(config: Model, lora: Lora, *, seed: int, prunable: bool = False) -> Resident:
    """Load a base model and put adapters on it.

    Args:
        config: its `path` must be a folder or a Hugging Face id here (`embedded` is resolved by whoever asks).
        seed: initialises what the checkpoint lacks (a new classification head), the same on every device.
        prunable: find out what of the model can be pruned, and say so in its spec.

    Raises:
        ValueError: for a folder without a model, an id that cannot be reached, adapter targets that do not exist, or a
            mask that cannot be read; for a model that cannot be described, when it is to be pruned.
    """
    device = _device(config.device)
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model, tokenizer = _read(config)
    model.eval()
    base_hash = hash_state(model)
    model.to(device)
    targets = find_targets(model, lora.targets, config.task)
    heads = _free_heads(model, config)
    layers = {name: model.get_submodule(name) for name in candidates(model, head_modules(model, config.task))}
    bits = Bits({name: layers[name] for name in sorted(layers)})
    adapters = Adapters(model, targets)
    for parameter in heads.values():
        parameter.requires_grad_(True)
    weights = {name: layer.base_layer.weight for name, layer in adapters.layers.items()}
    base = PatchedBase(weights, targets, heads, bits)
    shapes = {name: tuple(parameter.shape) for name, parameter in heads.items()}
    mask, mask_hash = read_mask(Path(config.mask).expanduser()) if config.mask else ({}, "")
    spec = ModelSpec(base_hash=base_hash, matrices=targets, dense=shapes, mask=mask_hash)
    cuttable = Prunable(model=model, structure=describe(model)) if prunable or config.describe == "units" else None
    resident = Resident(
        config=config,
        model=model,
        tokenizer=tokenizer,
        adapters=adapters,
        base=base,
        spec=with_structure(spec, cuttable.structure) if cuttable else spec,
        device=device,
        bits=bits,
        forward_options=frozenset(inspect.signature(model.forward).parameters),
        mask=mask,
        prunable=cuttable,
    )
    if config.describe == "nothing":
        return resident
    return replace(resident, spec=replace(resident.spec, shapes=shapes_of(resident)))


def hash_state(model: nn.Module) -> str:
    """SHA-256 over the sorted (name, dtype, shape, bytes) of a model's state, one tensor at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{list(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(config: Model) -> tuple[Any, Any]:
    """The model and its tokenizer, as `from_pretrained` finds them."""
    folder = Path(config.path).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise ValueError(f"model.path must be a folder that holds a model (config.json), got {config.path!r}")
    if not local and (folder.exists() or config.path.count("/") > 1 or config.path.startswith((".", "~", "/"))):
        raise ValueError(f"model.path must be a folder or a Hugging Face id, got {config.path!r}")
    source = str(folder) if local else config.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = _from_pretrained(source, config)
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(str(error))[:300]
        raise ValueError(f"model.path {config.path!r} cannot be loaded for {config.task!r}: {reason}") from None
    _set_padding(model, tokenizer, config)
    return model, tokenizer


def _from_pretrained(source: str, config: Model) -> Any:
    dtype = getattr(torch, config.dtype)
    if config.task == "causal":
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    names = label_names(config)
    settings = AutoConfig.from_pretrained(
        source, num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    return AutoModelForSequenceClassification.from_pretrained(
        source, config=settings, dtype=dtype, ignore_mismatched_sizes=True
    )


def _set_padding(model: Any, tokenizer: Any, config: Model) -> None:
    """Padding falls back to the end token; a classifier needs to know the padding to find a text's last token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {config.path!r} must have a padding or an end token, got neither")
    if config.task == "classify" and model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if config.task == "causal" and tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.path!r} must have an end token, got none")


def _free_heads(model: Any, config: Model) -> dict[str, nn.Parameter]:
    """A classifier's head by parameter name: held in float32, whatever the base is, since it is trained in full."""
    if config.task != "classify":
        return {}
    heads = head_modules(model, config.task)
    for module in heads.values():
        module.float()
        module.register_forward_pre_hook(_to_float32)
    return {f"{prefix}.{name}": part for prefix, module in heads.items() for name, part in module.named_parameters()}


def _to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.device must be a torch device of this machine, got {name!r}: {reason}") from None
    return device


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and reports of new heads off the terminal."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()  # type: ignore[no-untyped-call]
    log.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()  # type: ignore[no-untyped-call]
