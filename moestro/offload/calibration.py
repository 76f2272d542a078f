"""What the columns of every expert's matrices are multiplied by, measured on text: which of their errors matter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moestro.offload.policies import Key

# So many rows of the layer's mean stand beside an expert's own: rare experts are not judged by one token.
PRIOR_ROWS = 4.0
# module with one expert's tensors, its rows [n d] -> its hidden units [n w]
Hidden = Callable[[Any, Tensor], Tensor]


class Calibration:
    """Mean squares of the inputs of every expert's matrices; a watcher of an engine that runs some text.

    Only matrices [out in] have columns that inputs multiply: `first` is the name of the one that an expert's rows
    multiply, `second` of the one that its `hidden` units do; None for those that are kept transposed, which are
    quantised without.
    """

    def __init__(
        self, first: str | None = "gate_up_proj", second: str | None = "down_proj", hidden: Hidden | None = None
    ) -> None:
        self.first, self.second, self.hidden = first, second, hidden
        self._rows: dict[Key, float] = {}
        self._first: dict[Key, Tensor] = {}
        self._second: dict[Key, Tensor] = {}

    def __call__(self, layer: int, expert: int, module: Any, rows: Tensor) -> None:
        if self.first is not None and len(rows):
            self.add((layer, expert), rows, None if self.hidden is None else self.hidden(module, rows))

    def add(self, key: Key, rows: Tensor, inner: Tensor | None = None) -> None:
        """Inputs [n d] and hidden units [n w] of one expert."""
        self._rows[key] = self._rows.get(key, 0.0) + len(rows)
        for sums, values in ((self._first, rows), (self._second, inner)):
            if values is not None:
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
        if self.first is None or not layer:
            return {}
        total = sum(self._rows[other] for other in layer)
        mean = torch.stack([self._first[other] for other in layer]).sum(0) / total
        rows = self._rows.get(key, 0.0)
        found = {self.first: (self._first.get(key, 0) + PRIOR_ROWS * mean) / (rows + PRIOR_ROWS)}
        if self.second is not None and key in self._second:
            own = self._second[key] / rows
            found[self.second] = (rows * own + PRIOR_ROWS * own.mean()) / (rows + PRIOR_ROWS)
        return found
