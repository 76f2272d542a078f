"""Triton's kernels compile for an H100 or H200 where there is none, in every dtype and at the sizes they run with.

The interpreter computes bfloat16 wrongly and knows no registers; the compiler knows both without a device.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="no triton: pip install 'moestro[triton]'"),
]

COMPILE = r"""
import json
import re
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moestro.ops import triton_ffn_backward as backward, triton_ffn_few as few
from moestro.ops import triton_ffn_forward as forward, triton_ffn_plan as plan

rows, experts, d, widest, dtype, gates, activation, precision = json.loads('ARGUMENTS')
blocks = plan.choose_blocks(rows, experts, d, widest, getattr(torch, dtype))
data = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[dtype]
numbers = ("token", "plan", "order", "starts", "offsets", "experts", "busiest_first", "expert", "units")
types = dict.fromkeys(numbers, "*i64") | {"partial": "*fp32", "work": "*fp32"}
types |= dict.fromkeys(("n_experts", "n_partial", "n_rows", "widest", "parts", "split"), "i32")
constants = {
    "d": d, "GATES": gates, "ACT": activation, "PRECISION": precision, "GROUP": 8, "SAVE_Z": True, "SAVE_HIDDEN": True,
    "SPLITS": True,
    "STEPS": plan.search_steps(experts), "WEIGHTED": True, "BM": blocks.rows, "BU": blocks.units, "BD": blocks.model,
    "BK": blocks.inner, "BLOCK": triton.next_power_of_2(experts + 1),
}
size = few.sizes()
counts = {"n_experts": experts, "n_partial": -(-widest // blocks.units), "parts": -(-widest // size.split)}
# a number that is 1 becomes a constant, as when kernels are launched
constants |= {name: 1 for name, n in (counts | {"n_rows": rows, "widest": widest}).items() if n == 1}
row, weight = blocks.row_options(), blocks.weight_options()
kernels = [
    (plan._plan_kernel, {}), (forward._up_kernel, row), (forward._down_kernel, row), (forward._combine_kernel, {}),
    (backward._hidden_gradients_kernel, row), (backward._weight_gradients_kernel, weight),
    (backward._sum_parts_kernel, {}),
]
few_constants = constants | {"BU": size.up_units, "BK": size.up_columns, "BD": size.down_columns, "SPLIT": size.split}
decoding = [few._few_up_kernel, few._few_down_kernel, few._few_combine_kernel]
for kernel, options in kernels + [(kernel, {}) for kernel in decoding]:
    names = kernel.arg_names
    known = few_constants if kernel in decoding else constants
    used = {name: known[name] for name in names if name in known}
    signature = {name: "constexpr" if name in used else types.get(name, data) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    print(json.dumps({
        "kernel": kernel.__name__, "shared": made.metadata.shared, "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"), "binary": len(made.asm["cubin"]),
        "copies": len(re.findall(r"cp\.async\.\w+\.shared\.global [^;]*, 0x10[,;]", ptx)),
    }))
"""
# rows, experts, d, widest, dtype, gates, activation, precision
CASES = {
    "large, bfloat16": (131072, 64, 2048, 1280, "bfloat16", 2, "silu", "ieee"),
    "d of 1000, float16": (8192, 60, 1000, 97, "float16", 1, "gelu", "ieee"),
    "decoding, bfloat16": (64, 64, 2048, 1280, "bfloat16", 2, "gelu", "ieee"),
    "float32": (131072, 64, 768, 1280, "float32", 2, "relu", "ieee"),
    "float32 as TF32": (131072, 64, 768, 1280, "float32", 2, "none", "tf32"),
    "tiny and odd": (100, 1, 13, 7, "float16", 2, "silu", "ieee"),
    "one row of one unit": (1, 1, 8, 1, "bfloat16", 2, "silu", "ieee"),
}
# kernels of products of matrices
PRODUCTS = ("_up_kernel", "_down_kernel", "_hidden_gradients_kernel", "_weight_gradients_kernel")
# what one block may use, in bytes: 227 KiB
SHARED_MEMORY = 232_448


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_sm90(case, tmp_path):
    code = COMPILE.replace("ARGUMENTS", json.dumps(CASES[case]))
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[2])
    environment = clean | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(made) == 10 and all(kernel["binary"] for kernel in made)
    assert not any(kernel["atomics"] for kernel in made)
    assert max(kernel["shared"] for kernel in made) <= SHARED_MEMORY
    products = [kernel for kernel in made if kernel["kernel"] in PRODUCTS]
    # rows of 16-bit numbers start at 16 bytes where d is a multiple of 8, and are fetched in pieces of 16
    if CASES[case][2] % 8 == 0 and CASES[case][4] != "float32":
        assert all(kernel["copies"] for kernel in products)
    if case.startswith("large"):
        assert all(kernel["wgmma"] for kernel in products)
