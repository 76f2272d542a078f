"""What keeps the routers of DynMoE (Guo 2024, arXiv:2405.14297) diverse, simple, balanced and frugal.

Sums over router rows run over the available experts, those over gates over experts that do not rest either. The
published code averages over the whole pool, so that its values shrink with slots that nobody uses; the paper averages
over the experts there are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moestro.objectives.balance import n_present, over_tokens, token_mean
from moestro.ops.precision import at_least_fp32
from moestro.routers import ScoredRouter, TopAny
from moestro.routing import SparseRouting, Trace


def scored_router(trace: Trace, objective: str) -> ScoredRouter:
    """The router of a trace's layer.

    Raises: ValueError where it has no score with a row of weights for every expert, naming the objective.
    """
    router = getattr(trace.layer, "router", None)
    if not isinstance(router, ScoredRouter):
        raise ValueError(f"{objective} needs router: {{kind: scored, ...}}, got {type(router).__name__}")
    return router


def gates(trace: Trace, objective: str) -> tuple[SparseRouting, Float[Tensor, "n"], Float[Tensor, ""]]:
    """The routing, its rows' gates (1, with straight-through gradient), and how many experts take part.

    Raises: ValueError where the layer does not select by thresholds, naming the objective.
    """
    router, routing = scored_router(trace, objective), trace.routing
    if not isinstance(router.select, TopAny) or not isinstance(routing, SparseRouting) or routing.logits is None:
        raise ValueError(f"{objective} needs select: {{kind: top_any}}, got {type(router.select).__name__}")
    gate = router.select.gates(routing.logits[routing.token, routing.expert], routing.expert)
    return routing, gate, n_present(trace, objective)


@dataclass(frozen=True)
class RouterDiversity:
    """||W W^T - I||_F, W the unit-length weight rows of the available experts: 0 where they are orthogonal."""

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        router = scored_router(trace, "router_diversity")
        unit = F.normalize(at_least_fp32(router.score.weight), dim=-1)
        excess = unit @ unit.T - torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        both = router.available[:, None] & router.available
        return torch.linalg.matrix_norm(excess.masked_fill(~both, 0.0))


@dataclass(frozen=True)
class RouterSimplicity:
    """Mean length of the weight rows of the available experts."""

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        router = scored_router(trace, "router_simplicity")
        lengths = torch.linalg.vector_norm(at_least_fp32(router.score.weight), dim=-1)
        return lengths.masked_fill(~router.available, 0.0).sum() / router.available.sum()


@dataclass(frozen=True)
class GateBalance:
    """N sum_e P_e f_e: P_e is the mean over tokens with experts of g_e / k, f_e that over all tokens of g_e, N the
    experts that take part. The mean k where all are used alike. Both factors have the straight-through gradient, k
    none."""

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        routing, gate, experts = gates(trace, "gate_balance")
        k = routing.per_token(1.0)
        zeros = gate.new_zeros(routing.n_experts)
        taken = zeros.index_add(0, routing.expert, gate / k[routing.token].to(gate.dtype))
        rows, served = zeros.index_add(0, routing.expert, gate), (k > 0).sum()[None].to(gate.dtype)
        share, fraction, of_all = over_tokens(trace, taken, rows, served)
        return experts * (share / of_all.clamp(min=torch.finfo(gate.dtype).tiny) * fraction).sum()


@dataclass(frozen=True)
class GateEfficiency:
    """Share of the pairs of a token and an expert taking part that are active: the mean k over their number."""

    def __call__(self, trace: Trace) -> Float[Tensor, ""]:
        _, gate, experts = gates(trace, "gate_efficiency")
        return token_mean(trace, gate.sum()) / experts.clamp(min=1)
