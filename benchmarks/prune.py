"""What pruning saves: python benchmarks/prune.py [--ratios 0.3 0.5] [--rounds 7] [--device cpu] [--json]

A random Llama of 37 million weights (12 layers, 512 wide, 4 key-value heads of 2 query heads), cut to each ratio by
FLAP, beside the same model whole: weights, bytes, one pass over 8 x 128 tokens, one LoRA step of rank 8 on 8 household
requests. Whole and pruned take turns in one run, on one thread; medians of processor time (of wall time on a GPU), and
ratios. Then what pruning costs: describing the model, cutting it, and restoring it. Then how far the embedded model's
predictions on a household's held-out requests move when it is cut without training, KL(whole || cut) per token: with
and without the bias that recovers what the removed inputs added on average.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedloom.client.data import IGNORED, Dataset, Example, batches
from fedloom.client.model import Resident, load_model
from fedloom.client.pruning.describe import describe
from fedloom.client.pruning.fluctuation import start_without_training
from fedloom.client.pruning.narrowing import apply_keep
from fedloom.client.starting import starting_payload
from fedloom.client.training import forward_logits, tune
from fedloom.protocols.config import Lora, Model
from fedloom.protocols.messages import Start, Task
from fedloom.simulations.fleet import EMBEDDED_MODEL
from fedloom.simulations.household import household
from fedloom.strategies.masked import slice_payload

RANK, BATCH, TOKENS = 8, 8, 128


def make_folder(folder: Path) -> Path:
    """The larger model, with the embedded one's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    shape = LlamaConfig(
        vocab_size=1536,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def examples(held_out: bool = False) -> list[Example]:
    home = household(2, seed=0)
    return [Example(prompt=r.prompt, completion=r.completion) for r in (home.test if held_out else home.train)]


def seconds(action: Callable[[], Any]) -> float:
    """What one run of an action takes, to the end of what it started on a GPU."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    began = clock()
    action()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began


def actions(resident: Resident, dataset: Dataset) -> dict[str, Callable[[], Any]]:
    ids = torch.randint(0, 1536, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0)).to(resident.device)
    knobs = {"steps": 1, "batch_size": BATCH}
    task = Task(device="d", round=1, rank=RANK, alpha=2.0 * RANK, start_from=Start.FRESH, knobs=knobs)

    def forward() -> None:
        with torch.inference_mode(), resident.adapters.disabled():
            resident.model(input_ids=ids, logits_to_keep=1)

    return {"forward": forward, "step": lambda: tune(resident, dataset, task)}


def weigh(resident: Resident) -> dict[str, int]:
    base = [p for name, p in resident.model.named_parameters() if ".lora_" not in name]
    return {"weights": sum(p.numel() for p in base), "bytes": sum(p.untyped_storage().nbytes() for p in base)}


def measure(folder: Path, ratio: float, rounds: int, device: str) -> dict[str, Any]:
    """One ratio: whole and pruned beside each other."""
    pair = {}
    taken: dict[str, float] = {}
    for which in ("whole", "pruned"):
        resident = load_model(Model(path=str(folder), device=device), Lora(), seed=0, prunable=True)
        dataset = Dataset(examples(), resident, max_length=TOKENS, name="benchmark")
        task = Task(device="d", round=1, rank=RANK, alpha=2.0 * RANK, start_from=Start.FRESH)
        start = starting_payload(task, resident.spec, {}, None)
        if which == "pruned":
            some = batches(dataset, BATCH, 4, torch.Generator().manual_seed(0))
            keep, biases = start_without_training(resident, some, ratio)
            taken["describe"] = statistics.median(seconds(partial(describe, resident.model)) for _ in range(3))
            taken["first cut"] = seconds(partial(apply_keep, resident, keep, biases))
            taken["restore"] = seconds(partial(apply_keep, resident, {}))
            taken["cut"] = seconds(partial(apply_keep, resident, keep, biases))
            start = slice_payload(start, resident.spec, keep)
        resident.adapters.set_factors(start.factors)
        pair[which] = resident, actions(resident, dataset)
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for what in ("forward", "step"):
            for which, (_, able) in pair.items():
                once = seconds(able[what])
                if number:  # the first is a warm-up
                    times.setdefault((which, what), []).append(once)
    row: dict[str, Any] = {"ratio": ratio, "seconds": taken}
    for which, (resident, _) in pair.items():
        row[which] = weigh(resident) | {w: 1e3 * statistics.median(times[which, w]) for w in ("forward", "step")}
    row["of whole"] = {name: row["pruned"][name] / row["whole"][name] for name in row["whole"]}
    return row


def recovered(ratio: float, device: str) -> dict[str, float]:
    """KL(whole || cut) per completion token of held-out requests, for the embedded model cut without training."""
    resident = load_model(Model(path=str(EMBEDDED_MODEL), device=device), Lora(), seed=0, prunable=True)
    held_out = Dataset(examples(held_out=True), resident, max_length=TOKENS, name="held out")
    dataset = Dataset(examples(), resident, max_length=TOKENS, name="calibration")
    batch = held_out.batch(list(range(len(held_out))))

    def predictions() -> Tensor:
        with torch.inference_mode():
            return forward_logits(resident, batch).log_softmax(-1)[batch.labels != IGNORED]

    whole = predictions()
    some = batches(dataset, BATCH, 16, torch.Generator().manual_seed(0))
    keep, biases = start_without_training(resident, some, ratio)
    found = {"ratio": ratio}
    for name, given in (("KL without biases", None), ("with biases", biases)):
        apply_keep(resident, keep, given)
        found[name] = float((whole.exp() * (whole - predictions())).sum(-1).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = make_folder(Path(folder))
        rows = [measure(made, ratio, asked.rounds, asked.device) for ratio in asked.ratios]
    moved = [recovered(ratio, asked.device) for ratio in asked.ratios]
    if asked.json:
        print(json.dumps({"torch": torch.__version__, "device": asked.device, "rows": rows, "moved": moved}))
        return
    for row in rows:
        print(f"\n{row['ratio']:.0%} of heads and channels pruned   whole        pruned       of whole")
        for name, value in row["whole"].items():
            unit = " ms" if name in ("forward", "step") else ""
            print(
                f"  {name:<28} {value:>12,.0f}{unit} {row['pruned'][name]:>12,.0f}{unit} {row['of whole'][name]:>8.3f}"
            )
        print("  " + ", ".join(f"{name} {value:.2f} s" for name, value in row["seconds"].items()))
    for found in moved:
        print(", ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
