"""Routings and a float64 comparison, expert by expert, for the tests of the Triton feed-forward."""

from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch

from moestro import ops
from moestro.ops import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def why_not() -> str:
    """Why kernels cannot run here, or nothing."""
    if find_spec("triton") is None:
        return "no triton: pip install 'moestro[triton]'"
    if DEVICE == "cpu" and tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 7):
        return "the interpreter of triton < 3.7 fails on loops whose bounds are loaded"
    return ""


class Problem(NamedTuple):
    """Arguments of `ops.expert_ffn` but the activation."""

    x: torch.Tensor
    token: torch.Tensor
    weight: torch.Tensor
    offsets: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    widths: list[int]


def problem(token: list[list[int]], n_tokens: int, widths: list[int], gates: int, dtype, d=20, seed=0) -> Problem:
    """Random values for experts that serve the tokens `token[e]`."""
    generator = torch.Generator().manual_seed(seed)
    total, n = sum(widths), sum(len(served) for served in token)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)

    offsets = torch.tensor([0, *(len(served) for served in token)]).cumsum(0)
    tokens = torch.tensor([t for served in token for t in served], dtype=torch.int64)
    scale = max(widths) ** -0.5 if max(widths) else 1.0
    return Problem(
        draw(n_tokens, d), tokens.to(DEVICE), draw(n), offsets.to(DEVICE),
        draw(gates * total, d, scale=d**-0.5), draw(total, d, scale=scale), widths,
    )  # fmt: skip


def outputs_and_gradients(name: str, p: Problem, activation: str, dtype=None, call=ops.expert_ffn, options=None):
    """y and the gradients of x, weight, w_in and w_out, of a loss whose dy differs everywhere."""
    leaves = [v.detach().to(dtype or v.dtype).clone().requires_grad_() for v in (p.x, p.weight, p.w_in, p.w_out)]
    x, weight, w_in, w_out = leaves
    with backend.force(name, options):
        y = call(x, p.token, weight, p.offsets, w_in, w_out, p.widths, activation)
    slope = torch.linspace(-1.5, 1.5, y.numel(), dtype=torch.float64, device=y.device).to(p.x.dtype).to(y.dtype)
    (y * slope.view_as(y)).sum().backward()
    return y.detach(), *(leaf.grad for leaf in leaves)


def parts(results, p: Problem) -> dict[str, torch.Tensor]:
    """Every result by name, the gradients of weights and gates expert by expert."""
    y, dx, dweight, dw_in, dw_out = results
    gates = len(dw_in) // max(len(dw_out), 1)
    named = {"y": y, "dx": dx}
    pieces = {
        "dweight": dweight.split(p.offsets.diff().tolist()),
        "dw_in": dw_in.split([width * gates for width in p.widths]),
        "dw_out": dw_out.split(p.widths),
    }
    return named | {f"{key} of expert {e}": part for key, each in pieces.items() for e, part in enumerate(each)}


def assert_close(have, want, p: Problem, tolerance: float) -> None:
    """Each part differs by at most `tolerance` of its own norm; where zeros are wanted, nothing differs."""
    wanted = parts(want, p)
    for key, part in parts(have, p).items():
        assert part.shape == wanted[key].shape, key
        error, size = (part.double() - wanted[key]).norm(), wanted[key].norm()
        assert error <= tolerance * size, f"{key}: error {error:.2e} of {size:.2e}"
