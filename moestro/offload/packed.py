"""A LOW matrix as it is stored, multiplied without being decoded where few rows ask for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.ops.native.packed import packed_linear, packs

# Rows for which decoding once and multiplying costs less than reading the codes again for every few of them.
MANY = 32


class Packed:
    """Stands for a matrix [o, i] where torch expects one: `F.linear` reads its codes, anything else gets it decoded.

    Modules of transformers keep the matrices of all experts in one tensor: what stands for a stack of this one alone
    (`[None]`) gives it back when it is asked for the first.
    """

    def __init__(self, fields: Mapping[str, Tensor], bits: int, decode: Callable[[], Tensor]) -> None:
        self.fields, self.bits, self.decode = fields, bits, decode

    def __getitem__(self, place: Any) -> "Packed":
        # [None] of what a slot gives, and [0] of what the module is given: one expert stands for itself
        if place is None or (isinstance(place, int | Tensor) and int(place) == 0):
            return self
        raise IndexError(f"expert {place} of one")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and isinstance(args[1], cls) and _few(args[0]):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            out = args[1].product(args[0])
            return out if bias is None else out + bias
        return func(*map(_decoded, args), **{name: _decoded(value) for name, value in kwargs.items()})

    def product(self, x: Tensor) -> Tensor:
        """x W^T for rows x [n, i]."""
        return packed_linear(x, self.fields["codes"], self.fields["scale"], self.fields["shift"], self.bits)


def packed(fields: Mapping[str, Tensor], bits: int, decode: Callable[[], Tensor]) -> Any:
    """A matrix by its codes [o, groups, bytes], scales and shifts: `Packed` on a CPU whose kernels read these, else
    decoded."""
    codes = fields["codes"]
    return Packed(fields, bits, decode) if codes.device.type == "cpu" and packs(bits, codes.shape[-1]) else decode()


def _few(x: Any) -> bool:
    narrow = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16)
    return narrow and x.dim() == 2 and len(x) <= MANY


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, Packed) else value
