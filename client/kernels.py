"""Directions on torch tensors: the CPU's kernels or CUDA's, whichever holds the tensor; the same bits from both, except
that `fold_sketch` sums in another order.

Every function writes `out[i] = round(float32(base[i]) + ...)`, summed in float32 and rounded once to out's dtype.
Tensors are flat and contiguous; bfloat16 goes through its bits, which NumPy has no name for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.protocols import kernels as cpu
from fedloom.protocols.directions import Float32, Keys


def add_directions(out: Tensor, base: Tensor, *, name: str, family: str, keys: Keys, scales: Float32) -> None:
    """out = base + sum_k scales[k] z_k, for the whole tensor `name`."""
    if out.is_cuda:
        from fedloom.client import triton_kernels as cuda

        cuda.add_directions(out, base, name=name, start=0, family=family, keys=keys, scales=scales)
        return
    threads = torch.get_num_threads()
    cpu.add_directions(
        _view(out), _view(base), name=name, start=0, family=family, keys=keys, scales=scales, threads=threads
    )


def add_directions_rows(
    out: Tensor, base: Tensor, rows: Tensor, *, name: str, family: str, keys: Keys, scales: Float32
) -> None:
    """Rows [n, d] of a table [V, d], each as `add_directions` makes it."""
    if out.is_cuda:
        from fedloom.client import triton_kernels as cuda

        cuda.add_directions_rows(out, base, rows, name=name, family=family, keys=keys, scales=scales)
        return
    threads = torch.get_num_threads()
    cpu.add_directions_rows(
        _view(out), _view(base), rows.numpy(), name=name, family=family, keys=keys, scales=scales, threads=threads
    )


def add_sketch(out: Tensor, base: Tensor, *, name: str, seed: int, c: Float32) -> None:
    """out = base + S c, for the whole tensor `name`."""
    if out.is_cuda:
        from fedloom.client import triton_kernels as cuda

        cuda.add_sketch(out, base, name=name, start=0, seed=seed, c=torch.from_numpy(c).to(out.device))
        return
    cpu.add_sketch(_view(out), _view(base), name=name, start=0, seed=seed, c=c, threads=torch.get_num_threads())


def add_sketch_rows(out: Tensor, base: Tensor, rows: Tensor, *, name: str, seed: int, c: Float32) -> None:
    """Rows [n, d] of a table [V, d], each as `add_sketch` makes it."""
    if out.is_cuda:
        from fedloom.client import triton_kernels as cuda

        cuda.add_sketch_rows(out, base, rows, name=name, seed=seed, c=torch.from_numpy(c).to(out.device))
        return
    threads = torch.get_num_threads()
    cpu.add_sketch_rows(_view(out), _view(base), rows.numpy(), name=name, seed=seed, c=c, threads=threads)


def fold_sketch(into: Tensor, gradient: Tensor, *, name: str, seed: int, start: int = 0) -> None:
    """into += S' gradient, [K] float32, for the elements from `start` on."""
    if gradient.is_cuda:
        from fedloom.client import triton_kernels as cuda

        cuda.fold_sketch(into, gradient, name=name, start=start, seed=seed)
        return
    cpu.fold_sketch(_view(into), _view(gradient), name=name, start=start, seed=seed, threads=torch.get_num_threads())


def _view(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as NumPy; bfloat16 as the uint16 of its bits."""
    tensor = tensor.detach()
    array = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return np.asarray(array)
