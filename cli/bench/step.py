"""`fedloom bench step`: time and memory of one local step in a subspace, beside the steps it stands for.

    zeroth order    two forward passes; MeZO's step (perturb in place by a reseeded torch generator, restore by adding)
    first order     forward and backward of all weights; AdamW's step

All sides run on the same model and batch in this process, interleaved, medians. Peak memory is measured in a process of
its own for each side, above what the process held before the model was loaded; large buffers are given back to the
system at once there (glibc's MALLOC_MMAP_THRESHOLD_), so that it is memory in use and not the allocator's reserve.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedloom.client.data import Batch, Dataset, Example
from fedloom.client.memory import peak_rss, reset_peak
from fedloom.client.model import Resident, load_model
from fedloom.client.parts import parameter_names
from fedloom.client.place import Place
from fedloom.client.subspace import subspace
from fedloom.client.training import forward_logits, loss_sum
from fedloom.client.zeroth_order import zeroth_order
from fedloom.protocols import config
from fedloom.protocols.messages import Start, Subspace, Task
from fedloom.simulations.fleet import EMBEDDED_MODEL

SIDES = ("inference", "zeroth_order", "mezo", "backward", "subspace", "adamw")
MALLOC = "MALLOC_MMAP_THRESHOLD_"
LOCAL_STEPS = 4  # of one timed call of a tuner: its set-up is spread over them, as in a round


def step(
    *, model: str, family: str, k: int, batch: int, length: int, threads: int, repeats: int = 7, memory: bool = True
) -> dict[str, Any]:
    """Measure one step.

    Args:
        model: a folder or Hugging Face id, or `synthetic`: a Llama-like model of 22 million random weights.
        batch, length: examples and tokens of one forward pass.

    Returns:
        Seconds of each side, and the ratios and peaks (bytes) that say what a step costs.
    """
    torch.set_num_threads(threads)
    with TemporaryDirectory() as scratch:
        path = _synthetic(Path(scratch)) if model == "synthetic" else model
        bench = Bench(path, family, k, batch, length)
        seconds = bench.time(repeats)
        peaks = _peaks(path, family, k, batch, length, threads) if memory else {}
        result: dict[str, Any] = {"model": model, "params": bench.params, "k": k, "family": family, "batch": batch}
        result |= {"length": length, "threads": threads, "seconds": seconds}
        result["zeroth_order_to_two_forwards"] = seconds["zeroth_order"] / (2 * seconds["inference"])
        result["mezo_to_two_forwards"] = seconds["mezo"] / (2 * seconds["inference"])
        result["largest_layer_bytes"] = bench.largest_layer()
        if family == "sketch":
            result["subspace_to_backward"] = seconds["subspace"] / seconds["backward"]
            result["adamw_to_backward"] = seconds["adamw"] / seconds["backward"]
            result["optimizer_and_gradient_bytes"] = bench.gradient_bytes()
            result["adamw_optimizer_and_gradient_bytes"] = 12 * bench.params
        return result | ({"peak_bytes": peaks} if peaks else {})


class Bench:
    """One model, one batch, and a step of each kind."""

    def __init__(self, path: str, family: str, k: int, batch: int, length: int) -> None:
        self.resident: Resident = load_model(config.Model(path=path), config.Lora(), seed=0)
        self.space = Subspace(family=family, k=k, seed=1)
        text = "the quick brown fox jumps over the lazy dog " * length
        example = Example(prompt=text, completion="and so on")
        self.data = Dataset([example] * batch, self.resident, max_length=length, name="bench")
        self.batch: Batch = self.data.batch(range(batch))
        self.weights = list(parameter_names(self.resident.model).values())
        self.params = sum(weight.numel() for weight in self.weights)

    def sides(self) -> dict[str, Callable[[], None]]:
        chosen = SIDES if self.space.family == "sketch" else SIDES[:3]
        return {name: getattr(self, name) for name in chosen}

    def time(self, repeats: int) -> dict[str, float]:
        """Median seconds of one step of each side, interleaved."""
        taken: dict[str, list[float]] = {name: [] for name in self.sides()}
        for repeat in range(repeats + 1):
            for name, run in self.sides().items():
                began = time.perf_counter()
                run()
                if repeat:
                    steps = LOCAL_STEPS if name in ("zeroth_order", "subspace") else 1
                    taken[name].append((time.perf_counter() - began) / steps)
        return {name: statistics.median(values) for name, values in taken.items()}

    def inference(self) -> None:
        """One forward pass."""
        with torch.inference_mode(), self.resident.adapters.disabled():
            self._loss().item()

    def zeroth_order(self) -> None:
        with Place(self.resident, self.space, None, "bench") as place:
            zeroth_order(place, self.data, self._task("zeroth_order"))

    def mezo(self) -> None:
        """MeZO's step (Malladi et al. 2023, Algorithm 1): three perturbations in place, two passes, one update."""
        with torch.inference_mode(), self.resident.adapters.disabled():
            self._shift(1e-3)
            up = self._loss().item()
            self._shift(-2e-3)
            down = self._loss().item()
            self._shift(1e-3)
            self._shift(-1e-9 * (up - down) / 2e-3)

    def backward(self) -> None:
        """Forward and backward of all weights, gradients kept."""
        for weight in self.weights:
            weight.requires_grad_(True)
        with self.resident.adapters.disabled():
            self._loss().backward()  # type: ignore[no-untyped-call]
        for weight in self.weights:
            weight.grad = None
            weight.requires_grad_(False)

    def subspace(self) -> None:
        with Place(self.resident, self.space, None, "bench") as place:
            subspace(place, self.data, self._task("subspace"))

    def adamw(self) -> None:
        """AdamW on all weights, its moments kept from step to step as in training."""
        for weight in self.weights:
            weight.requires_grad_(True)
        if not hasattr(self, "_optimizer"):
            self._optimizer = torch.optim.AdamW(self.weights, lr=0.0, fused=True)
        with self.resident.adapters.disabled():
            self._loss().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        for weight in self.weights:
            weight.requires_grad_(False)

    def largest_layer(self) -> int:
        """Bytes of the largest parameter."""
        return max(weight.numel() * weight.element_size() for weight in self.weights)

    def gradient_bytes(self) -> int:
        """What a first-order step in the sketch holds beside weights and activations, at most, as measured: the
        gradients alive at once, and c, its gradient and two moments."""
        most = 0

        def born(weight: Tensor) -> None:
            nonlocal most
            most = max(most, sum(_bytes(w.grad) for w in self.weights if w.grad is not None))

        with Place(self.resident, self.space, None, "bench") as place:
            hooks = []
            for weight in self.weights:
                weight.requires_grad_(True)
                # registered before the hook that folds the gradient away, so it runs first
                hooks.append(weight.register_post_accumulate_grad_hook(born))  # type: ignore[no-untyped-call]
            subspace(place, self.data, self._task("subspace"))
            for hook in hooks:
                hook.remove()
        for weight in self.weights:
            weight.requires_grad_(False)
        return most + 4 * 4 * self.space.k

    def _loss(self) -> Tensor:
        return loss_sum(forward_logits(self.resident, self.batch), self.batch.labels) / self.batch.tokens

    def _shift(self, scale: float) -> None:
        generator = torch.Generator().manual_seed(7)
        for weight in self.weights:
            weight.data.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype), alpha=scale)

    def _task(self, tuner: str) -> Task:
        knobs = {"steps": LOCAL_STEPS, "batch_size": len(self.batch.ids), "lr": 1e-9}
        return Task(
            device="bench",
            round=1,
            rank=1,
            alpha=1.0,
            start_from=Start.FRESH,
            tuner=tuner,
            subspace=self.space,
            knobs=knobs,
        )


def _bytes(gradient: Tensor) -> int:
    if gradient.is_sparse:
        return _bytes(gradient._values()) + _bytes(gradient._indices())
    return gradient.numel() * gradient.element_size()


def _peaks(path: str, family: str, k: int, batch: int, length: int, threads: int) -> dict[str, int]:
    """Peak bytes above the process before it loads the model, of each side in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, int] = {}
    earlier = os.environ.get(MALLOC)
    os.environ[MALLOC] = str(1 << 17)
    try:
        for side in SIDES if family == "sketch" else SIDES[:3]:
            with context.Pool(1) as pool:
                found[side] = pool.apply(_peak, (path, family, k, batch, length, threads, side))
    finally:
        os.environ.pop(MALLOC)
        if earlier is not None:
            os.environ[MALLOC] = earlier
    return found


def _peak(path: str, family: str, k: int, batch: int, length: int, threads: int, side: str) -> int:
    torch.set_num_threads(threads)
    for warm in _warm_up(family, k):
        warm()
    before = peak_rss() if reset_peak() else 0
    bench = Bench(path, family, k, batch, length)
    reset_peak()
    for _ in range(2):
        getattr(bench, side)()
    return peak_rss() - before


def _warm_up(family: str, k: int) -> Iterator[Callable[[], object]]:
    """What a process holds once, whatever the model: a tiny model through every kernel."""
    tiny = Bench(str(EMBEDDED_MODEL), family, k, 1, 16)
    yield from tiny.sides().values()


def _synthetic(folder: Path) -> str:
    """A Llama-like model of random weights, with the embedded tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
