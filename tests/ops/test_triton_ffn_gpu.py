"""Triton's expert feed-forward where it is meant to run: bfloat16, full sizes, no host synchronisation, CUDA graphs."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from moestro import FFNBank, LinearScore, MoELayer, ScoredRouter, TopK, ops
from moestro.ops import backend
from moestro.ops.backend import TritonOptions
from tests.ops.test_triton_ffn import COMPILED
from tests.ops.triton_cases import DEVICE, Problem, assert_close, outputs_and_gradients, parts, problem
from tests.tolerances import BFLOAT16_NORM, FLOAT16_NORM, FLOAT32_NORM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="no triton: pip install 'moestro[triton]'"),
]
TOLERANCE = {torch.float32: FLOAT32_NORM, torch.float16: FLOAT16_NORM, torch.bfloat16: BFLOAT16_NORM}


def routed(n_tokens: int, n_experts: int, top_k: int, skew: float) -> list[list[int]]:
    """Tokens of every expert: each token has `top_k` different ones, drawn with weights 1 / (rank + 1)^skew."""
    draw = random.Random(0)
    served: list[list[int]] = [[] for _ in range(n_experts)]
    weights = [(rank + 1) ** -skew for rank in range(n_experts)]
    for token in range(n_tokens):
        keys = sorted(range(n_experts), key=lambda e: -(draw.random() ** (1 / weights[e])))
        for e in keys[:top_k]:
            served[e].append(token)
    return served


def of_any_width(n_experts: int, d: int, n_tokens: int, skew: float, dtype: torch.dtype) -> Problem:
    widths = [1 + (e * 211) % 1003 for e in range(n_experts)]
    return problem(routed(n_tokens, n_experts, 4, skew), n_tokens, widths, 2, dtype, d=d)


@contextmanager
def no_waiting() -> Iterator[None]:
    """The host must not wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a call, and what every replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def uneven_layer() -> tuple[MoELayer, torch.Tensor]:
    """A whole top-2 layer of unequal experts, one of them of width 0, and tokens for it."""
    torch.manual_seed(0)
    widths = [96, 100, 33, 1, 256, 640, 0, 8]
    layer = MoELayer(ScoredRouter(LinearScore(200, 8, init_std=0.3), TopK(2)), [FFNBank(200, widths)])
    return layer.to(DEVICE, torch.bfloat16), torch.randn(777, 200).to(DEVICE, torch.bfloat16).requires_grad_()


@pytest.mark.parametrize("skew", [0.0, 1.5])
@pytest.mark.parametrize("d", [512, 1000, 333])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_equals_the_definition_at_full_size(dtype, d, skew):
    p = of_any_width(24, d, 3000, skew, dtype)
    have = outputs_and_gradients("triton", p, "silu")
    assert_close(have, outputs_and_gradients("reference", p, "silu", torch.float64), p, TOLERANCE[dtype])


def test_bfloat16_is_about_as_close_as_the_plain_torch_path():
    p = of_any_width(24, 512, 3000, 1.0, torch.bfloat16)
    want = parts(outputs_and_gradients("reference", p, "silu", torch.float64), p)
    triton, fused = (parts(outputs_and_gradients(name, p, "silu"), p) for name in ("triton", "fused"))
    for key, exact in want.items():
        error, usual = ((found[key].double() - exact).norm() for found in (triton, fused))
        assert error <= 1.5 * usual + 1e-12, key


@pytest.mark.parametrize("n_tokens", [1, 4, 32])
def test_few_tokens(n_tokens):
    p = of_any_width(16, 512, n_tokens, 0.0, torch.bfloat16)
    have = outputs_and_gradients("triton", p, "gelu")
    assert_close(have, outputs_and_gradients("reference", p, "gelu", torch.float64), p, BFLOAT16_NORM)


def test_runs_are_bit_identical():
    p = of_any_width(24, 512, 3000, 1.0, torch.bfloat16)
    first, *others = [outputs_and_gradients("triton", p, "silu") for _ in range(5)]
    again = outputs_and_gradients("triton", p, "silu", options=TritonOptions(recompute=True))
    for results in (*others, again):
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_the_host_does_not_wait():
    p = of_any_width(24, 512, 3000, 1.0, torch.bfloat16)
    leaves = [v.requires_grad_() for v in (p.x, p.weight, p.w_in, p.w_out)]
    dy = torch.randn_like(p.x)

    def step() -> None:
        with backend.force("triton"):
            ops.expert_ffn(p.x, p.token, p.weight, p.offsets, p.w_in, p.w_out, p.widths, "silu").backward(dy)

    # the first run compiles the kernels and copies the widths, for which it may wait
    step()
    with no_waiting():
        step()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_runs_in_a_cuda_graph_with_another_routing():
    p = of_any_width(16, 512, 1024, 0.0, torch.bfloat16)
    other = of_any_width(16, 512, 1024, 2.0, torch.bfloat16)
    token, offsets = p.token.clone(), p.offsets.clone()

    def run() -> torch.Tensor:
        with torch.no_grad(), backend.force("triton"):
            return ops.expert_ffn(p.x, token, p.weight, offsets, p.w_in, p.w_out, p.widths, "silu")

    graph, y = captured(run)
    for routing in (p, other, p):
        token.copy_(routing.token)
        offsets.copy_(routing.offsets)
        graph.replay()
        assert torch.equal(y, run())


def test_a_layer_trains_without_waiting_and_in_a_cuda_graph():
    """Router, order of rows and experts, forward and backward, with routings that only the replay knows."""
    torch.use_deterministic_algorithms(False)
    layer, x = uneven_layer()
    leaves = [x, *layer.parameters()]

    def step() -> list[torch.Tensor]:
        with backend.force("triton"):
            y, _ = layer(x)
            return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    step()
    with no_waiting():
        step()
    graph, results = captured(step)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for found, wanted in zip(results, step(), strict=True):
            assert (found - wanted).float().norm() <= BFLOAT16_NORM * wanted.float().norm()


GRAPHS = """
import torch
from moestro.ops import backend
from tests.ops.test_triton_ffn_gpu import uneven_layer

layer, x = uneven_layer()
with backend.force("triton"):
    wanted = layer(x)[0]
    (slope,) = torch.autograd.grad(wanted.float().square().sum(), x)
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, mode=mode)
        # the third call replays what the second recorded
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x)
            have = y.clone(), *torch.autograd.grad(y.float().square().sum(), x)
        for found, exact in zip(have, (wanted, slope), strict=True):
            if not (found - exact).float().norm() <= TOLERANCE * exact.float().norm():
                raise SystemExit(f"compiled ({mode}) and eager differ")
"""


@pytest.mark.parametrize(
    "script",
    [COMPILED.replace("{backend}", "inductor"), GRAPHS.replace("TOLERANCE", str(BFLOAT16_NORM))],
    ids=["op", "layer"],
)
def test_compiles_as_one_graph(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]


def test_more_elements_than_int32_counts():
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    n_tokens, width = 70_000, 16_000
    p = problem([list(range(n_tokens))], n_tokens, [width], 2, torch.bfloat16, d=64)
    assert 2 * n_tokens * width > 2**31
    want = parts(outputs_and_gradients("fused", p, "silu"), p)
    have = parts(outputs_and_gradients("triton", p, "silu"), p)
    for key, usual in want.items():
        assert (have[key].double() - usual.double()).norm() <= BFLOAT16_NORM * usual.double().norm(), key
    last = slice(n_tokens - 100, n_tokens)
    for key in ("y", "dx"):
        assert (have[key][last] - want[key][last]).float().norm() <= BFLOAT16_NORM * want[key][last].float().norm()


def test_a_crowded_expert_in_parts():
    p = of_any_width(64, 512, 3000, 2.5, torch.bfloat16)
    assert p.offsets.diff().max() > 4 * len(p.token) / 64
    have = outputs_and_gradients("triton", p, "silu", options=TritonOptions(split=True))
    assert_close(have, outputs_and_gradients("reference", p, "silu", torch.float64), p, BFLOAT16_NORM)


def test_few_rows_in_a_cuda_graph():
    p = of_any_width(64, 512, 4, 0.0, torch.bfloat16)
    expert = torch.repeat_interleave(torch.arange(64, device="cuda"), p.offsets.diff())
    arguments = (p.x, p.token, expert, p.weight, p.w_in, p.w_out, p.widths, "silu")

    def run() -> torch.Tensor:
        with torch.no_grad(), backend.force("triton", TritonOptions(few_rows=True)):
            return ops.few_rows_ffn(*arguments)

    first = run()
    graph, y = captured(run)
    graph.replay()
    want = outputs_and_gradients("reference", p, "silu", torch.float64)[0]
    assert torch.equal(y, first) and (y.double() - want).norm() <= BFLOAT16_NORM * want.norm()
