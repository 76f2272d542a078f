"""Floor 3: feed-forward layers of a block, called alike: x, keep -> y, traces."""

from moestro.layers.adapted import AdaptedLinear, LowRankMixtures, adapter_flops
from moestro.layers.adapting import Adapters, adapt, adapters_of
from moestro.layers.base import Layer
from moestro.layers.composite import InputGatedLayer, SequenceLayer
from moestro.layers.dense import DenseFFN
from moestro.layers.editing import scaled_experts
from moestro.layers.factored import FactoredLayer
from moestro.layers.moe import MoELayer
from moestro.layers.multi_head import MultiHeadLayer
from moestro.layers.peer_pytorch import from_peer_pytorch
from moestro.layers.recording import ActiveRows, AllRows, SampledRows
from moestro.layers.stratified import StratifiedLayer
from moestro.layers.taught import TaughtLayer

__all__ = [
    "ActiveRows",
    "AdaptedLinear",
    "Adapters",
    "AllRows",
    "DenseFFN",
    "FactoredLayer",
    "InputGatedLayer",
    "Layer",
    "LowRankMixtures",
    "MoELayer",
    "MultiHeadLayer",
    "SampledRows",
    "SequenceLayer",
    "StratifiedLayer",
    "TaughtLayer",
    "adapt",
    "adapter_flops",
    "adapters_of",
    "from_peer_pytorch",
    "scaled_experts",
]
