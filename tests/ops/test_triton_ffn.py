"""Triton's expert feed-forward against the definition in float64: outputs and each expert's gradients.

Without a GPU the kernels run under Triton's interpreter, in tiles of 16; new memory is NaN (see conftest).
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moestro import FFNBank, LinearScore, MoELayer, ScoredRouter, TopP, ops
from moestro.ops import backend, triton_ffn
from moestro.ops.backend import TritonOptions
from tests.ops.triton_cases import DEVICE, Problem, assert_close, outputs_and_gradients, parts, problem, why_not
from tests.tolerances import FLOAT16_NORM, FLOAT32, FLOAT32_NORM

needs_triton = pytest.mark.skipif(bool(why_not()), reason=why_not())
INTERPRETED = DEVICE == "cpu"


def some(n: int, n_tokens: int) -> list[int]:
    """n tokens, some of them more than once where there are too few."""
    return [(7 * i + n) % n_tokens for i in range(n)]


# tokens each expert serves, number of tokens, widths
CASES = {
    "one row": ([[0]], 1, [1]),
    "odd widths, one of 0, one expert without rows": (
        [some(20, 37), [], some(11, 37), some(37, 37)],
        37,
        [7, 5, 0, 37],
    ),
    "all rows to one": ([[], [], some(40, 20)], 20, [8, 16, 24]),
    "no rows": ([[], []], 5, [4, 6]),
    "around the tiles": ([some(1, 40), some(16, 40), some(17, 40), some(33, 40)], 40, [1, 16, 17, 32]),
    "tokens with 0 to 4 experts": ([[t for t in range(15) if t % 5 > e] for e in range(4)], 15, [3, 9, 20, 12]),
    "only experts of width 0": ([[0, 1], [2]], 3, [0, 0]),
}
MIXED = CASES["odd widths, one of 0, one expert without rows"]


@needs_triton
def test_what_these_tests_run_on():
    from moestro.ops.triton_ffn_plan import interpreted

    assert interpreted() == INTERPRETED
    assert torch.empty(3).isnan().all()


@needs_triton
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, gates):
    p = problem(*CASES[case], gates, torch.float32)
    have = outputs_and_gradients("triton", p, "silu")
    assert_close(have, outputs_and_gradients("reference", p, "silu", torch.float64), p, FLOAT32_NORM)


@needs_triton
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "none"])
def test_every_activation(activation, gates):
    p = problem([some(17, 9), [3]], 9, [18, 5], gates, torch.float32)
    have = outputs_and_gradients("triton", p, activation)
    assert_close(have, outputs_and_gradients("reference", p, activation, torch.float64), p, FLOAT32_NORM)


@needs_triton
@pytest.mark.parametrize("gates", [1, 2])
def test_float16(gates):
    p = problem(*MIXED, gates, torch.float16)
    have = outputs_and_gradients("triton", p, "silu")
    assert all(part.dtype == torch.float16 for part in have)
    assert_close(have, outputs_and_gradients("reference", p, "silu", torch.float64), p, FLOAT16_NORM)


@needs_triton
def test_arguments_may_lie_anywhere_in_memory():
    p = problem(*MIXED, 2, torch.float32)
    want = outputs_and_gradients("triton", p, "silu")
    apart = [torch.stack([v, v], 1)[:, 0] if v.ndim == 1 else v.T.contiguous().T for v in p[:6]]
    have = outputs_and_gradients("triton", Problem(*apart, p.widths), "silu")
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@needs_triton
def test_more_experts_than_programs_and_tiles():
    served = [some(e % 3, 10) for e in range(33)]
    p = problem(served, 10, [(5 * e) % 21 for e in range(33)], 2, torch.float32, d=8)
    have = outputs_and_gradients("triton", p, "silu")
    assert_close(have, outputs_and_gradients("reference", p, "silu", torch.float64), p, FLOAT32_NORM)


@needs_triton
def test_two_runs_are_bit_identical_whatever_the_options(monkeypatch):
    from moestro.ops import triton_ffn_plan

    p = problem([some(17, 9), [3], []], 9, [18, 5, 3], 2, torch.float32)
    first = outputs_and_gradients("triton", p, "silu")
    again = [outputs_and_gradients("triton", p, "silu")]
    for options in (TritonOptions(recompute=True), TritonOptions(exact=True)):
        again.append(outputs_and_gradients("triton", p, "silu", options=options))
    monkeypatch.setattr(triton_ffn_plan, "programs", lambda device: 1)
    again.append(outputs_and_gradients("triton", p, "silu"))
    for results in again:
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@needs_triton
def test_what_no_row_needs_is_not_read_into_a_result():
    # expert 1 serves nothing and lies behind expert 0; token 0 is what masked rows would gather
    p = problem([[1, 2, 3], [], [4, 0]], 5, [7, 5, 9], 2, torch.float32)
    clean = parts(outputs_and_gradients("triton", p, "silu"), p)
    p.w_in[14:24] = p.w_out[7:12] = float("nan")
    idle = parts(outputs_and_gradients("triton", p, "silu"), p)
    assert all(torch.equal(idle[key], clean[key]) for key in clean)
    p.x[0] = float("inf")
    dirty = parts(outputs_and_gradients("triton", p, "silu"), p)
    for key in clean:
        if key in ("y", "dx"):
            assert dirty[key][0].isnan().any() and torch.equal(dirty[key][1:], clean[key][1:])
        else:
            assert torch.equal(dirty[key], clean[key]) != key.endswith("expert 2"), key


@needs_triton
@pytest.mark.parametrize("where", ["x", "dy"])
def test_infinities_stay_infinite(where):
    p = problem([[0, 1], [1, 2]], 3, [5, 9], 1, torch.float32)
    leaves = [v.abs().requires_grad_() for v in (p.x, p.weight, p.w_in, p.w_out)]
    dy = torch.ones_like(p.x)
    with torch.no_grad():
        (leaves[0] if where == "x" else dy)[1, 3] = float("inf")

    def run(name):
        with backend.force(name):
            y = ops.expert_ffn(leaves[0], p.token, leaves[1], p.offsets, *leaves[2:], p.widths, "relu")
        return y, *torch.autograd.grad(y, leaves, dy)

    for have, want in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(have, want, equal_nan=True, **FLOAT32)


@needs_triton
def test_backward_may_run_with_other_tiles_and_after_inference():
    from moestro.ops.triton_ffn_plan import choose_blocks
    from moestro.ops.triton_ffn_tuning import _with

    p = problem(*MIXED, 2, torch.float32)
    want = outputs_and_gradients("reference", p, "silu", torch.float64)
    triton_ffn._cached_layout.cache_clear()
    with torch.inference_mode(), backend.force("triton"):
        ops.expert_ffn(p.x, p.token, p.weight, p.offsets, p.w_in, p.w_out, p.widths, "silu")
    leaves = [v.clone().requires_grad_() for v in (p.x, p.weight, p.w_in, p.w_out)]
    with backend.force("triton"):
        y = ops.expert_ffn(leaves[0], p.token, leaves[1], p.offsets, *leaves[2:], p.widths, "silu")
    slope = torch.linspace(-1.5, 1.5, y.numel(), dtype=torch.float64, device=DEVICE).to(y.dtype).view_as(y)
    blocks = choose_blocks(len(p.token), len(p.widths), p.x.shape[1], max(p.widths), p.x.dtype)
    with _with(blocks._replace(rows=2 * blocks.rows, units=2 * blocks.units)):
        y.backward(slope)
    assert_close((y.detach(), *(leaf.grad for leaf in leaves)), want, p, FLOAT32_NORM)


@needs_triton
def test_saves_x_z_and_the_routing_only():
    p = problem([some(20, 10), some(30, 10)], 10, [16, 40], 2, torch.float32)
    inputs = [v.requires_grad_() if v.is_floating_point() else v for v in p[:6]]

    def saved(**options) -> int:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
            with backend.force("triton", TritonOptions(**options)):
                ops.expert_ffn(*inputs, (16, 40), "silu")
        held = {v.data_ptr() for v in (*inputs, triton_ffn._layout((16, 40), p.x.device))}
        return sum(v.numel() for v in kept if v.data_ptr() not in held)

    routing = 50 + 11
    assert saved(recompute=True) == routing
    assert saved(exact=True) == routing + 2 * (20 * 16 + 30 * 40)
    assert saved() == routing + 2 * 50 * 40
    with torch.no_grad():
        assert saved() == 0


@needs_triton
def test_under_autocast_gradients_stay_float32():
    p = problem(*MIXED, 2, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        have = outputs_and_gradients("triton", p, "silu")
    assert have[0].dtype == torch.float16 and all(gradient.dtype == torch.float32 for gradient in have[1:])
    assert_close(have, outputs_and_gradients("reference", p, "silu", torch.float64), p, FLOAT16_NORM)


@needs_triton
def test_under_activation_checkpointing():
    p = problem(*MIXED, 2, torch.float32)
    want = outputs_and_gradients("triton", p, "silu")

    def call(*arguments):
        def again(*arguments):
            with backend.force("triton"):
                return ops.expert_ffn(*arguments)

        return checkpoint(again, *arguments, use_reentrant=False)

    have = outputs_and_gradients("triton", p, "silu", call=call)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@needs_triton
def test_a_layer_with_any_number_of_experts_a_token():
    torch.manual_seed(0)
    widths = [5, 11, 16, 24]
    layer = MoELayer(ScoredRouter(LinearScore(20, 4), TopP(0.5)), [FFNBank(20, widths)]).to(DEVICE)
    x = torch.randn(2, 9, 20, device=DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def run(name):
        layer.zero_grad()
        with backend.force(name):
            y, (trace,) = layer(x)
            y.square().sum().backward()
        return trace.experts_per_token(), [y.detach(), *(v.grad.clone() for v in layer.parameters())]

    (count, have), (_, want) = run("triton"), run("reference")
    assert count.unique().numel() > 1
    for a, b in zip(have, want, strict=True):
        assert (a - b).norm() <= FLOAT32_NORM * b.norm()


@needs_triton
def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="float64, allowed: torch.float32, torch.float16, torch.bfloat16"):
        outputs_and_gradients("triton", problem(*MIXED, 2, torch.float64), "silu")
    with pytest.raises(ValueError, match="activation='swish', allowed: silu, gelu, gelu_tanh, relu, none"):
        outputs_and_gradients("triton", problem(*MIXED, 2, torch.float32), "swish")
    if INTERPRETED:
        with pytest.raises(ValueError, match="bfloat16 under the interpreter"):
            outputs_and_gradients("triton", problem(*MIXED, 2, torch.bfloat16), "silu")
    on_cpu = [v.cpu() if isinstance(v, torch.Tensor) else v for v in problem(*MIXED, 2, torch.float32)]
    monkeypatch.setattr("moestro.ops.triton_ffn_plan.interpreted", lambda: False)
    with pytest.raises(ValueError, match="on cpu, allowed: cuda, or cpu with TRITON_INTERPRET=1"):
        outputs_and_gradients("triton", type(problem(*MIXED, 2, torch.float32))(*on_cpu), "silu")


def test_a_missing_triton_names_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("moestro.ops.triton_ffn_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"pip install 'moestro\[triton\]'"):
        outputs_and_gradients("triton", problem(*MIXED, 2, torch.float32), "silu")


def test_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import moestro, moestro.ops.triton_ffn"
    subprocess.run([sys.executable, "-c", code], check=True)


COMPILED = """
import torch
from moestro import FFNBank, LinearScore, MoELayer, ScoredRouter, TopK, ops
from moestro.ops import backend, triton_ffn
from tests.ops.test_few_rows import FEW
from tests.ops.test_triton_ffn import MIXED
from tests.ops.triton_cases import DEVICE, outputs_and_gradients, problem

torch.set_num_threads(1)
p = problem([[0, 2, 1], [], [3, 0]], 4, [7, 5, 17], 2, torch.float32, d=8)
want = outputs_and_gradients("triton", p, "silu")
layer = MoELayer(ScoredRouter(LinearScore(20, 4), TopK(2)), [FFNBank(20, MIXED[2])]).to(DEVICE)
x = torch.randn(5, 20, device=DEVICE)

def ffn(x, token, weight, offsets, w_in, w_out, widths, activation):
    return ops.expert_ffn(x, token, weight, offsets, w_in, w_out, [7, 5, 17], activation)

for dynamic in (False, True):
    torch._dynamo.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend="{backend}", dynamic=dynamic)
    have = outputs_and_gradients("triton", p, "silu", call=compiled)
    if not all(torch.equal(a, b) for a, b in zip(have, want, strict=True)):
        raise SystemExit("compiled and eager differ")
    with backend.force("triton"):
        y = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="{backend}", dynamic=dynamic)(x)
        torch.testing.assert_close(y, layer(x)[0])
widths = [(5 * e) % 21 + 1 for e in range(33)]
few = MoELayer(ScoredRouter(LinearScore(20, 33), TopK(2)), [FFNBank(20, widths)]).to(DEVICE)
with torch.no_grad(), backend.force("triton", FEW):
    y = torch.compile(lambda x: few(x)[0], fullgraph=True, backend="{backend}")(x[:2])
    torch.testing.assert_close(y, few(x[:2])[0], rtol=0, atol=0)
widths = tuple(p.widths)
size = sum(n * ((w + 7) // 8 * 8) for n, w in zip(p.offsets.diff().tolist(), widths))
x, weight, w_in, w_out = (v.requires_grad_() for v in (p.x, p.weight, p.w_in, p.w_out))
known = size, 17, "silu", True, 0
arguments = (x, p.token, weight, p.offsets, triton_ffn._layout(widths, x.device), w_in, w_out, *known)
torch.library.opcheck(torch.ops.moestro.triton_expert_ffn.default, arguments)
"""


@needs_triton
@pytest.mark.parametrize("how", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph_in_a_process_of_its_own(how):
    done = subprocess.run(
        [sys.executable, "-c", COMPILED.replace("{backend}", how)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
def test_kernels_start_where_their_tensors_are(monkeypatch):
    from moestro.ops.triton_ffn_plan import launch

    seen = []
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: seen.append(index) or nullcontext())
    kernel = {(3,): lambda *arguments, **constants: seen.append((arguments[1:], constants))}
    launch(kernel, 3, SimpleNamespace(device=torch.device("cuda", 1)), 7, BLOCK=16)
    assert seen == [1, ((7,), {"BLOCK": 16})]
