"""PEER's Triton kernels where they are meant to run: bfloat16, full sizes, more than 2^31 numbers, no waiting."""

from importlib.util import find_spec

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moestro import ops
from moestro.experts import SingletonBank
from moestro.layers import MoELayer
from moestro.ops import backend
from moestro.ops.quantized import CODES
from moestro.routers import ProductKeyRouter
from moestro.routers.query_norm import BatchQueryNorm
from tests.ops.test_triton_ffn_gpu import no_waiting
from tests.ops.test_triton_peer import arguments, assert_near, neurons, retrieved
from tests.ops.test_triton_peer_quantized import run as quantized_run
from tests.tolerances import BFLOAT16_NORM, FLOAT16_NORM, FLOAT32_NORM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="no triton: pip install 'moestro[triton]'"),
]
TOLERANCE = {torch.float32: FLOAT32_NORM, torch.float16: FLOAT16_NORM, torch.bfloat16: BFLOAT16_NORM}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("d", [512, 1000, 333])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_neurons_equal_the_definition_at_full_size(dtype, d, gated):
    call = arguments(1024, 64, 128**2, d, gated, dtype)
    have = neurons("triton", call, "gelu", sparse=True)
    assert_near(have, neurons("reference", call, "gelu", dtype=torch.float64), TOLERANCE[dtype])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("d", [512, 1000, 333])
@pytest.mark.parametrize("storage", list(CODES))
def test_tables_in_8_bits_equal_the_definition_at_full_size(storage, d, gated):
    call = arguments(1024, 64, 128**2, d, gated, torch.float32)
    have = quantized_run("triton", call, storage, "gelu")
    assert_near(have, quantized_run("fused", call, storage, "gelu", torch.float64), FLOAT32_NORM)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("side", "k", "half"), [(1024, 16, 128), (512, 32, 64), (100, 5, 24)])
def test_retrieval_equals_the_definition_at_full_size(side, k, half, shared):
    draw = torch.Generator().manual_seed(side)
    query = torch.randn(64, 8, 2 * half, generator=draw, dtype=torch.float64).cuda()
    keys = torch.randn(2, 1 if shared else 8, side, half, generator=draw, dtype=torch.float64).cuda()
    have_ids, have = retrieved("triton", query, keys, k, torch.float32)
    want_ids, want = retrieved("reference", query, keys, k, torch.float64)
    # float32 may order scores that differ in their last bits the other way
    assert (have_ids == want_ids).double().mean() > 0.999
    assert_near(have[:1], want[:1], 10 * FLOAT32_NORM)


def test_runs_are_bit_identical_with_rows_that_most_tokens_meet():
    call = arguments(4096, 64, 64, 512, True, torch.bfloat16)
    first, *others = [neurons("triton", call, "silu", sparse=True) for _ in range(4)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_tables_of_more_than_two_billion_numbers():
    n, d = 2**21 + 1, 1024
    up, down = (torch.empty(n, d, dtype=torch.bfloat16, device="cuda").normal_(std=d**-0.5) for _ in range(2))
    ids = torch.tensor([[0, n - 1, n // 2, n - 1]], device="cuda")
    x, weight = torch.randn(1, d, device="cuda"), torch.rand(1, 4, device="cuda")
    tables = [table.requires_grad_() for table in (up, down)]
    with backend.force("triton"):
        y = ops.singleton_experts(x, ids, weight, *tables, "gelu", True)
    y.sum().backward()
    hidden = torch.nn.functional.gelu((up[ids[0]].double() * x.double()).sum(-1)) * weight[0].double()
    assert_near([y[0]], [(hidden[:, None] * down[ids[0]].double()).sum(0)], BFLOAT16_NORM)
    assert up.grad._indices()[0].tolist() == [0, n // 2, n - 1]


def test_the_host_does_not_wait():
    call = arguments(256, 64, 128**2, 512, False, torch.bfloat16)
    keys, query = torch.randn(2, 1, 128, 64, device="cuda"), torch.randn(256, 8, 128, device="cuda")
    for _ in range(2):  # the first calls compile
        with torch.no_grad(), backend.force("triton"), no_waiting():
            ops.product_key_topk(query, keys, 16)
            ops.singleton_experts(call[0], call[1], call[2], *call[3], "gelu")


def test_one_token_takes_four_kernels_and_the_host_does_not_wait():
    router = ProductKeyRouter(512, 128**2, 8, 16, 128)
    assert isinstance(router.query_norm, BatchQueryNorm)
    router.query_norm.update(torch.zeros(1024), torch.ones(1024))
    layer = MoELayer(router, [SingletonBank(512, 128**2)]).to("cuda", torch.bfloat16).eval()
    x = torch.randn(1, 1, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), backend.force("triton"):
        layer(x)  # compiles, and asks whether there are statistics
        with no_waiting():
            layer(x)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            layer(x)
            torch.cuda.synchronize()
    kernels = [event.name for event in seen.events() or () if "CUDA" in str(event.device_type)]
    assert len(kernels) == 4, kernels
