"""Floor 4: auxiliary losses. An objective is a pure function of one layer's trace; its weight lives in the recipe."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from moestro.objectives.balance import LoadBalance, ParameterPenalty, WeightedBalance
from moestro.objectives.clusters import ClusterVariance
from moestro.objectives.distillation import MutualDistillation
from moestro.objectives.entropy import RouterEntropy, RouterZLoss
from moestro.objectives.first_choice import FirstChoiceBalance
from moestro.objectives.gate_l1 import GateL1
from moestro.objectives.groups import GroupPenalty, IntraGroupBalance
from moestro.objectives.retrieved import RetrievedParameterPenalty
from moestro.objectives.router_target import RouterTarget
from moestro.objectives.top_any import GateBalance, GateEfficiency, RouterDiversity, RouterSimplicity
from moestro.routing import Trace

Objective = Callable[[Trace], Float[Tensor, ""]]

__all__ = [
    "GateBalance",
    "GateEfficiency",
    "GroupPenalty",
    "IntraGroupBalance",
    "LoadBalance",
    "MutualDistillation",
    "Objective",
    "ParameterPenalty",
    "RetrievedParameterPenalty",
    "RouterDiversity",
    "RouterEntropy",
    "RouterSimplicity",
    "RouterTarget",
    "RouterZLoss",
    "WeightedBalance",
    "ClusterVariance",
    "FirstChoiceBalance",
    "GateL1",
]
