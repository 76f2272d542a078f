"""The vocabulary: every part under its recipe name. Slots are constructors' keywords; a new part is one line here."""

from collections.abc import Callable
from typing import Any

from moestro.data import (
    BPETokenizer,
    ByteTokenizer,
    FileTokenizer,
    HubSource,
    JsonlSource,
    ParquetSource,
    StdlibSource,
    TextSource,
)
from moestro.experts import (
    ClampedBank,
    ConstantBank,
    CopyBank,
    CPBank,
    FFNBank,
    GLUSingletonBank,
    HyperExpert,
    HyperGenerator,
    MixedBank,
    MPOBank,
    QuantizedBank,
    RaggedBank,
    SharedExpert,
    SingletonBank,
    StackedBank,
    TensorRingBank,
    TuckerBank,
    ValueBank,
    widths,
)
from moestro.experts.parity import multi_head
from moestro.layers import (
    ActiveRows,
    AllRows,
    DenseFFN,
    FactoredLayer,
    InputGatedLayer,
    MoELayer,
    MultiHeadLayer,
    SampledRows,
    SequenceLayer,
    StratifiedLayer,
)
from moestro.objectives import (
    ClusterVariance,
    FirstChoiceBalance,
    GateBalance,
    GateEfficiency,
    GateL1,
    GroupPenalty,
    IntraGroupBalance,
    LoadBalance,
    MutualDistillation,
    ParameterPenalty,
    RetrievedParameterPenalty,
    RouterDiversity,
    RouterEntropy,
    RouterSimplicity,
    RouterZLoss,
    WeightedBalance,
)
from moestro.recipe.shared_banks import shared_bank, shared_generator
from moestro.routers import (
    AffineScore,
    BiasedRouter,
    Capacity,
    CosineScore,
    ExpertChoice,
    GroupedRouter,
    LinearScore,
    LowRankCosineScore,
    ModesRouter,
    MutedTopK,
    NoisyScore,
    ProductKeyRouter,
    ReLU,
    ResidualRouter,
    SampledSecond,
    ScoredRouter,
    SlotRouter,
    Soft,
    SoftmaxOfChosen,
    SparseMixer,
    SteeredTopP,
    TopAny,
    TopK,
    TopP,
)
from moestro.train.adaptive_experts import AdaptiveExperts
from moestro.train.central_mask import CentralMask
from moestro.train.expert_dropout import ExpertDropout
from moestro.train.gate_sparsity import GateSparsity
from moestro.train.rules import BiasBalance
from moestro.train.schedules import WSD, Constant, Cosine
from moestro.train.steer_threshold import SteerThreshold

SOURCES: dict[str, Callable[..., Any]] = {
    "stdlib": StdlibSource,
    "text": TextSource,
    "jsonl": JsonlSource,
    "parquet": ParquetSource,
    "hub": HubSource,
}

BANKS: dict[str, Callable[..., Any]] = {
    "ffn": FFNBank,
    "stacked": StackedBank,
    "clamped": ClampedBank,
    "singleton": SingletonBank,
    "glu_singleton": GLUSingletonBank,
    "value": ValueBank,
    "ragged": RaggedBank,
    "quantized_singleton": QuantizedBank,
    "copy": CopyBank,
    "constant": ConstantBank,
    "cp": CPBank,
    "tensor_ring": TensorRingBank,
    "tucker": TuckerBank,
    "mpo": MPOBank,
}

LAYERS: dict[str, Callable[..., Any]] = {
    "dense": DenseFFN,
    "moe": MoELayer,
    "sequence": SequenceLayer,
    "input_gated": InputGatedLayer,
    "stratified": StratifiedLayer,
    "multi_head": MultiHeadLayer,
    "factored": FactoredLayer,
}

PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    # model
    "ffn": LAYERS,
    "sublayers": LAYERS,
    "layer": LAYERS,
    "router": {
        "scored": ScoredRouter,
        "biased": BiasedRouter,
        "residual": ResidualRouter,
        "grouped": GroupedRouter,
        "product_key": ProductKeyRouter,
        "modes": ModesRouter,
        "slots": SlotRouter,
    },
    "score": {
        "linear": LinearScore,
        "affine": AffineScore,
        "noisy": NoisyScore,
        "cosine": CosineScore,
        "low_rank_cosine": LowRankCosineScore,
    },
    "select": {
        "top_k": TopK,
        "muted_top_k": MutedTopK,
        "softmax_of_chosen": SoftmaxOfChosen,
        "sparse_mixer": SparseMixer,
        "top_p": TopP,
        "steered_top_p": SteeredTopP,
        "top_any": TopAny,
        "sampled_second": SampledSecond,
        "soft": Soft,
        "capacity": Capacity,
        "expert_choice": ExpertChoice,
        "relu": ReLU,
    },
    "branches": {**BANKS, "mixed": MixedBank, "shared": SharedExpert, "shared_bank": shared_bank, "hyper": HyperExpert},
    "banks": BANKS,
    "shared_part": {**BANKS, "hyper_generator": HyperGenerator},
    "generator": {"shared": shared_generator},
    "record": {"active": ActiveRows, "all": AllRows, "sampled": SampledRows},
    "widths": {
        "equal": widths.equal,
        "arithmetic": widths.arithmetic,
        "geometric": widths.geometric,
        "hybrid": widths.hybrid,
        "pairs": widths.pairs,
        "groups": widths.groups,
        "ratios": widths.from_ratios,
        "multi_head": multi_head,
    },
    # data
    "source": SOURCES,
    "val_source": SOURCES,
    "tokenizer": {"bytes": ByteTokenizer, "bpe": BPETokenizer, "file": FileTokenizer},
    # training
    "objectives": {
        "load_balance": LoadBalance,
        "weighted_balance": WeightedBalance,
        "first_choice_balance": FirstChoiceBalance,
        "cluster_variance": ClusterVariance,
        "gate_l1": GateL1,
        "mutual_distillation": MutualDistillation,
        "parameter_penalty": ParameterPenalty,
        "group_penalty": GroupPenalty,
        "intra_group_balance": IntraGroupBalance,
        "retrieved_parameter_penalty": RetrievedParameterPenalty,
        "router_entropy": RouterEntropy,
        "router_z_loss": RouterZLoss,
        "router_diversity": RouterDiversity,
        "router_simplicity": RouterSimplicity,
        "gate_balance": GateBalance,
        "gate_efficiency": GateEfficiency,
    },
    "rules": {
        "adaptive_experts": AdaptiveExperts,
        "bias_balance": BiasBalance,
        "central_mask": CentralMask,
        "expert_dropout": ExpertDropout,
        "gate_sparsity": GateSparsity,
        "steer_threshold": SteerThreshold,
    },
    "schedule": {"constant": Constant, "cosine": Cosine, "wsd": WSD},
}
