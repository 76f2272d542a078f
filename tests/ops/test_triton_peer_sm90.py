"""PEER's Triton kernels compile for an H100 or H200 where there is none, in every dtype, at the sizes they run with."""

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
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moestro.ops import triton_peer_keys as keys, triton_peer_rows as rows, triton_peer_adamw as adamw

d, half, k, dtype, mode, activation = json.loads('ARGUMENTS')
size, held = rows.sizes(d), keys.sizes(half, k)
data = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int8": "*i8", "fp8": "*u8"}[dtype]
in_codes = dtype in ("int8", "fp8")
most = rows.power_of_two(max(2, k))
numbers = ("ids", "order", "starts", "ends", "token", "segment", "after", "parts", "slot", "busiest")
types = dict.fromkeys(numbers, "*i64") | dict.fromkeys(("place", "steps"), "*i32")
wide = ("query", "best", "scores", "z", "linear", "dz", "dlinear", "coefficient", "partial", "weight")
wide += ("dweight", "gate_scale", "up_scale", "down_scale", "scale")
wide += ("x", "y", "dy", "dx", "source", "out", "keys", "dquery") if in_codes else ()
types |= dict.fromkeys(wide, "*fp32") | {"eps": "fp32"}
types |= dict.fromkeys(("k", "n", "g", "h", "f", "rows", "n_steps"), "i32")
pairs = sum((p + 1) * (r + 1) <= k for p in range(k) for r in range(k))
shapes = {"d": d, "half": half, "KP": most, "PART": 256, "MODE": mode, "ACT": activation, "SCALED": in_codes}
of_rows = shapes | {"BR": size.rows, "BD": size.columns}
of_keys = shapes | {"BT": held.queries, "BN": held.keys, "BH": held.inner}
of_pairs = shapes | {"BT": held.paired, "BS": max(most, rows.power_of_two(pairs)), "GATE": 1}
largest = {"int8": 127.0, "fp8": 448.0}.get(dtype, 0.0)
of_steps = of_rows | {"LARGEST": largest, "FACTORED": mode > 0, "WAIT": mode == 1, "SLOW": True}
bits = {"bfloat16": "*i16", "int8": "*i8", "fp8": "*u8"}
types |= {"table": bits.get(dtype, "*fp32"), "mean": "*i16" if dtype in bits else "*fp32"}
types |= dict.fromkeys(("square", "decay", "step_size", "correction", "idle_mean", "idle_square"), "*fp32")
types |= dict.fromkeys(("rate", "beta2", "rate2"), "fp32") | dict.fromkeys(("table_key", "mean_key"), "i32")
of_queries = shapes | {"NORM": True, "BF": 16, "BD": min(256, max(16, rows.power_of_two(d)))}
kernels = [
    (rows._forward_kernel, of_rows, size.warps), (rows._backward_kernel, of_rows, size.warps),
    (rows._parts_kernel, of_rows, size.warps), (rows._whole_kernel, of_rows, size.warps),
    (keys._side_kernel, of_keys, 4), (keys._pair_kernel, of_pairs, 4),
    (keys._query_kernel, of_queries, 4), (adamw._adamw_kernel, of_steps, size.warps),
]
for kernel, known, warps in kernels:
    names = kernel.arg_names
    used = {name: known[name] for name in names if name in known}
    signature = {name: "constexpr" if name in used else types.get(name, data) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = made.asm["ptx"]
    print(json.dumps({
        "kernel": kernel.__name__, "shared": made.metadata.shared, "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "binary": len(made.asm["cubin"]), "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4", ptx)),
        "products": len(re.findall(r"(?:mma\.sync|wgmma)", ptx)),
    }))
"""
# d, half, k, dtype of the tables, kind of row, activation
CASES = {
    "the paper's, bfloat16": (768, 128, 16, "bfloat16", 1, "gelu"),
    "wide and gated, float16": (2048, 64, 8, "float16", 2, "silu"),
    "odd, float32": (1000, 24, 5, "float32", 1, "relu"),
    "tiny values": (13, 3, 1, "bfloat16", 0, "none"),
    "the paper's, int8": (768, 128, 16, "int8", 1, "gelu"),
    "gated, fp8": (1024, 128, 16, "fp8", 2, "silu"),
}
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
    made = {kernel["kernel"]: kernel for kernel in map(json.loads, done.stdout.splitlines())}
    assert len(made) == 8 and all(kernel["binary"] for kernel in made.values())
    assert not any(kernel["atomics"] for kernel in made.values())
    assert max(kernel["shared"] for kernel in made.values()) <= SHARED_MEMORY
    # rows are fetched in pieces of 16 bytes where their width lets them be, and keys meet queries on tensor cores
    if CASES[case][0] % 8 == 0:
        assert made["_forward_kernel"]["wide_loads"] and made["_backward_kernel"]["wide_loads"]
    assert made["_side_kernel"]["products"]
