"""`TaughtLayer`: a mixture beside the frozen dense layer that it was made of."""

from dataclasses import replace
from functools import reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.cost import NOTHING, Cost, Kept
from moestro.layers.base import Layer
from moestro.layers.dense import DenseFFN
from moestro.layers.moe import MoELayer
from moestro.routing import Trace


class TaughtLayer(Layer):
    """y = student(x). While training, the trace also says what the teacher makes of the same tokens: `target`, the
    teacher's output less what the student's branches other than its first bank add, so that it is what the chosen
    experts should sum to. Objectives such as `RouterTarget` learn from it (Zhao 2024, FactorLLM, arXiv:2408.11855, on
    the student's stream: each layer is taught what to make of the input that it really gets).

    The teacher is frozen: it gets no gradients and no optimizer state, and is saved with the layer until the teachers
    are dropped (`moestro convert --drop-teacher`). Its forward pass counts in training, once: it has no backward pass.
    """

    def __init__(self, student: MoELayer, teacher: DenseFFN) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return self.student.follows

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None, earlier: tuple[Trace, ...] = ()
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        y, traces = self.student(x, keep, earlier)
        return y, tuple(replace(trace, target=self._target(trace)) for trace in traces) if self.training else traces

    @torch.no_grad()
    def _target(self, trace: Trace) -> Float[Tensor, "t d"]:
        others = [branch for branch in self.student.branches if branch is not self.student.bank]
        wanted = self.teacher(trace.x)[0]
        return reduce(torch.sub, [branch(trace.x, trace.routing) for branch in others], wanted)

    def expected_token_flops(self) -> float:
        return self.student.expected_token_flops()

    def kept_per_token(self, d_model: int) -> Kept:
        """What the student leaves, with what it records, and the target."""
        return self.student.kept_per_token(d_model) + Kept(d_model)

    def untraced_flops(self, n_tokens: int) -> Cost:
        return self.teacher.untraced_flops(n_tokens).forward_only() if self.training else NOTHING
