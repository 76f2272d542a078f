"""Selections in which the number of a token's experts is not set: experts that choose tokens, gates that are zero."""

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.routers.gates import gate as find
from moestro.routers.selects import Select
from moestro.routing import SparseRouting
from moestro.routing.capacity import available, rows_allowed


class ExpertChoice(Select):
    """Every expert takes its ceil(factor * tokens / experts) tokens of largest gate; gates are those of `GATES`, not
    renormalised (Zhou 2022, arXiv:2202.09368, Eqs. 1-3).

    Loads are even, and `factor` is the mean number of experts a token gets; some get none. Not causal: who is chosen
    depends on all tokens of the batch, later ones included. With one expert the softmax is the constant 1 and is
    refused. Ties go to the earlier token.
    """

    causal = False

    def __init__(self, factor: float, gate: str = "softmax") -> None:
        super().__init__()
        if not factor > 0:
            raise ValueError(f"factor={factor}, allowed: above 0")
        find(gate)
        self.factor, self.gate = factor, gate

    def check(self, n_experts: int) -> None:
        if self.factor > n_experts:
            raise ValueError(f"factor={self.factor}, allowed: at most {n_experts}, the number of experts")
        if n_experts == 1 and self.gate == "softmax":
            raise ValueError("gate='softmax' of one expert is the constant 1; use gate: sigmoid")

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        gate = find(self.gate)
        scores = gate.scores(logits)
        there = available(logits)
        rows = rows_allowed(len(logits), len(there), self.factor)
        token = scores.T[there].sort(dim=-1, descending=True, stable=True).indices[:, :rows].flatten()
        expert = there.repeat_interleave(rows)
        weight = scores[token, expert]
        shown = gate.shown(logits)
        return SparseRouting(token, expert, weight, len(logits), logits.shape[1], shown, raw=logits)

    def rows_per_token(self, n_experts: int) -> float:
        return self.factor


class ReLU(Select):
    """Every expert whose logit is positive, weighted by it: g = relu(logit) (Wang 2024, ReMoE, arXiv:2412.14711,
    Eq. 5). Continuous: an expert comes and goes at gate 0. A token may have no expert.

    `target` is the mean number of experts a token should have. The objective `GateL1` presses on the gates with the
    coefficient `pressure`, a buffer that the rule `GateSparsity` moves after optimizer steps; it starts at 1e-8, as in
    the paper, and checkpoints keep it. At the start about half of the experts are active; expected costs are those at
    the target.
    """

    pressure: Tensor

    def __init__(self, target: float, pressure: float = 1e-8) -> None:
        super().__init__()
        if not target > 0 or not pressure > 0:
            raise ValueError(f"target={target}, pressure={pressure}, allowed: above 0")
        self.target = target
        self.register_buffer("pressure", torch.tensor(pressure))

    def check(self, n_experts: int) -> None:
        if self.target > n_experts:
            raise ValueError(f"target={self.target}, allowed: at most {n_experts}, the number of experts")

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        token, expert = (logits > 0).nonzero(as_tuple=True)
        return SparseRouting(token, expert, logits[token, expert], len(logits), logits.shape[1], logits)

    def rows_per_token(self, n_experts: int) -> float:
        return self.target
