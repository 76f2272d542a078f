"""Floor 2: who computes what. A router maps tokens to a `Routing`; it does not know what experts are."""

from moestro.routers.base import Router, ScoredRouter
from moestro.routers.biased import BiasedRouter
from moestro.routers.choices import ExpertChoice, ReLU
from moestro.routers.grouped import GroupedRouter
from moestro.routers.groups import GroupLimit
from moestro.routers.limits import Capacity
from moestro.routers.modes import ModesRouter
from moestro.routers.product_key import ProductKeyRouter
from moestro.routers.remapped import RemappedRouter
from moestro.routers.residual import ResidualRouter
from moestro.routers.sampling import SampledSecond
from moestro.routers.scaled import ScaledTopK
from moestro.routers.scores import AffineScore, CosineScore, LinearScore, LowRankCosineScore, NoisyScore, Score
from moestro.routers.selects import MutedTopK, Select, Soft, SoftmaxOfChosen, TopK, TopP
from moestro.routers.skipping import SkippingTopK
from moestro.routers.slots import SlotRouter
from moestro.routers.sparse_mixer import SparseMixer
from moestro.routers.steered import SteeredTopP
from moestro.routers.top_any import TopAny
from moestro.routers.uniform import UniformRouter

__all__ = [
    "AffineScore",
    "BiasedRouter",
    "CosineScore",
    "GroupedRouter",
    "LinearScore",
    "ModesRouter",
    "MutedTopK",
    "NoisyScore",
    "ProductKeyRouter",
    "RemappedRouter",
    "ResidualRouter",
    "Router",
    "SampledSecond",
    "Score",
    "ScaledTopK",
    "ScoredRouter",
    "Select",
    "SkippingTopK",
    "SlotRouter",
    "Soft",
    "SoftmaxOfChosen",
    "SparseMixer",
    "SteeredTopP",
    "TopAny",
    "TopK",
    "TopP",
    "UniformRouter",
    "Capacity",
    "ExpertChoice",
    "GroupLimit",
    "LowRankCosineScore",
    "ReLU",
]
