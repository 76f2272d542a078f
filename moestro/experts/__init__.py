"""Floor 2: what experts compute and how their weights are stored. Experts do not know who routed to them."""

from moestro.experts.base import ExpertBank
from moestro.experts.biased_ffn import BiasedFFNBank
from moestro.experts.cp import CPBank
from moestro.experts.dense_mlp import DenseMatrices, DenseMLP
from moestro.experts.factored import FactoredBank
from moestro.experts.ffn import FFNBank
from moestro.experts.free_adapters import FreeAdapters
from moestro.experts.hyper import HyperExpert, HyperGenerator
from moestro.experts.linears import ConcatLinear, ExpertLinear
from moestro.experts.low_rank import LowRankBank
from moestro.experts.mixed import MixedBank
from moestro.experts.mpo import MPOBank, MPOLinear
from moestro.experts.quantized import QuantizedBank, quantize_banks, quantized
from moestro.experts.ragged import RaggedBank
from moestro.experts.shared import OutputBias, SharedExpert
from moestro.experts.singleton import GLUSingletonBank, SingletonBank
from moestro.experts.slices import BankSlice
from moestro.experts.split import split_ffn
from moestro.experts.stacked import ClampedBank, StackedBank
from moestro.experts.tables import TableBank
from moestro.experts.tensor_ring import TensorRingBank
from moestro.experts.tucker import TuckerBank
from moestro.experts.values import ValueBank
from moestro.experts.zero_compute import ConstantBank, CopyBank

__all__ = [
    "BankSlice",
    "BiasedFFNBank",
    "CPBank",
    "ClampedBank",
    "ConcatLinear",
    "ConstantBank",
    "CopyBank",
    "DenseMLP",
    "DenseMatrices",
    "ExpertBank",
    "ExpertLinear",
    "FFNBank",
    "FactoredBank",
    "FreeAdapters",
    "GLUSingletonBank",
    "HyperExpert",
    "HyperGenerator",
    "LowRankBank",
    "MPOBank",
    "MPOLinear",
    "MixedBank",
    "OutputBias",
    "QuantizedBank",
    "RaggedBank",
    "SharedExpert",
    "SingletonBank",
    "StackedBank",
    "TableBank",
    "TensorRingBank",
    "TuckerBank",
    "ValueBank",
    "quantize_banks",
    "quantized",
    "split_ffn",
]
