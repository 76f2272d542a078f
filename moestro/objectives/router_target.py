"""Routers that are taught which experts to choose: by the outputs that all experts have on a token."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.objectives.balance import require_logits
from moestro.ops.precision import at_least_fp32
from moestro.routing import SparseRouting, Trace, present

LabelKind = Literal["subset", "expert_error", "projection"]
# Sets of experts that are tried one by one, and numbers held at a time.
MOST_SUBSETS = 20_000
PIECE = 2**22


def subset_errors(
    outputs: Float[Tensor, "t e o"], target: Float[Tensor, "t o"], top_k: int, scale: float = 1.0
) -> tuple[Bool[Tensor, "c e"], Float[Tensor, "t c"]]:
    """Every set of `top_k` experts, and |scale sum_{i in S} E_i - T|^2 for each token and set.

    Raises: ValueError for more than 20,000 sets.
    """
    n_experts = outputs.shape[1]
    if math.comb(n_experts, top_k) > MOST_SUBSETS:
        raise ValueError(
            f"labels='subset': {math.comb(n_experts, top_k):,} sets of {top_k} among {n_experts} experts, allowed: "
            f"{MOST_SUBSETS:,}; labels: projection has no such limit"
        )
    sets = torch.zeros(math.comb(n_experts, top_k), n_experts, dtype=torch.bool, device=outputs.device)
    members = torch.tensor(list(itertools.combinations(range(n_experts), top_k)), device=outputs.device)
    sets.scatter_(1, members, True)
    member = sets.to(outputs.dtype)
    gram = (outputs @ outputs.transpose(1, 2)).flatten(1)
    pairs = (member[:, :, None] * member[:, None, :]).flatten(1)
    along = projections(outputs, target) @ member.T
    return sets, scale**2 * (gram @ pairs.T) - 2 * scale * along + target.square().sum(-1, keepdim=True)


def projections(outputs: Float[Tensor, "t e o"], target: Float[Tensor, "t o"]) -> Float[Tensor, "t e"]:
    """<E_i, T> of every token and expert."""
    return torch.einsum("teo,to->te", outputs, target)


def _best_subset(outputs: Tensor, target: Tensor, top_k: int, scale: float) -> Tensor:
    found = []
    size = max(1, PIECE // math.comb(outputs.shape[1], top_k))
    for some, wanted in zip(outputs.split(size), target.split(size), strict=True):
        sets, errors = subset_errors(some, wanted, top_k, scale)
        found.append(sets[errors.argmin(-1)])
    return torch.cat(found)


def _least_errors(outputs: Tensor, target: Tensor, top_k: int, scale: float) -> Tensor:
    share = target[:, None] * (top_k / outputs.shape[1])
    return _chosen(-(outputs - share).square().sum(-1), top_k)


def _largest_projections(outputs: Tensor, target: Tensor, top_k: int, scale: float) -> Tensor:
    return _chosen(projections(outputs, target), top_k)


def _chosen(scores: Float[Tensor, "t e"], top_k: int) -> Bool[Tensor, "t e"]:
    """The `top_k` greatest of each row; ties go to the lower expert."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


LABELS: dict[str, Callable[[Tensor, Tensor, int, float], Tensor]] = {
    "subset": _best_subset,
    "expert_error": _least_errors,
    "projection": _largest_projections,
}


@torch.no_grad()
def label_experts(
    outputs: Float[Tensor, "t e o"],
    target: Float[Tensor, "t o"],
    top_k: int,
    labels: LabelKind = "subset",
    scale: float = 1.0,
) -> Bool[Tensor, "t e"]:
    """The experts that each token should choose, `top_k` of them, of their outputs E_i and the wanted sum T.

    `subset`: those of least |scale sum E_i - T|^2, by trying all sets; `projection`: the greatest <E_i, T>;
    `expert_error`: the least |E_i - T k / n|^2, each expert judged alone (Zhao 2024, FactorLLM, arXiv:2408.11855, its
    code), which asks every expert for the whole group's share.

    Raises: ValueError for an unknown kind, or too many sets.
    """
    if labels not in LABELS:
        raise ValueError(f"labels={labels!r}, allowed: {', '.join(LABELS)}")
    return LABELS[labels](at_least_fp32(outputs), at_least_fp32(target), top_k, scale)


def target_distribution(chosen: Bool[Tensor, "t e"]) -> Float[Tensor, "t e"]:
    """Equal shares of 1 for the chosen experts."""
    share = chosen.to(torch.float32)
    return share / share.sum(-1, keepdim=True)


def router_target_loss(
    logits: Float[Tensor, "t e"], distribution: Float[Tensor, "t e"], literal: bool = False
) -> Float[Tensor, ""]:
    """Mean over tokens of KL(distribution || softmax(logits)), 0 where they are equal; `literal` gives
    KL(softmax(logits) || softmax(label)) of the FactorLLM code, whose label of ones and zeros is softmaxed again."""
    log_p = at_least_fp32(logits).log_softmax(-1)
    wanted = distribution.to(log_p)
    if literal:
        label = (wanted > 0).to(log_p)
        return (log_p.exp() * (log_p - label.log_softmax(-1))).sum() / max(1, len(log_p))
    # where nothing is wanted a probability of 0 is right, too
    cross = torch.where(wanted > 0, wanted * log_p, 0.0)
    return (torch.xlogy(wanted, wanted) - cross).sum() / max(1, len(log_p))


@dataclass(frozen=True)
class RouterTarget:
    """Prior-approximate router training (Zhao 2024, FactorLLM, arXiv:2408.11855): KL between the experts that come
    nearest to the teacher's output on each token (`label_experts`) and the router's probabilities. Its gradient reaches
    the router (and the layer's input), neither experts nor teacher.

    Needs a layer with a teacher (`kind: taught`) whose student records all experts' outputs (`record: {kind: all}`).
    As many experts are labelled as the layer chooses; `scale` is that of its selection unless it is given. `literal`
    gives the released code's loss, whose target is 0.475 against 0.175 for top-1 of 4.
    """

    labels: LabelKind = "subset"
    scale: float | None = None
    literal: bool = False

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise ValueError(f"labels={self.labels!r}, allowed: {', '.join(LABELS)}")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale={self.scale}, allowed: above 0")

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        """Raises: ValueError where the layer has no teacher, or did not record every expert's output."""
        logits = require_logits(trace.routing, "router_target")
        if trace.target is None:
            raise ValueError(
                "router_target needs a layer with a teacher: ffn: {kind: taught, student: ..., teacher: ...}"
            )
        if not len(logits):
            return logits.sum()
        there = present(logits)
        outputs = every_output(trace)[:, there]
        top_k = round(trace.routing.n_rows / trace.routing.n_tokens)
        chosen = label_experts(outputs, trace.target, top_k, self.labels, self.scale or selection_scale(trace))
        return router_target_loss(logits[:, there], target_distribution(chosen), self.literal)


def selection_scale(trace: Trace) -> float:
    """What the layer multiplies the sum of its experts with."""
    layer: Any = trace.layer
    return getattr(getattr(layer.router, "select", None), "scale", 1.0)


@torch.no_grad()
def every_output(trace: Trace) -> Float[Tensor, "t e o"]:
    """Outputs of all available experts on all tokens, from what the layer recorded; zeros for the others.

    Raises: ValueError where some were not recorded.
    """
    routing, further = trace.routing, trace.overheard
    rows = 0 if trace.rows is None else len(trace.rows) + (0 if further is None else len(further.rows))
    available = int((require_logits(routing, "router_target") > -torch.inf).sum())
    if trace.rows is None or not isinstance(routing, SparseRouting) or rows != available:
        raise ValueError("router_target needs the outputs of all experts: student: {..., record: {kind: all}}")
    outputs = trace.rows.new_zeros(routing.n_tokens, routing.n_experts, trace.rows.shape[-1])
    outputs[routing.token, routing.expert] = trace.rows
    if further is not None and isinstance(further.routing, SparseRouting):
        outputs[further.routing.token, further.routing.expert] = further.rows
    return outputs
