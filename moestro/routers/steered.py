"""`SteeredTopP`: top-p whose threshold is part of the model's state."""

import torch
from torch import Tensor

from moestro.routers.selects import TopP


class SteeredTopP(TopP):
    """Top-p that starts at `threshold=start`; the rule `SteerThreshold` moves the threshold in training.

    Checkpoints keep the threshold in float64, whatever the model's dtype, so that a run is evaluated and continued
    with the one it had. (Hence no `threshold` in a recipe that `--set` could change after training.)
    """

    def __init__(self, start: float, renormalize: bool = True, strict: bool = False) -> None:
        super().__init__(start, renormalize, strict)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.threshold, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.threshold = float(state)
