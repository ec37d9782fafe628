"""The model at version v: round(W0 + P_v), with W0 the public base and P_v the accumulated patch.

W0 of what patches touch is kept aside in mapped files, and every version is made from it, never from another version:
so a device that missed rounds, or shares its process with devices at other versions, ends at the same weights. Sums are
taken in float32 and rounded once to the dtype that the model is held in, or to its codes (bits.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping

import torch
from torch import Tensor, nn

from fedloom.client.bits import Bits
from fedloom.client.mapped import set_aside
from fedloom.protocols.messages import Array, MatrixSpec, Payload

BASE: Hashable = ("base",)  # the key of the model without any patch


class PatchedBase:
    """The weights that patches change: those under adapters, and the parameters of the head."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        matrices: Mapping[str, MatrixSpec],
        heads: Mapping[str, nn.Parameter],
        bits: Bits | None = None,
    ) -> None:
        """`weights` by module name, as their layers store them; `heads` by parameter name; `bits` holds `weights`."""
        self._bits = bits
        self._weights, self._matrices, self.heads = dict(weights), dict(matrices), dict(heads)
        self._pristine = {name: head.detach().to("cpu", copy=True) for name, head in heads.items()}
        self._source: Callable[[str], Tensor] | None = None
        self._touched: set[str] = set()
        self._applied: Hashable = BASE

    def apply(self, key: Hashable, payload: Payload, head_deltas: Mapping[str, Array] | None = None) -> None:
        """Make the model round(W0 + payload), and its head round(W0 + payload + head_deltas).

        `key` names the payload: matrices that hold it already are left alone. The head is always written anew, since
        training changes it in place.

        Raises:
            ValueError: for a name that the model does not have, or a shape that does not fit; the model is unchanged.
        """
        extra = dict(head_deltas or {})
        self._check(payload, extra)
        with torch.no_grad():
            for name, head in self.heads.items():
                self._write(name, head, [deltas[name] for deltas in (payload.dense, extra) if name in deltas], None)
            if key == self._applied:
                return
            wanted = (payload.factors.keys() | payload.dense.keys()) & self._weights.keys()
            self._touched |= wanted
            self._applied = object()  # should a write fail midway, no key matches what is there
            for name in sorted(self._touched):
                dense = [payload.dense[name]] if name in payload.dense else []
                self._write(name, self._weights[name], dense, payload)
        self._touched = set(wanted)
        self._applied = key

    def restore(self) -> None:
        """Go back to W0, bit for bit."""
        self.apply(BASE, Payload())

    def resize(self, matrices: Mapping[str, MatrixSpec], source: Callable[[str], Tensor] | None = None) -> None:
        """Take note that the weights were made anew, of these sizes: they are W0 now. To be called at the base.

        Args:
            source: has W0 of a weight at its new size, by module, so that none need be set aside here.

        Raises:
            ValueError: when a patch is on.
        """
        if self._applied != BASE:
            raise ValueError("weights must be at their base to change their size, a patch is on")
        self._matrices, self._source = dict(matrices), source
        self._pristine = {name: tensor for name, tensor in self._pristine.items() if name in self.heads}

    def pristine(self, name: str) -> Tensor:
        """W0 of a head parameter, float32 on the CPU."""
        return self._pristine[name].float()

    def _write(self, name: str, parameter: nn.Parameter, dense: list[Array], payload: Payload | None) -> None:
        codes = self._bits if self._bits and not self._bits.dense and name in self._weights else None
        device = parameter.device
        deltas = [torch.tensor(array, dtype=torch.float32, device=device) for array in dense]
        if payload is not None and name in payload.factors:
            factor = payload.factors[name]
            b, a = (torch.tensor(array, dtype=torch.float32, device=device) for array in (factor.b, factor.a))
            deltas.insert(0, (b @ a).mul_(factor.scale))
        value = codes.pristine(name) if codes else self._base(name, parameter).to(device)
        if deltas:
            delta = sum(deltas[1:], deltas[0])
            if name in self._matrices and self._matrices[name].kind == "conv1d":
                delta = delta.t()
            value = value.float() + delta
        if codes:
            codes.write(name, value)
        else:
            parameter.copy_(value)

    def _base(self, name: str, parameter: nn.Parameter) -> Tensor:
        """W0 of a dense parameter, which holds it still when it is first asked for."""
        if name in self._pristine:
            return self._pristine[name]
        if self._source is not None:
            return self._source(name)
        self._pristine[name] = set_aside(parameter.detach().reshape(-1)).view(parameter.shape)
        return self._pristine[name]

    def _check(self, payload: Payload, extra: Mapping[str, Array]) -> None:
        for name, factor in payload.factors.items():
            self._fits(name, (factor.b.shape[0], factor.a.shape[1]), self._matrices, "the adapted modules")
        for name, dense in payload.dense.items():
            known = [*self._matrices, *self.heads]
            self._fits(name, dense.shape, known, "the adapted modules or the head's parameters")
        for name, dense in extra.items():
            self._fits(name, dense.shape, self.heads, "the head's parameters")

    def _fits(self, name: str, got: tuple[int, ...], known: Collection[str], what: str) -> None:
        if name not in known:
            raise ValueError(f"a patch must name {what}, got {name!r}")
        matrix = self._matrices.get(name)
        wanted = (matrix.d_out, matrix.d_in) if matrix else tuple(self.heads[name].shape)
        if tuple(got) != wanted:
            raise ValueError(f"a patch of {name} must have shape {list(wanted)}, got {list(got)}")
