"""Mixture-of-experts language models whose experts are unequal and countless."""

from moestro.experts import FFNBank, SharedExpert, SingletonBank
from moestro.layers import DenseFFN, MoELayer
from moestro.model import Transformer
from moestro.objectives import LoadBalance, ParameterPenalty, RouterEntropy, RouterZLoss
from moestro.routers import CosineScore, LinearScore, ProductKeyRouter, ScoredRouter, Soft, TopK, TopP
from moestro.routing import Routing, SlotRouting, SoftRouting, SparseRouting, Trace

__version__ = "0.1.0"

__all__ = [
    "CosineScore",
    "DenseFFN",
    "FFNBank",
    "LinearScore",
    "LoadBalance",
    "MoELayer",
    "ParameterPenalty",
    "ProductKeyRouter",
    "RouterEntropy",
    "RouterZLoss",
    "Routing",
    "ScoredRouter",
    "SharedExpert",
    "SingletonBank",
    "SlotRouting",
    "Soft",
    "SoftRouting",
    "SparseRouting",
    "TopK",
    "TopP",
    "Trace",
    "Transformer",
]
