"""The matrices of an expert in few bits: groups of codes with a scale and a shift, searched for, not just rounded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Numbers that are worked on at a time on a CPU: what stays in its cache.
CHUNK = 2**17
REFINEMENTS = 4
CLIPPINGS = {8: (0.95,), 4: (0.9, 0.8), 2: (0.85, 0.7, 0.55, 0.4)}


class Codec(Protocol):
    """Turns a matrix [o, i] into named tensors and back."""

    @property
    def name(self) -> str: ...

    def fields(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor that a matrix of this shape becomes."""
        ...

    def encode(self, matrix: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        """The tensors; `importance` [i] is the mean square of what each column is multiplied by."""
        ...

    def decode(self, fields: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The matrix, in `dtype`."""
        ...


@dataclass(frozen=True)
class Plain:
    """Numbers as they are (`same`), or in another floating-point dtype."""

    name: str = "same"
    dtype: torch.dtype | None = None

    def fields(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"values": (self.dtype or dtype, shape)}

    def encode(self, matrix: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        return {"values": matrix.to(self.dtype or matrix.dtype)}

    def decode(self, fields: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return fields["values"].to(dtype)


@dataclass(frozen=True)
class Grouped:
    """w = code * scale + shift: codes of `bits` bits; scale and shift of every `group` numbers of a row in bfloat16,
    or float32 with 8 bits.

    `searched`: of each group, scale and shift of least error sum_j h_j (w_j - w'_j)^2 are looked for, h the importance
    of the columns: the best of some clippings of its range, then least squares and rounding in turn (as in
    half-quadratic quantisation, but with squares weighted by calibration). Never worse than `searched=False`, which
    rounds to nearest over the whole range.
    """

    name: str
    bits: int
    group: int = 64
    searched: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits={self.bits}, allowed: 2, 4, 8")
        if self.group < 8 or self.group % (8 // self.bits):
            raise ValueError(f"group={self.group}, allowed: at least 8, a multiple of {8 // self.bits}")

    @property
    def _scales(self) -> torch.dtype:
        return torch.float32 if self.bits == 8 else torch.bfloat16

    def fields(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        groups = -(-shape[1] // self.group)
        scales = (self._scales, (shape[0], groups))
        codes = (torch.uint8, (shape[0], groups, self.group * self.bits // 8))
        return {"codes": codes, "scale": scales, "shift": scales}

    def encode(self, matrix: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        rows = max(1, CHUNK // max(1, matrix.shape[1]))
        weight = self._importance(matrix, importance)
        parts = [self._rows(part.float(), weight) for part in matrix.split(rows)]
        return {name: torch.cat([part[name] for part in parts]) for name in ("codes", "scale", "shift")}

    def _importance(self, matrix: Tensor, importance: Tensor | None) -> Tensor:
        """h [groups, group]: positive, 0 for columns that only fill the last group."""
        columns = matrix.shape[1]
        weight = matrix.new_ones(columns, dtype=torch.float32) if importance is None else importance.float()
        weight = (weight / weight.mean().clamp_min(1e-30)).clamp_min(1e-4)
        return torch.cat([weight, weight.new_zeros(-columns % self.group)]).view(-1, self.group)

    def _rows(self, rows: Tensor, weight: Tensor) -> dict[str, Tensor]:
        # the last group is filled with a number that it holds already
        filled = torch.cat([rows, rows[:, -1:].expand(-1, -rows.shape[1] % self.group)], 1)
        grouped = filled.view(len(rows), -1, self.group)
        scale, shift = self._search(grouped, weight) if self.searched else self._clipped(grouped, 1.0)
        return {"codes": self._pack(self._codes(grouped, scale, shift)), "scale": scale, "shift": shift}

    def _clipped(self, grouped: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Scale and shift of evenly spaced codes over the middle `share` of each group's range."""
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = (high - low) * share / (2**self.bits - 1)
        return scale.to(self._scales), (low + (high - low) * (1 - share) / 2).to(self._scales)

    def _codes(self, grouped: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        step = scale.float().masked_fill(scale == 0, 1.0)[..., None]
        return ((grouped - shift.float()[..., None]) / step).round_().clamp_(0, 2**self.bits - 1)

    def _error(self, grouped: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        back = self._codes(grouped, scale, shift) * scale.float()[..., None] + shift.float()[..., None]
        return ((back - grouped).square_() * weight).sum(-1)

    def _search(self, grouped: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self._clipped(grouped, 1.0)
        least = self._error(grouped, weight, scale, shift)

        def better(new_scale: Tensor, new_shift: Tensor) -> None:
            nonlocal scale, shift, least
            error = self._error(grouped, weight, new_scale, new_shift)
            wins = error < least
            scale, shift = torch.where(wins, new_scale, scale), torch.where(wins, new_shift, shift)
            least = torch.where(wins, error, least)

        for share in CLIPPINGS[self.bits]:
            better(*self._clipped(grouped, share))
        for _ in range(REFINEMENTS):
            better(*_fitted(grouped, self._codes(grouped, scale, shift), weight, scale))
        return scale, shift

    def _pack(self, codes: Tensor) -> Tensor:
        """Bytes: the first 8 / bits-th of a group's codes in the lowest bits, the next in the bits above."""
        parts = codes.to(torch.uint8).chunk(8 // self.bits, -1)
        packed = parts[0].clone()
        for place, part in enumerate(parts[1:], 1):
            packed |= part << (self.bits * place)
        return packed

    def decode(self, fields: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        codes = fields["codes"]
        out = torch.empty(shape, dtype=dtype, device=codes.device)
        rows = len(codes) if codes.is_cuda else max(1, CHUNK // max(1, shape[1]))
        for start in range(0, len(codes), rows):
            part = slice(start, start + rows)
            values = self._unpack(codes[part]).mul_(fields["scale"][part, :, None]).add_(fields["shift"][part, :, None])
            out[part] = values.view(len(values), -1)[:, : shape[1]]
        return out

    def _unpack(self, codes: Tensor) -> Tensor:
        """Codes [o, groups, group] as float32."""
        values = torch.empty(*codes.shape[:2], self.group, device=codes.device)
        each, steps = codes.shape[-1], 8 // self.bits
        for place in range(steps):
            part = codes >> (self.bits * place) if place else codes
            values[..., place * each : (place + 1) * each] = part & (2**self.bits - 1) if place + 1 < steps else part
        return values


def _fitted(grouped: Tensor, codes: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of least weighted squares for given codes; the old scale where all codes of a group are one."""
    total = weight.sum(-1)
    mean_code, mean = (codes * weight).sum(-1) / total, (grouped * weight).sum(-1) / total
    deviation = codes - mean_code[..., None]
    spread = (deviation.square() * weight).sum(-1)
    slope = (deviation * (grouped - mean[..., None]) * weight).sum(-1) / spread.clamp_min(1e-20)
    fitted = torch.where(spread > 1e-12, slope, scale.float()).to(scale.dtype)
    return fitted, (mean - fitted.float() * mean_code).to(scale.dtype)


CODECS: dict[str, Codec] = {
    "same": Plain(),
    "bf16": Plain("bf16", torch.bfloat16),
    "int8": Grouped("int8", 8, 128),
    "int4": Grouped("int4", 4, 64),
    "int2": Grouped("int2", 2, 16),
}


def codec_named(name: str) -> Codec:
    """Raises: ValueError for a name that is none."""
    if name not in CODECS:
        raise ValueError(f"precision {name!r}, allowed: {', '.join(CODECS)}")
    return CODECS[name]


def relative_error(matrix: Tensor, decoded: Tensor, importance: Tensor | None = None) -> float:
    """sqrt(sum h (w - w')^2 / sum h w^2): what an output is off by, where inputs are independent."""
    weight = torch.ones(matrix.shape[-1]) if importance is None else importance.float()
    off = ((matrix.float() - decoded.float()).square() * weight).sum()
    return float((off / (matrix.float().square() * weight).sum().clamp_min(1e-30)).sqrt())
