"""Mixture-of-experts language models whose experts are unequal and countless."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.experts import (
        CPBank,
        FFNBank,
        GLUSingletonBank,
        LowRankBank,
        MPOBank,
        RaggedBank,
        SharedExpert,
        SingletonBank,
        ValueBank,
    )
    from moestro.layers import (
        DenseFFN,
        FactoredLayer,
        InputGatedLayer,
        LowRankMixtures,
        MoELayer,
        SequenceLayer,
        adapt,
    )
    from moestro.model import Transformer
    from moestro.objectives import LoadBalance, ParameterPenalty, RetrievedParameterPenalty, RouterEntropy, RouterZLoss
    from moestro.routers import CosineScore, LinearScore, ProductKeyRouter, ScoredRouter, Soft, TopK, TopP
    from moestro.routing import Routing, SlotRouting, SoftRouting, SparseRouting, Trace

__version__ = "0.1.0"

__all__ = [
    "CPBank",
    "CosineScore",
    "DenseFFN",
    "FFNBank",
    "FactoredLayer",
    "GLUSingletonBank",
    "InputGatedLayer",
    "LinearScore",
    "LoadBalance",
    "LowRankBank",
    "LowRankMixtures",
    "MPOBank",
    "MoELayer",
    "ParameterPenalty",
    "ProductKeyRouter",
    "RaggedBank",
    "RetrievedParameterPenalty",
    "RouterEntropy",
    "RouterZLoss",
    "Routing",
    "ScoredRouter",
    "SequenceLayer",
    "SharedExpert",
    "SlotRouting",
    "SingletonBank",
    "Soft",
    "SoftRouting",
    "SparseRouting",
    "TopK",
    "TopP",
    "Trace",
    "Transformer",
    "ValueBank",
    "adapt",
]
_HOMES = ("experts", "layers", "model", "objectives", "routers", "routing")


def __getattr__(name: str) -> Any:
    """A public name, from its module at first use: `moestro --help` must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'moestro' has no attribute {name!r}")
    home = next(module for module in map(_module, _HOMES) if hasattr(module, name))
    return getattr(home, name)


def _module(name: str) -> Any:
    return import_module(f"moestro.{name}")
