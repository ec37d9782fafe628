"""What a finished run still needs: its report, and its global model in a form that others load."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom.client.data import Dataset, batches
from fedloom.client.export import export_merged, export_peft, export_pruned
from fedloom.client.mask import make_mask, write_mask
from fedloom.client.model import Resident, load_model
from fedloom.client.parts import parameter_names
from fedloom.client.pruning.fluctuation import start_without_training
from fedloom.client.pruning.manifest import read_keep
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import Payload
from fedloom.server.app import build_strategy
from fedloom.server.checkpoint import latest_checkpoint
from fedloom.server.loop import CHECKPOINTS
from fedloom.simulations.fleet import Fleet
from fedloom.simulations.report import write_report
from fedloom.simulations.runs import Member, members, read_run
from fedloom.simulations.summary import SUMMARY_FILE
from fedloom.simulations.world import base_model
from fedloom.strategies.local import Local
from fedloom.strategies.masked import Keep
from fedloom.strategies.subspace import SubspaceOptions

FOLDERS = {"peft": "adapter", "merged": "merged", "pruned": "pruned"}  # where each format goes by default
CALIBRATION_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What an export in the format `pruned` keeps: a file that says so, or a share to prune without training."""

    keep: Path | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and self.ratio is not None:
            raise ValueError("a keep and a ratio were given: give --keep FILE or --ratio SHARE, not both")


def finish(config: RunConfig, out: Path) -> dict[str, str]:
    """Write the report and, where the recipe's strategy has a global model, its adapter; return what lies where.

    A model tuned in full has no adapter: it is written whole when it is asked for (`fedloom export --format merged`).
    """
    written = {"summary": str(out / SUMMARY_FILE), "report": str(write_report(out))}
    strategy = build_strategy(_chosen(config, out, "").config)
    if isinstance(strategy, SubspaceOptions):
        written["model"] = f"fedloom export {out} --format merged"
    elif not isinstance(strategy, Local):
        written["adapter"] = str(export_run(out, force=True))
    return written


def export_run(
    out: Path,
    *,
    form: str = "peft",
    to: Path | None = None,
    label: str = "",
    force: bool = False,
    pruning: Pruning | None = None,
) -> Path:
    """Write a run's global model into a folder and return it.

    Args:
        form: a key of FOLDERS.

    Raises:
        ValueError: when there is no finished run, no such member, no global model, or the folder is not empty; when it
            is not said what to prune, or what is said does not fit the model.
    """
    member = _chosen(read_run(out), out, label)
    config = member.config
    checkpoint, _ = latest_checkpoint(member.folder / CHECKPOINTS)
    if checkpoint is None:
        raise ValueError(f"{member.folder} has no checkpoint to export")
    payload = build_strategy(config).adapter(checkpoint.state)
    folder = to or out / FOLDERS[form]
    if folder.exists() and any(folder.iterdir()) and not force:
        raise ValueError(f"{folder} must be empty, got a folder with files: give --force to replace it")
    resident = load_model(base_model(config), config.lora, seed=config.seed, prunable=form == "pruned")
    if resident.spec.base_hash != checkpoint.spec.base_hash:
        raise ValueError(
            f"the patch is for base {checkpoint.spec.base_hash[:12]}, "
            f"{config.model.path!r} now is {resident.spec.base_hash[:12]}"
        )
    if form == "pruned":
        keep, biases = _kept(pruning or Pruning(), config, resident, payload)
        shutil.rmtree(folder, ignore_errors=True)
        export_pruned(payload, resident, folder, keep, biases)
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (export_merged if form == "merged" else export_peft)(payload, resident, folder)
    return folder


def _kept(
    pruning: Pruning, config: RunConfig, resident: Resident, payload: Payload
) -> tuple[Keep, dict[str, torch.Tensor]]:
    """What to keep, and the biases that make up for the rest: as told, as the run has it, or as FLAP finds it.

    FLAP measures on the first device's training data, taken as public, with the run's patch on the model.
    """
    if pruning.keep is not None:
        return read_keep(pruning.keep, resident.spec.groups), {}
    if pruning.ratio is None:
        if not payload.keep:
            raise ValueError("this run pruned nothing: say what to prune, with --keep FILE or --ratio SHARE")
        return payload.keep, {}
    if payload.keep or payload.coefficients is not None:
        raise ValueError("a ratio must be for a run that tuned the whole model by factors, give --keep FILE")
    examples = Fleet(config).holding(0).train
    data = Dataset(examples, resident, max_length=config.data.max_length, name="the calibration data")
    order = torch.Generator().manual_seed(config.seed)
    resident.base.apply(("export", object()), payload)
    try:
        some = batches(data, config.train.batch_size, CALIBRATION_BATCHES, order)
        return start_without_training(resident, some, pruning.ratio)
    finally:
        resident.base.restore()


def write_public_mask(config: RunConfig, to: Path, share: float) -> dict[str, Any]:
    """Choose a sparse mask on a recipe's model and the first device's training data, taken as public.

    Raises:
        ValueError: for a bad recipe or share.
    """
    resident = load_model(base_model(config), config.lora, seed=config.seed)
    examples = Fleet(config).holding(0).train
    data = Dataset(examples, resident, max_length=config.data.max_length, name="the public data")
    mask = make_mask(resident, data, share=share, batch_size=config.train.batch_size)
    digest = write_mask(mask, to)
    total = sum(parameter.numel() for parameter in parameter_names(resident.model).values())
    return {"file": str(to), "weights": sum(len(index) for index in mask.values()), "of": total, "sha256": digest}


def _chosen(config: RunConfig, out: Path, label: str) -> Member:
    """The member with a label; without one, the member that runs the recipe's own strategy, or else the first."""
    everyone = members(config, out)
    if label:
        for member in everyone:
            if member.label == label:
                return member
        raise ValueError(f"no member {label!r} in {out}, it has {', '.join(m.label for m in everyone)}")
    own = [member for member in everyone if member.config.strategy.name == config.strategy.name]
    return (own or everyone)[0]
