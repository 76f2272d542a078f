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
    ConstantBank,
    CopyBank,
    FFNBank,
    GLUSingletonBank,
    MixedBank,
    RaggedBank,
    SharedExpert,
    SingletonBank,
    ValueBank,
    widths,
)
from moestro.layers import DenseFFN, MoELayer
from moestro.objectives import (
    GateBalance,
    GateEfficiency,
    LoadBalance,
    ParameterPenalty,
    RetrievedParameterPenalty,
    RouterDiversity,
    RouterEntropy,
    RouterSimplicity,
    RouterZLoss,
    WeightedBalance,
)
from moestro.routers import (
    BiasedRouter,
    CosineScore,
    LinearScore,
    MutedTopK,
    ProductKeyRouter,
    ResidualRouter,
    ScoredRouter,
    SlotRouter,
    Soft,
    TopAny,
    TopK,
    TopP,
)
from moestro.train.rules import BiasBalance
from moestro.train.schedules import WSD, Constant, Cosine

SOURCES: dict[str, Callable[..., Any]] = {
    "stdlib": StdlibSource,
    "text": TextSource,
    "jsonl": JsonlSource,
    "parquet": ParquetSource,
    "hub": HubSource,
}

BANKS: dict[str, Callable[..., Any]] = {
    "ffn": FFNBank,
    "singleton": SingletonBank,
    "glu_singleton": GLUSingletonBank,
    "value": ValueBank,
    "ragged": RaggedBank,
    "copy": CopyBank,
    "constant": ConstantBank,
}

PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    # model
    "ffn": {"dense": DenseFFN, "moe": MoELayer},
    "router": {
        "scored": ScoredRouter,
        "biased": BiasedRouter,
        "residual": ResidualRouter,
        "product_key": ProductKeyRouter,
        "slots": SlotRouter,
    },
    "score": {"linear": LinearScore, "cosine": CosineScore},
    "select": {"top_k": TopK, "muted_top_k": MutedTopK, "top_p": TopP, "top_any": TopAny, "soft": Soft},
    "branches": {**BANKS, "mixed": MixedBank, "shared": SharedExpert},
    "banks": BANKS,
    "widths": {
        "equal": widths.equal,
        "arithmetic": widths.arithmetic,
        "geometric": widths.geometric,
        "hybrid": widths.hybrid,
        "pairs": widths.pairs,
        "groups": widths.groups,
        "ratios": widths.from_ratios,
    },
    # data
    "source": SOURCES,
    "val_source": SOURCES,
    "tokenizer": {"bytes": ByteTokenizer, "bpe": BPETokenizer, "file": FileTokenizer},
    # training
    "objectives": {
        "load_balance": LoadBalance,
        "weighted_balance": WeightedBalance,
        "parameter_penalty": ParameterPenalty,
        "retrieved_parameter_penalty": RetrievedParameterPenalty,
        "router_entropy": RouterEntropy,
        "router_z_loss": RouterZLoss,
        "router_diversity": RouterDiversity,
        "router_simplicity": RouterSimplicity,
        "gate_balance": GateBalance,
        "gate_efficiency": GateEfficiency,
    },
    "rules": {"bias_balance": BiasBalance},
    "schedule": {"constant": Constant, "cosine": Cosine, "wsd": WSD},
}
