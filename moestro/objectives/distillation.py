"""Experts that learn from each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moestro.objectives.balance import Statistics, check_statistics
from moestro.ops.precision import at_least_fp32
from moestro.routing import SoftRouting, Trace, present


@dataclass(frozen=True)
class MutualDistillation:
    """Mean over tokens of how far the recorded outputs e_i of a token's k experts are from their mean (Xie 2024, MoDE,
    "MoDE: A Mixture-of-Experts Model with Mutual Distillation among the Experts", arXiv:2402.00893; the form of its
    loss is from memory and summaries). Raw outputs, before gates: routers learn nothing from it.

    Which experts: those that `record` of the layer keeps, `active`, `all` or `sampled`. Tokens with fewer than two do
    not count. `distance` to the mean m = sum_i e_i / k, averaged over the k experts:

    - `mse`: |e_i - m|^2, the `features` averaged or summed; with `normalize` divided by the mean of |m|^2 over the
      tokens (no gradient), so that its weight depends on no scale;
    - `cosine`: 1 - cos(e_i, m);
    - `kl`: tau^2 KL(softmax(m / tau) || softmax(e_i / tau)), for experts whose outputs are logits of classes.

    With target `zero` it is |e_i|^2 instead (mse only): a plain penalty on outputs, the control that distillation has
    to beat. With `pairs` it is the mean over ordered pairs of different experts of |e_i - e_j|^2, 1 - cos(e_i, e_j) or
    tau^2 KL(p_i || p_j): for mse 2 k / (k - 1) times that to the mean. No pair is ever built. Gradients reach all
    experts and the layer's input. With `statistics: step` tokens of all micro-batches weigh the same; |m|^2 stays that
    of each.
    """

    distance: Literal["mse", "cosine", "kl"] = "mse"
    target: Literal["mean", "pairs", "zero"] = "mean"
    features: Literal["mean", "sum"] = "mean"
    normalize: bool = True
    temperature: float = 2.0
    statistics: Statistics = "micro_batch"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)
        allowed = {"distance": tuple(DISTANCES), "target": ("mean", "pairs", "zero"), "features": ("mean", "sum")}
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)!r}, allowed: {', '.join(words)}")
        if self.target == "zero" and self.distance != "mse":
            raise ValueError(f"target='zero', distance={self.distance!r}, allowed: mse")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}, allowed: above 0")

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        """Raises: ValueError where the layer records nothing, mixes tokens, or kl meets hidden states."""
        token, rows = recorded(trace)
        if self.distance == "kl" and rows.shape[1] == trace.x.shape[1]:
            raise ValueError(f"distance='kl' needs logits of classes, these experts return {rows.shape[1]} channels")
        outputs = Outputs(token, rows, trace.routing.n_tokens)
        paired = (outputs.count >= 2).to(rows.dtype)
        own = (DISTANCES[self.distance](outputs, self) * paired).sum()
        size = (self.over_features(outputs.mean.detach().square()) * paired).sum()
        total, size, pairs = trace.summed(torch.stack([own, size, paired.sum()]))
        pairs = pairs.detach().clamp(min=1)
        scale = torch.ones_like(pairs)
        if self.distance == "mse" and self.normalize:
            scale = (size.detach() / pairs).clamp(min=torch.finfo(rows.dtype).tiny)
        if self.statistics == "step" and trace.step is not None:
            return own / scale * (trace.step.micro_batches / max(1, trace.step.n_paired))
        return total / scale / pairs

    def over_features(self, squares: Float[Tensor, "m o"]) -> Float[Tensor, "m"]:
        """Their mean or their sum."""
        return squares.mean(-1) if self.features == "mean" else squares.sum(-1)


class Outputs:
    """Experts' outputs [n, o] on the tokens `token` [n]."""

    def __init__(self, token: Int[Tensor, "n"], rows: Float[Tensor, "n o"], n_tokens: int) -> None:
        self.token, self.rows, self.n_tokens = token, rows, n_tokens
        self.count = self.total(torch.ones_like(rows[:, 0]))
        self.mean = self.average(rows)

    def total(self, value: Float[Tensor, "n *o"]) -> Float[Tensor, "t *o"]:
        """Sum over each token's rows."""
        return value.new_zeros(self.n_tokens, *value.shape[1:]).index_add(0, self.token, value)

    def average(self, value: Float[Tensor, "n *o"]) -> Float[Tensor, "t *o"]:
        """Mean over each token's rows, 0 for a token without."""
        count = self.count.clamp(min=1)
        return self.total(value) / (count if value.ndim == 1 else count[:, None])

    def over_pairs(self, value: Float[Tensor, "t"]) -> Float[Tensor, "t"]:
        """A sum over ordered pairs of different experts, divided by their number."""
        return value / (self.count * (self.count - 1)).clamp(min=1)


def recorded(trace: Trace) -> tuple[Int[Tensor, "n"], Float[Tensor, "n o"]]:
    """Token and output of every recorded row, float32 at least; not of experts that take no part, whose rows a soft
    selection computes for weights of 0.

    Raises: ValueError where the layer records nothing, or rows are mixtures of tokens.
    """
    if trace.rows is None:
        raise ValueError(
            "mutual_distillation needs the outputs of experts; allowed: ffn: {kind: moe, record: {kind: active}, ...}"
        )
    chosen = trace.routing.meetings()
    if chosen is None:
        raise ValueError(
            f"mutual_distillation needs experts that see tokens, {type(trace.routing).__name__} mixes them"
        )
    (token, expert), rows = chosen, trace.rows
    if isinstance(trace.routing, SoftRouting) and trace.routing.logits is not None:
        there = present(trace.routing.logits)[expert]
        token, rows = token[there], rows[there]
    if trace.overheard is not None:
        further = trace.overheard.routing.meetings()
        token = torch.cat([token, *(() if further is None else further[:1])])
        rows = torch.cat([rows, trace.overheard.rows])
    return token, at_least_fp32(rows)


def squared_distance(outputs: Outputs, options: MutualDistillation) -> Float[Tensor, "t"]:
    """Of every token."""
    origin = 0 if options.target == "zero" else outputs.mean[outputs.token]
    apart = options.over_features((outputs.rows - origin).square())
    if options.target != "pairs":
        return outputs.average(apart)
    # sum_ij |e_i - e_j|^2 = 2 k sum_i |e_i - m|^2
    return outputs.over_pairs(2 * outputs.count * outputs.total(apart))


def cosine_distance(outputs: Outputs, options: MutualDistillation) -> Float[Tensor, "t"]:
    """Of every token."""
    if options.target == "mean":
        return outputs.average(1 - F.cosine_similarity(outputs.rows, outputs.mean[outputs.token], dim=-1))
    # sum_{i != j} cos = |sum_i u_i|^2 - sum_i |u_i|^2 for outputs of length 1
    unit = F.normalize(outputs.rows, dim=-1)
    same = outputs.total(unit.square().sum(-1))
    return 1 - outputs.over_pairs(outputs.total(unit).square().sum(-1) - same)


def divergence(outputs: Outputs, options: MutualDistillation) -> Float[Tensor, "t"]:
    """Of every token."""
    tau = options.temperature
    log_p = (outputs.rows / tau).log_softmax(-1)
    if options.target == "mean":
        teacher = (outputs.mean / tau).log_softmax(-1)[outputs.token]
        return tau**2 * outputs.average((teacher.exp() * (teacher - log_p)).sum(-1))
    # sum_{i, j} p_i (log p_i - log p_j) = k sum_i p_i log p_i - (sum_i p_i) (sum_j log p_j)
    own = outputs.count * outputs.total((log_p.exp() * log_p).sum(-1))
    return tau**2 * outputs.over_pairs(own - (outputs.total(log_p.exp()) * outputs.total(log_p)).sum(-1))


DISTANCES: dict[str, Callable[[Outputs, MutualDistillation], Float[Tensor, "t"]]] = {
    "mse": squared_distance,
    "cosine": cosine_distance,
    "kl": divergence,
}
