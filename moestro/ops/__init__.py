"""Floor 0: pure functions on tensors. Each has a plain definition in `reference` and may have a faster twin."""

from moestro.ops.entmax import entmax15
from moestro.ops.few_rows import few_rows_ffn, skips_sorting
from moestro.ops.ffn import expert_ffn
from moestro.ops.precision import linear_fp32
from moestro.ops.product_key import product_key_topk
from moestro.ops.ragged import ragged_experts
from moestro.ops.singleton import singleton_experts, value_rows

__all__ = [
    "entmax15",
    "expert_ffn",
    "few_rows_ffn",
    "linear_fp32",
    "product_key_topk",
    "ragged_experts",
    "singleton_experts",
    "skips_sorting",
    "value_rows",
]
