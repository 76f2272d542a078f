"""The fused expert feed-forward against its definition: outputs and every gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moestro import ops
from moestro.ops import backend, native
from moestro.ops.ffn_plan import room
from tests.tolerances import BFLOAT16_NORM, FLOAT32, FLOAT64

D = 12
needs_native = pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")


def inputs(n_tokens: int, counts: list[int], widths: list[int], gates: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(n_tokens + sum(counts) + sum(widths))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    n = sum(counts)
    token = torch.randint(n_tokens, (n,), generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    total = sum(widths)
    return draw(n_tokens, D), token, draw(n), offsets, draw(gates * total, D), draw(total, D), widths


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::mm"
        return func(*args, **(kwargs or {}))


def outputs_and_gradients(name: str, arguments, activation: str):
    x, token, weight, offsets, w_in, w_out, widths = arguments
    leaves = [v.detach().requires_grad_() for v in (x, weight, w_in, w_out)]
    with backend.force(name):
        y = ops.expert_ffn(leaves[0], token, leaves[1], offsets, leaves[2], leaves[3], widths, activation)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y, [leaf.grad for leaf in leaves]


CASES = {
    "one row": (1, [1], [1]),
    "63 tokens, odd widths": (63, [40, 0, 23, 63], [7, 5, 0, 13]),
    "100 tokens, all to one": (100, [0, 0, 200], [8, 16, 24]),
    "no rows": (5, [0, 0], [4, 6]),
    "every expert its own width": (100, [1, 50, 2, 30, 17], [1, 2, 3, 33, 65]),
}


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "none"])
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_fused_equals_definition_in_float64(case, gates, activation):
    arguments = inputs(*CASES[case], gates, torch.float64)
    want, want_gradients = outputs_and_gradients("reference", arguments, activation)
    have, have_gradients = outputs_and_gradients("fused", arguments, activation)
    torch.testing.assert_close(have, want, **FLOAT64)
    for have_gradient, want_gradient in zip(have_gradients, want_gradients, strict=True):
        torch.testing.assert_close(have_gradient, want_gradient, **FLOAT64)


def test_fused_in_float32_is_close_to_float64():
    arguments = inputs(*CASES["every expert its own width"], 2, torch.float32)
    wide = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in arguments]
    want, want_gradients = outputs_and_gradients("reference", wide, "silu")
    have, have_gradients = outputs_and_gradients("fused", arguments, "silu")
    torch.testing.assert_close(have.double(), want, **FLOAT32)
    for have_gradient, want_gradient in zip(have_gradients, want_gradients, strict=True):
        torch.testing.assert_close(have_gradient.double(), want_gradient, **FLOAT32)


@pytest.mark.parametrize("name", ["fused", pytest.param("native", marks=needs_native)])
def test_arguments_may_lie_anywhere_in_memory(name):
    arguments = inputs(*CASES["63 tokens, odd widths"], 2, torch.float32)
    apart = [torch.stack([v, v], 1)[:, 0] if v.ndim == 1 else v.T.contiguous().T for v in arguments[:6]]
    want, want_gradients = outputs_and_gradients("reference", arguments, "silu")
    have, have_gradients = outputs_and_gradients(name, (*apart, arguments[6]), "silu")
    for mine, true in zip([have, *have_gradients], [want, *want_gradients], strict=True):
        torch.testing.assert_close(mine, true, **FLOAT32)


def test_two_runs_are_bit_identical():
    arguments = inputs(*CASES["every expert its own width"], 2, torch.float32)
    first, first_gradients = outputs_and_gradients("fused", arguments, "silu")
    second, second_gradients = outputs_and_gradients("fused", arguments, "silu")
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True))


def test_autocast_lowers_the_experts_and_keeps_float32_gradients():
    arguments = inputs(*CASES["63 tokens, odd widths"], 2, torch.float32)
    x, token, weight, offsets, w_in, w_out, widths = arguments
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, "silu")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w_in.grad.dtype == torch.float32
    want, _ = outputs_and_gradients("reference", arguments, "silu")
    assert (y.float() - want).norm() / want.norm() < 2e-2


def test_unknown_activation_names_the_allowed_ones():
    with pytest.raises(ValueError, match="activation='swish', allowed: silu, gelu, gelu_tanh, relu, none"):
        outputs_and_gradients("fused", inputs(*CASES["one row"], 2, torch.float64), "swish")


def test_unknown_backend_names_the_allowed_ones():
    with (
        pytest.raises(ValueError, match="backend='cuda', allowed: fused, reference, native, triton"),
        backend.force("cuda"),
    ):
        pass


def test_sixteen_bit_rows_get_room_and_nobody_sees_it():
    # 17 rows get room for 18, 37 for 40: what fills them must reach no result, not even from an infinite token 0
    arguments = inputs(*CASES["every expert its own width"], 2, torch.float64)
    served = arguments[1].clamp(min=1)
    arguments = (arguments[0], served, *arguments[2:])
    with torch.no_grad():
        arguments[0][0] = float("inf")
    sixteen = [v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in arguments]
    rounded = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in sixteen]
    want, want_gradients = outputs_and_gradients("reference", rounded, "silu")
    have, have_gradients = outputs_and_gradients("fused", sixteen, "silu")
    pairs = [(have, want), *zip(have_gradients, want_gradients, strict=True)]
    for index, (mine, exact) in enumerate(pairs):
        assert mine.isfinite().all(), index
        assert (mine.double() - exact).norm() <= 2 * BFLOAT16_NORM * exact.norm(), index


def test_room_is_little_and_seldom_new():
    rooms = [room(n) for n in range(1, 2049)]
    assert all(n <= r <= n + n // 8 + 1 for n, r in enumerate(rooms, 1))
    assert len(set(rooms)) == 8 + 8 * 8
    assert rooms == sorted(rooms)


@pytest.mark.parametrize("case", CASES)
def test_without_gradients_outputs_are_the_same_bits(case):
    arguments = inputs(*CASES[case], 2, torch.float32)
    want, _ = outputs_and_gradients("fused", arguments, "gelu")
    x, token, weight, offsets, w_in, w_out, widths = arguments
    with torch.no_grad():
        have = ops.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, "gelu")
    assert torch.equal(have, want)


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_that_nobody_wants_are_not_computed(wanted):
    x, token, weight, offsets, w_in, w_out, widths = inputs(*CASES["63 tokens, odd widths"], 2, torch.float32)
    _, every = outputs_and_gradients("fused", (x, token, weight, offsets, w_in, w_out, widths), "silu")
    leaves = [v.detach().requires_grad_(i == wanted) for i, v in enumerate((x, weight, w_in, w_out))]
    with backend.force("fused"):
        y = ops.expert_ffn(leaves[0], token, leaves[1], offsets, *leaves[2:], widths, "silu")
    with Products() as products:
        (y * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum().backward()
    torch.testing.assert_close(leaves[wanted].grad, every[wanted], **FLOAT32)
    # two experts compute: each the gradient of its hidden rows, and one more unless it is the gates' that is wanted
    assert products.count == 2 * (1 if wanted == 1 else 2)


def test_backward_twice_gives_the_same_gradients():
    x, token, weight, offsets, w_in, w_out, widths = inputs(*CASES["63 tokens, odd widths"], 2, torch.float32)
    y = ops.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, "silu").square().sum()
    first, second = (torch.autograd.grad(y, [x, weight, w_in, w_out], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("name", ["reference", "fused", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("counts", [[40, 0, 23, 63], [0, 0, 0, 0]], ids=["rows", "no rows"])
def test_stacked_output_matrices_are_the_same_experts(counts, name, activation):
    dtype = torch.float32 if name == "native" else torch.float64
    *rest, w_in, w_out, widths = inputs(63, counts, [6] * 4, 2, dtype)
    want, want_gradients = outputs_and_gradients("reference", (*rest, w_in, w_out, widths), activation)
    stacked = w_out.detach().unflatten(0, (4, 6)).mT.contiguous()
    have, have_gradients = outputs_and_gradients(name, (*rest, w_in, stacked, widths), activation)
    have_gradients[-1] = have_gradients[-1].mT.flatten(0, 1)
    for mine, true in zip([have, *have_gradients], [want, *want_gradients], strict=True):
        torch.testing.assert_close(mine, true, **(FLOAT32 if name == "native" else FLOAT64))


def test_stacked_output_matrices_of_one_token():
    *_, w_in, w_out, widths = inputs(1, [1, 1, 0, 1], [6] * 4, 2, torch.float64)
    x, token, expert = torch.randn(1, D, dtype=torch.float64), torch.zeros(3, dtype=torch.long), torch.tensor([3, 0, 1])
    weight = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)
    with torch.no_grad():
        want = ops.few_rows_ffn(x, token, expert, weight, w_in, w_out, widths, "silu")
        stacked = w_out.unflatten(0, (4, 6)).mT.contiguous()
        have = ops.few_rows_ffn(x, token, expert, weight, w_in, stacked, widths, "silu")
    torch.testing.assert_close(have, want, **FLOAT64)
