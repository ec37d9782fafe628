"""What a local training step costs: python benchmarks/step.py [--rank 16] [--json]

On the embedded model and one household, one thread, batches of 8, interleaved: forward and backward through the
frozen base alone (the floor, no adapter at all), Fedloom's whole step, and a stock peft model with torch's AdamW.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedloom.client.data import Dataset, Example
from fedloom.client.model import load_model
from fedloom.client.starting import starting_payload
from fedloom.client.training import tune
from fedloom.protocols.config import Lora, Model
from fedloom.protocols.messages import Start, Task
from fedloom.simulations.fleet import EMBEDDED_MODEL
from fedloom.simulations.household import household

STEPS, ROUNDS, BATCH = 10, 8, 8


def contestants(rank: int) -> dict[str, Callable[[], None]]:
    """Each runs STEPS steps on the same examples."""
    resident = load_model(Model(path=str(EMBEDDED_MODEL)), Lora(), seed=0)
    home = household(2, seed=0)
    examples = [Example(prompt=request.prompt, completion=request.completion) for request in home.train]
    dataset = Dataset(examples, resident, max_length=128, name="benchmark")
    knobs = {"steps": STEPS, "batch_size": BATCH}
    task = Task(device="d", round=1, rank=rank, alpha=2.0 * rank, start_from=Start.FRESH, knobs=knobs)
    resident.adapters.set_factors(starting_payload(task, resident.spec, {}, None).factors)
    parts = [dataset.batch([(BATCH * step + i) % len(examples) for i in range(BATCH)]) for step in range(STEPS)]

    bare = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval().requires_grad_(False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names),
    )
    trained = [parameter for parameter in stock.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)

    def run_floor() -> None:
        for part in parts:
            inputs = bare.get_input_embeddings()(part.ids).requires_grad_(True)
            width = part.labels.shape[1] + 1
            logits = bare(
                inputs_embeds=inputs, attention_mask=part.mask, position_ids=part.positions, logits_to_keep=width
            ).logits[:, :-1]
            cross_entropy(logits.flatten(0, 1), part.labels.flatten()).backward()

    def run_stock() -> None:
        for part in parts:
            labels = torch.full_like(part.ids, -100)
            labels[:, -part.labels.shape[1] :] = part.labels
            stock(input_ids=part.ids, attention_mask=part.mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return {"floor": run_floor, "fedloom": lambda: void(tune(resident, dataset, task)), "stock peft": run_stock}


def void(_: object) -> None:
    """A contestant's result is its time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = contestants(asked.rank)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                taken[name].append(1e3 * (time.perf_counter() - began) / STEPS)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    if asked.json:
        print(json.dumps({"rank": asked.rank, "batch": BATCH, "ms_per_step": medians}, indent=1))
        return
    for name, value in medians.items():
        print(f"{name:<12} {value:7.1f} ms per step   {value / medians['floor']:.2f} x floor")


if __name__ == "__main__":
    main()
