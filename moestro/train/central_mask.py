"""`CentralMask`: tensors that all experts share learn in some of the steps only."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from moestro.experts import MPOLinear
from moestro.parallel.layout import local, part_of
from moestro.train.optim import Optimizers
from moestro.train.rules import Rule


class CentralMask(Rule):
    """In every optimizer step the gradient of each central tensor (`MPOLinear`) is masked with `probability`, because
    it is the sum over all experts' tokens while auxiliary tensors see only their own (Gao 2022, MPOE,
    arXiv:2203.01104, "gradient mask"; the mechanism is not in the released code, and the form here is ours).

    `mode`: "skip" takes the gradient away, so that AdamW leaves the tensor as it is; "zero" sets it to 0, and the
    tensor still moves by momentum and weight decay. `granularity`: one draw for the whole tensor, or one for each
    element (mode "zero" only). With `rescale` what is left is divided by 1 - probability. Draws are a pure function of
    (seed, tensor, step): the same on all ranks and for all micro-batches, and after an interruption.

    Raises: ValueError for impossible values.
    """

    def __init__(
        self,
        probability: float = 0.5,
        mode: Literal["skip", "zero"] = "skip",
        granularity: Literal["tensor", "element"] = "tensor",
        rescale: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 <= probability <= 1 or (rescale and probability == 1):
            raise ValueError(f"central mask probability={probability}, allowed: 0 to 1, below 1 with rescale")
        if mode not in ("skip", "zero") or granularity not in ("tensor", "element"):
            raise ValueError(
                f"central mask mode={mode!r}, granularity={granularity!r}, allowed: skip, zero and tensor, element"
            )
        if mode == "skip" and granularity == "element":
            raise ValueError("central mask mode='skip' with granularity='element': only whole tensors can be skipped")
        if seed < 0:
            raise ValueError(f"central mask seed={seed}, allowed: at least 0")
        self.probability, self.mode, self.granularity = probability, mode, granularity
        self.rescale, self.seed = rescale, seed
        self.centrals: list[nn.Parameter] = []

    def start(self, model: nn.Module, optimizer: Optimizers) -> None:
        """Raises: ValueError where the model has no central tensor."""
        self.centrals = [module.central for module in model.modules() if isinstance(module, MPOLinear)]
        if not self.centrals:
            raise ValueError("central mask found no central tensor; allowed: branches: [{kind: mpo, ...}]")

    @torch.no_grad()
    def gradients(self, step: int) -> None:
        for number, central in enumerate(self.centrals):
            if central.grad is None:
                continue
            kept = self._kept(central, number, step)
            if self.mode == "skip" and not bool(kept):
                central.grad = None
                continue
            own = local(central.grad)
            own *= part_of(kept / (1 - self.probability) if self.rescale else kept, central)

    def _kept(self, central: Tensor, number: int, step: int) -> Tensor:
        """1 for what is kept and 0 for what is masked, one number or as many as elements."""
        counter = np.array([0, 0, number, step], np.uint64)
        # raw numbers, which numpy promises to be the same in every version
        random = np.random.Philox(key=np.array([self.seed, 0], np.uint64), counter=counter)
        drawn = random.random_raw(1 if self.granularity == "tensor" else central.numel())
        kept = torch.from_numpy(drawn * 2.0**-64 >= self.probability).to(central.device, central.dtype)
        return kept.view(()) if self.granularity == "tensor" else kept.view_as(central)
