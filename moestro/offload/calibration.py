"""What the columns of every expert's matrices are multiplied by, measured on text: which of their errors matter."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.offload.policies import Key

# So many rows of the layer's mean stand beside an expert's own: rare experts are not judged by one token.
PRIOR_ROWS = 4.0


class Calibration:
    """Mean squares of the inputs of every expert's first and second matrix; a watcher of an engine that runs some text.

    Only matrices [out in] have columns that inputs multiply: those of families that keep them transposed (gpt-oss) are
    quantised without.
    """

    def __init__(self) -> None:
        self._rows: dict[Key, float] = {}
        self._first: dict[Key, Tensor] = {}
        self._second: dict[Key, Tensor] = {}

    def __call__(self, layer: int, expert: int, module: Any, rows: Tensor) -> None:
        if module.is_transposed or not len(rows):
            return
        bias = module.gate_up_proj_bias[0] if module.has_bias else None
        inner = module._apply_gate(F.linear(rows, module.gate_up_proj[0], bias)).float()
        self.add((layer, expert), rows.float(), inner)

    def add(self, key: Key, rows: Tensor, inner: Tensor) -> None:
        """Inputs [n d] and hidden units [n w] of one expert."""
        self._rows[key] = self._rows.get(key, 0.0) + len(rows)
        for sums, values in ((self._first, rows), (self._second, inner)):
            squares = values.float().square().sum(0).cpu()
            sums[key] = sums[key] + squares if key in sums else squares

    @property
    def n_experts(self) -> int:
        """Experts that some token visited."""
        return len(self._rows)

    def fewest(self, keys: list[Key]) -> float:
        """Rows of the expert that was met least."""
        return min((self._rows.get(key, 0.0) for key in keys), default=0.0)

    def importance(self, key: Key) -> dict[str, Tensor]:
        """Name of a matrix -> mean square of what each of its columns is multiplied by; empty for an expert that no
        token visited in a layer that none did. An expert's inputs are mixed with `PRIOR_ROWS` rows of its layer's
        mean; its hidden units, which are its own, with as many of their mean."""
        layer = [other for other in self._rows if other[0] == key[0]]
        if not layer:
            return {}
        total = sum(self._rows[other] for other in layer)
        mean = torch.stack([self._first[other] for other in layer]).sum(0) / total
        rows = self._rows.get(key, 0.0)
        found = {"gate_up_proj": (self._first.get(key, 0) + PRIOR_ROWS * mean) / (rows + PRIOR_ROWS)}
        if key in self._second:
            own = self._second[key] / rows
            found["down_proj"] = (rows * own + PRIOR_ROWS * own.mean()) / (rows + PRIOR_ROWS)
        return found
