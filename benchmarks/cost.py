"""Predicted costs against measured ones: python benchmarks/cost.py [--json]

Peak memory of three steps of the `lora` tuner, each row in a process of its own. `tensors` is what client/cost.py's
Meter counts (what is predicted); `allocator` is the same from torch's profiler, which sees inside operations;
`resident` is how far the process's resident memory rose from before the model was loaded: the C library's slack and
lazily loaded code come on top (with MALLOC_MMAP_THRESHOLD_=65536 in the environment there is less slack, and a step
takes longer). Then seconds of a step: rate and overhead are fitted on two sizes and tried on the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from fedloom.client.bits import hold
from fedloom.client.cost import attempt, fit_speed, held, shapes_of
from fedloom.client.data import Batch
from fedloom.client.memory import peak_rss, reset_peak
from fedloom.client.model import Resident, load_model
from fedloom.client.training import FlatParameters, forward_logits, loss_sum, make_optimizer
from fedloom.protocols.config import Lora, Model, Train
from fedloom.protocols.messages import LowRank
from fedloom.simulations.fleet import EMBEDDED_MODEL
from fedloom.strategies.cost import Work, flops, memory

MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # hidden, layers, heads, channels, vocabulary
    "embedded": ("", {}),
    "llama-512": ("llama", {"h": 512, "l": 8, "a": 8, "f": 1376, "v": 8000}),
    "qwen2-256": ("qwen2", {"h": 256, "l": 6, "a": 4, "f": 1024, "v": 20000}),
    "gpt2-384": ("gpt2", {"h": 384, "l": 6, "a": 6, "f": 1536, "v": 10000}),
    "minilm-l6 shape": ("bert", {"h": 384, "l": 6, "a": 12, "f": 1536, "v": 30522}),
}
WORKS = (  # batch, length, width, rank, bits
    (1, 32, 8, 8, 16),
    (8, 64, 16, 8, 16),
    (8, 128, 16, 32, 16),
    (16, 128, 16, 8, 16),
    (8, 128, 16, 8, 8),
    (8, 128, 16, 8, 4),
)


def build(name: str, folder: Path) -> Resident:
    """A model of these shapes with random weights, or the embedded one."""
    kind, size = MODELS[name]
    if not kind:
        return load_model(Model(path=str(EMBEDDED_MODEL)), Lora(), seed=0)
    if not (folder / "config.json").is_file():
        if kind == "gpt2":
            shape = {"n_embd": size["h"], "n_layer": size["l"], "n_head": size["a"], "n_inner": size["f"]}
            settings: Any = transformers.GPT2Config(
                vocab_size=size["v"], n_positions=256, bos_token_id=0, eos_token_id=1, **shape
            )
            model: Any = transformers.GPT2LMHeadModel(settings)
        else:
            config, make = {
                "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
                "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
                "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
            }[kind]
            more = (
                {} if kind == "bert" else {"num_key_value_heads": max(1, size["a"] // 2), "tie_word_embeddings": True}
            )
            model = make(
                config(
                    vocab_size=size["v"],
                    hidden_size=size["h"],
                    num_hidden_layers=size["l"],
                    num_attention_heads=size["a"],
                    intermediate_size=size["f"],
                    **more,
                )
            )
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            copy(EMBEDDED_MODEL / file, folder / file)
    task = "classify" if kind == "bert" else "causal"
    return load_model(Model(path=str(folder), task=task), Lora(), seed=0)  # type: ignore[arg-type]


def prepare(resident: Resident, work: Work) -> Callable[[], None]:
    """Three steps of what the lora tuner does."""
    sizes, generator = resident.spec.matrices, np.random.default_rng(0)
    resident.adapters.set_factors(
        {
            name: LowRank(
                b=np.zeros((sizes[name].d_out, rank), np.float32),
                a=generator.normal(size=(rank, sizes[name].d_in)).astype(np.float32),
                alpha=1.0,
            )
            for name, rank in work.ranks.items()
        }
    )
    ids = torch.randint(3, 1000, (work.batch, work.length))
    mask = torch.ones_like(ids)
    mask[0, slice(3) if work.width else slice(-3, None)] = 0
    labels = torch.randint(0, 2, (work.batch, work.width) if work.width else (work.batch,))
    places = (mask.cumsum(1) - 1).clamp_(min=0)
    batch = Batch(ids=ids, mask=mask, positions=places, labels=labels, width=work.width, tokens=labels.numel())

    def run() -> None:
        flat = FlatParameters([*resident.adapters.parameters(), *resident.base.heads.values()])
        optimizer = make_optimizer(flat.values, Train())
        for _ in range(3):
            loss_sum(forward_logits(resident, batch), batch.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            flat.grad.zero_()

    return run


def measure(name: str, folder: Path, size: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """One row, in this process: resident memory first, while nothing else has touched it."""
    torch.set_num_threads(1)
    batch, length, width, rank, bits = size
    before = psutil.Process().memory_info().rss
    resident = build(name, folder)
    hold(resident, bits)
    width = width if resident.config.task == "causal" else 0
    work = Work(ranks=dict.fromkeys(resident.spec.matrices, rank), batch=batch, length=length, width=width, bits=bits)
    shapes = shapes_of(resident)
    reset_peak()
    prepare(resident, work)()
    row = {"model": name, "work": size, "predicted": memory(shapes, work).total, "flops": flops(shapes, work)}
    row["resident"] = peak_rss() - before
    row["tensors"] = attempt(prepare(resident, work), metered=True, watch=held(resident))[1].peak_bytes
    row["allocator"] = _allocator_peak(prepare(resident, work)) + sum(t.nbytes for t in held(resident))
    plain, metered = [], []
    for _ in range(4):
        for taken, counted in ((plain, False), (metered, True)):
            run = prepare(resident, work)
            began = time.perf_counter()
            attempt(run, metered=counted)
            taken.append((time.perf_counter() - began) / 3)
    row["seconds"], row["metered_seconds"] = statistics.median(plain[1:]), statistics.median(metered[1:])
    return row


def _allocator_peak(run: Callable[[], None]) -> int:
    """Peak of what torch's CPU allocator gave out beyond what was there, by its own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    live = peak = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        for name in MODELS:
            build(name, Path(folder) / name)
            for size in WORKS:
                with context.Pool(1) as pool:
                    rows.append(pool.apply(measure, (name, Path(folder) / name, size)))
                if not asked.json:
                    _print(rows[-1])
    speeds = {}
    for name in MODELS:
        own = [row for row in rows if row["model"] == name]
        speeds[name] = fit_speed([(own[0]["flops"], own[0]["seconds"]), (own[3]["flops"], own[3]["seconds"])])
        for row in own:
            row["predicted_seconds"] = row["flops"] / speeds[name].rate + speeds[name].overhead
    if asked.json:
        print(json.dumps(rows, indent=1))
        return
    for name, speed in speeds.items():
        own = [row["predicted_seconds"] / row["seconds"] - 1 for row in rows if row["model"] == name]
        print(
            f"{name:<16} {speed.rate / 1e9:6.1f} Gflop/s + {1e3 * speed.overhead:5.1f} ms a step; "
            f"seconds predicted within {100 * min(own):+.0f}..{100 * max(own):+.0f}%"
        )


def _print(row: dict[str, Any]) -> None:
    figures = "  ".join(
        f"{key} {row[key] / 1e6:7.1f} MB ({100 * (row['predicted'] / row[key] - 1):+5.1f}%)"
        for key in ("tensors", "allocator", "resident")
    )
    overhead = row["metered_seconds"] / row["seconds"]
    print(
        f"{row['model']:<16} {row['work']!s:<24} predicted {row['predicted'] / 1e6:7.1f} MB  {figures}  "
        f"step {1e3 * row['seconds']:6.1f} ms, metered x {overhead:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
