"""Copies of tensors that lie in files and not in memory: the system may drop them, and reads them when they are used.

A file has no name any more, so it goes with the process (TMPDIR says where it lies).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def set_aside(tensor: Tensor) -> Tensor:
    """A copy of a flat tensor in a mapped file of the CPU's."""
    size = tensor.numel()
    handle, name = tempfile.mkstemp(prefix="fedloom-")
    try:
        os.ftruncate(handle, max(size * tensor.element_size(), 1))
        mapped = torch.from_file(name, shared=True, size=size, dtype=tensor.dtype)
    finally:
        os.close(handle)
        Path(name).unlink()
    mapped.copy_(tensor.detach())
    return mapped
