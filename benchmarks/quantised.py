"""Quantised bases side by side: python benchmarks/quantised.py [--json]

For Fedloom's own codes and for each library that is installed (torchao, bitsandbytes, optimum-quanto): does one linear
layer train through it here, what its weight takes, how long a step takes against the dense layer, measured in turn, how
far its outputs are off, and the embedded model's held-out loss with W0 replaced by what the library makes of it.
Layer: [2048, 1024] float32, 256 tokens, forward and backward to its input, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.client.bits import hold
from fedloom.client.data import Dataset, Example
from fedloom.client.evaluation import evaluate
from fedloom.client.model import Resident, load_model
from fedloom.client.quantised import frozen_linear, quantise
from fedloom.protocols.config import Evaluation, Lora, Model
from fedloom.simulations.fleet import EMBEDDED_MODEL
from fedloom.simulations.household import household

D_OUT, D_IN, TOKENS, ROUNDS = 2048, 1024, 256, 15
Layer = Callable[[Tensor], Tensor]


@dataclass
class Row:
    """One contestant; `failure` says why there are no figures."""

    name: str
    bytes_per_weight: float = 0.0
    step_ratio: float = 0.0
    output_error: float = 0.0
    loss: float = 0.0
    failure: str = ""


def own(bits: int) -> Callable[[nn.Linear], tuple[Layer, int]]:
    def make(layer: nn.Linear) -> tuple[Layer, int]:
        codes = quantise(layer.weight, bits)
        return lambda x: frozen_linear(x, codes, layer.bias), codes.nbytes

    return make


def torchao(name: str, **options: Any) -> Callable[[nn.Linear], tuple[Layer, int]]:
    def make(layer: nn.Linear) -> tuple[Layer, int]:
        from torchao import quantization

        whole = nn.Sequential(layer)
        if "granularity" in options:
            options["granularity"] = quantization.PerGroup(64)
        quantization.quantize_(whole, getattr(quantization, name)(**options))
        return whole, _tensor_bytes(whole[0].weight)

    return make


def quanto(name: str) -> Callable[[nn.Linear], tuple[Layer, int]]:
    def make(layer: nn.Linear) -> tuple[Layer, int]:
        from optimum import quanto as library

        whole = nn.Sequential(layer)
        library.quantize(whole, weights=getattr(library, name))
        library.freeze(whole)
        return whole.requires_grad_(False), _tensor_bytes(whole[0].weight)

    return make


def bitsandbytes(bits: int) -> Callable[[nn.Linear], tuple[Layer, int]]:
    def make(layer: nn.Linear) -> tuple[Layer, int]:
        import bitsandbytes as library

        d_out, d_in = layer.weight.shape
        if bits == 4:
            made = library.nn.Linear4bit(d_in, d_out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        else:
            made = library.nn.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False)
        made.load_state_dict({"weight": layer.weight})
        made = made.to("cpu").requires_grad_(False)
        made(torch.zeros(1, d_in))
        scales = d_out * d_in // 64 * 4 if bits == 4 else d_out * 4
        return made, made.weight.nbytes + scales

    return make


CONTESTANTS: dict[str, Callable[[nn.Linear], tuple[Layer, int]]] = {
    "fedloom int8": own(8),
    "fedloom nf4": own(4),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int4": torchao("Int4WeightOnlyConfig", group_size=64),
    "torchao int4 (intx)": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity="group"),
    "bitsandbytes int8": bitsandbytes(8),
    "bitsandbytes nf4": bitsandbytes(4),
    "quanto int8": quanto("qint8"),
    "quanto int4": quanto("qint4"),
}


def _tensor_bytes(weight: Any) -> int:
    """Bytes of a tensor subclass: those of the plain tensors inside it."""
    if not hasattr(weight, "__tensor_flatten__"):
        return int(weight.nbytes)
    return sum(_tensor_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])


def measure(name: str, make: Callable[[nn.Linear], tuple[Layer, int]], resident: Resident, held_out: Dataset) -> Row:
    """One contestant's figures, its step timed in turn with the dense layer's."""
    dense = _linear(torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(0)) * 0.02)
    x = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    try:
        layer, size = make(_linear(dense.weight.detach().clone()))
        with torch.no_grad():
            error = float((layer(x) - dense(x)).norm() / dense(x).norm())
        taken: dict[str, list[float]] = {"dense": [], "quantised": []}
        for _ in range(ROUNDS + 1):
            for key, run in (("dense", dense), ("quantised", layer)):
                began = time.perf_counter()
                run(x).sum().backward()
                taken[key].append(time.perf_counter() - began)
        ratio = statistics.median(taken["quantised"][1:]) / statistics.median(taken["dense"][1:])
        loss = held_out_loss(make, resident, held_out)
    except Exception as failure:  # whatever a library does on a machine that it was not built for
        return Row(name=name, failure=f"{type(failure).__name__}: {str(failure).partition(chr(10))[0][:90]}")
    return Row(name=name, bytes_per_weight=size / dense.weight.numel(), step_ratio=ratio, output_error=error, loss=loss)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer.requires_grad_(False)


def held_out_loss(make: Callable[[nn.Linear], tuple[Layer, int]], resident: Resident, held_out: Dataset) -> float:
    """Mean loss a token of the embedded model, every linear layer made dense again from what the library holds."""
    kept = {name: layer.weight.data for name, layer in resident.bits.layers.items()}
    try:
        for name, layer in resident.bits.layers.items():
            run, _ = make(_linear(kept[name].clone()))
            with torch.no_grad():
                layer.weight.data = run(torch.eye(kept[name].shape[1])).t().contiguous()
        return loss_of(resident, held_out)
    finally:
        for name, layer in resident.bits.layers.items():
            layer.weight.data = kept[name]


def loss_of(resident: Resident, held_out: Dataset) -> float:
    with resident.adapters.disabled():
        found = evaluate(resident, held_out, Evaluation())
    return found["loss_sum"] / found["tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    resident = load_model(Model(path=str(EMBEDDED_MODEL)), Lora(), seed=0)
    examples = [
        Example(prompt=request.prompt, completion=request.completion)
        for index in range(8)
        for request in household(index, seed=0).test
    ]
    held_out = Dataset(examples, resident, max_length=128, name="benchmark")
    rows = [Row(name="dense", bytes_per_weight=4.0, step_ratio=1.0, loss=loss_of(resident, held_out))]
    rows += [measure(name, make, resident, held_out) for name, make in CONTESTANTS.items()]
    whole = {}
    for bits in (16, 8, 4):
        hold(resident, bits)
        whole[bits] = {"bytes": resident.bits.nbytes(), "loss": loss_of(resident, held_out)}
    if asked.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "whole": whole}, indent=1))
        return
    print(f"{'':<20} {'bytes/weight':>12} {'step, x dense':>13} {'output error':>12} {'held-out loss':>13}")
    for row in rows:
        figures = f"{row.bytes_per_weight:12.2f} {row.step_ratio:13.2f} {row.output_error:12.4f} {row.loss:13.4f}"
        print(f"{row.name:<20} {row.failure or figures}")
    for bits, found in whole.items():
        print(f"embedded model held in {bits:>2} bits: {found['bytes']:>9,} bytes of linears, loss {found['loss']:.4f}")


if __name__ == "__main__":
    main()
