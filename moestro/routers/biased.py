"""`BiasedRouter`: top-k with a bias on every expert that steers the choice and nothing else."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops.order import largest
from moestro.ops.precision import at_least_fp32
from moestro.ops.reindexed import reindexed
from moestro.routers.base import Router
from moestro.routers.family import SelectionFamily, size_of
from moestro.routers.gates import gate as find
from moestro.routers.gates import shares
from moestro.routers.groups import EVERYWHERE, GroupLimit
from moestro.routers.scores import Score
from moestro.routing import SparseRouting


class BiasedRouter(Router):
    """The k experts of largest s_te + bias_e; gates are the scores s_te alone (Wang 2024, arXiv:2408.15664, Eq. 3).

    s = sigmoid(logits), as in the paper, or another gate of `GATES`. DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) also
    divides the gates by their sum (`renormalize`), multiplies them (`scale`, 2.5) and confines a token to its best
    groups by biased scores (`limit`). `bias` is a buffer of zeros: no gradient reaches it, `forward` never changes it,
    checkpoints keep it, in float32 at least whatever the model is converted to; the rule `BiasBalance` moves it after
    optimizer steps, by too little for bfloat16. Ties go to the lower expert.

    The routing's logits are log s, so that their softmax is s_te / sum_e s_te, the normalised score that objectives on
    probabilities need.
    """

    bias: Tensor

    def __init__(
        self,
        score: Score,
        top_k: int,
        gate: str = "sigmoid",
        renormalize: bool = False,
        scale: float = 1.0,
        limit: GroupLimit = EVERYWHERE,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= score.n_experts:
            raise ValueError(f"top_k={top_k}, allowed: 1 to {score.n_experts}, the number of experts")
        if not scale > 0:
            raise ValueError(f"scale={scale}, allowed: above 0")
        find(gate)
        limit.check(score.n_experts, top_k)
        self.score, self.top_k, self.gate, self.renormalize = score, top_k, gate, renormalize
        self.scale, self.limit = scale, limit
        self.register_buffer("bias", torch.zeros(score.n_experts))

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.score.n_experts

    @property
    def most_experts(self) -> int:
        return self.limit.most_experts(self.n_experts)

    def forward(self, x: Float[Tensor, "t d"]) -> SparseRouting:
        logits = self.score(x)
        gate = find(self.gate)
        scores = gate.scores(logits)
        biased = scores.detach() + at_least_fp32(self.bias)
        expert = largest(self.limit(biased, biased), self.top_k)
        gates = scores.gather(1, expert)
        if self.renormalize:
            gates = shares(gates)
        return SparseRouting.from_topk(expert, self.scale * gates, self.n_experts, gate.shown(logits), raw=logits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BiasedRouter":
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype.itemsize < torch.float32.itemsize:
            self.bias = at_least_fp32(before.to(self.bias.device))
        return self

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Biases move with their experts; a fresh expert's is the mean of the others'."""
        if len(index) < self.top_k:
            raise ValueError(f"top_k={self.top_k} > {len(index)} experts")
        self.limit.check(len(index), self.top_k)
        self.score.reindex(index)
        self.bias = reindexed(self.bias, index, self.bias.mean())

    def selection_family(self) -> SelectionFamily:
        remarks = ("scores are biased, so the best ones are not those of a linear map: parameters are counted",)
        size = size_of(self) + self.n_experts
        return SelectionFamily(self.n_experts, self.n_experts, self.top_k, True, size, remarks)

    def flops(self, n_tokens: int) -> float:
        return self.score.flops(n_tokens)

    def rows_per_token(self) -> float:
        return self.top_k
