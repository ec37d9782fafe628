"""How many bits the frozen linear layers of a model are held in, and W0, from which every version is made.

A device at version v holds round(W0 + P_v) at any number of bits; at 8 and 4, `round` is the quantiser. Quantising the
sum, and not W0 once with P_v beside it as a low-rank term, keeps a device's memory flat however many rounds have added
to P_v, and takes a dense P_v as it comes. Aggregation is none the wiser: adapters stay float32, and their deltas add
up to P_v on the server, unquantised. W0 lies in an unnamed file and is read a layer at a time: memory has codes alone.

A layer's own `weight` is empty while codes stand for it; whoever needs the dense weights asks for 16 bits first.
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.client.quantised import BITS, Quantised, frozen_linear, quantise

if TYPE_CHECKING:
    from fedloom.client.model import Resident

DENSE: Final = 16  # bits of a base that is held in its own dtype


class _Place(NamedTuple):
    """Where and how a layer's W0 lies in the file."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Bits:
    """The linear layers of one model, adapted or not, outside its head."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        """`layers` by module name, each an nn.Linear or a Conv1D, dense and at W0."""
        self.layers = dict(layers)
        self._file: Any = None  # W0, raw, one weight after another
        self._places: dict[str, _Place] = {}
        self.bits = DENSE

    @property
    def dense(self) -> bool:
        return self.bits == DENSE

    def set(self, bits: int) -> None:
        """Hold W0 in so many bits; the layers must be at W0 (`PatchedBase.restore`).

        Raises:
            ValueError: for a number of bits that this machine cannot compute with, naming those that it can.
        """
        if bits == self.bits:
            return
        if bits not in (DENSE, *BITS):
            raise ValueError(f"the base must be held in one of {(DENSE, *BITS)} bits, got {bits}")
        if bits != DENSE:
            self._probe(bits)
            self._set_aside()
        self.bits = bits
        for name, layer in self.layers.items():
            weight = self.pristine(name)
            if bits == DENSE:
                _release(layer, weight)
            else:
                _hold(layer, _quantise(layer, weight, bits, weight.dtype))
        if bits == DENSE:
            self._file.close()
            self._file, self._places = None, {}

    def write(self, name: str, weight: Tensor) -> None:
        """Hold this dense weight, in the layer's shape, in the present number of bits."""
        layer = self.layers[name]
        if self.dense:
            with torch.no_grad():
                layer.weight.copy_(weight)  # type: ignore[operator]
        else:
            _hold(layer, _quantise(layer, weight, self.bits, self._places[name].dtype))

    def pristine(self, name: str) -> Tensor:
        """W0 of a layer, as it is stored, on its device; only while the base is quantised."""
        place = self._places[name]
        self._file.seek(place.start)
        raw = torch.empty(place.shape.numel() * place.dtype.itemsize, dtype=torch.uint8)
        if self._file.readinto(raw.numpy().data) != len(raw):
            raise OSError(f"the file of the base must hold {name} whole, it was cut short")
        return raw.view(place.dtype).view(place.shape).to(place.device)

    def nbytes(self) -> int:
        """Bytes of the layers' weights as they are held."""
        return sum(
            codes.nbytes if (codes := quantised(layer)) else _weight(layer).nbytes for layer in self.layers.values()
        )

    def _set_aside(self) -> None:
        if self._file is not None:
            return
        self._file = tempfile.TemporaryFile(prefix="fedloom-")  # noqa: SIM115 - it lives as long as the base is coded
        for name, layer in self.layers.items():
            weight = _weight(layer).detach()
            self._places[name] = _Place(self._file.tell(), weight.shape, weight.dtype, weight.device)
            self._file.write(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def _probe(self, bits: int) -> None:
        """Quantise and use one small weight like the first layer's: what this machine lacks, it says here."""
        like = _weight(next(iter(self.layers.values())))
        try:
            small = torch.ones((2, 2), dtype=like.dtype, device=like.device)
            frozen_linear(small, quantise(small, bits), None).sum().item()
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"a base in {like.dtype} on {like.device} must be held in {DENSE} bits here, got {bits}: {reason}"
            ) from error


def hold(resident: Resident, bits: int) -> None:
    """Have a resident's base in so many bits, at W0 and with no patch on, unless it is in them already.

    Raises:
        ValueError: for a number of bits that this machine cannot compute with, naming those that it can.
    """
    if resident.bits.bits == bits:
        return
    resident.rebuilt.restore()
    resident.base.restore()
    resident.bits.set(bits)
    resident.base.resize(resident.adapters.matrices)


def quantised(layer: nn.Module) -> Quantised | None:
    """The codes that stand for a layer's weight, if they do."""
    return layer.__dict__.get("quantised")


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"a layer must have one weight of its own to be quantised, got {type(weight).__name__}")
    return weight


def _quantise(layer: nn.Module, weight: Tensor, bits: int, dtype: torch.dtype) -> Quantised:
    return quantise(weight, bits, transposed=isinstance(layer, Conv1D), dtype=dtype)


def _hold(layer: nn.Module, codes: Quantised) -> None:
    if quantised(layer) is None:
        layer.weight.data = _weight(layer).data.new_empty(0)
        layer.__dict__["forward"] = types.MethodType(_forward, layer)
    layer.__dict__["quantised"] = codes


def _release(layer: nn.Module, weight: Tensor) -> None:
    layer.weight.data = weight
    for name in ("forward", "quantised"):
        layer.__dict__.pop(name, None)


def _forward(layer: Any, x: Tensor) -> Tensor:
    return frozen_linear(x, layer.quantised, layer.bias)
