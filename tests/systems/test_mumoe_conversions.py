"""muMoE's experts made from dense layers and from given experts (checks 6 and 7 of its specification), and edited."""

import pytest
import torch
from torch import Tensor

from moestro.experts import CPBank, FactoredBank, TensorRingBank, TuckerBank
from moestro.experts.factored import relative_error
from moestro.layers import FactoredLayer, MoELayer, scaled_experts
from moestro.routers import LinearScore, ModesRouter, Router, ScoredRouter, SlotRouter, Soft, TopK
from moestro.routing import SoftRouting
from tests.tolerances import FLOAT64

D, OUT, N, T = 6, 4, 3, 7
close = torch.testing.assert_close


def dense(rank: int = 4) -> tuple[Tensor, Tensor]:
    """A weight of this rank and a bias in its range, so that both together have it, too."""
    left = torch.randn(OUT, rank, dtype=torch.float64)
    return left @ torch.randn(rank, D, dtype=torch.float64), left @ torch.randn(rank, dtype=torch.float64)


def experts() -> Tensor:
    return torch.randn(N, D + 1, OUT, dtype=torch.float64)


def from_dense(name: str, rank: int, modes: list[int], noise: float = 0.0) -> FactoredBank:
    weight, bias = dense(min(rank, OUT))
    made = {
        "cp": lambda: CPBank.from_dense(weight, bias, modes, rank, noise),
        "ring": lambda: TensorRingBank.from_dense(
            weight, bias, modes, [2, *(2 for _ in modes), (rank + 1) // 2], noise
        ),
        "tucker": lambda: TuckerBank.from_dense(weight, bias, modes, [*(2 for _ in modes), rank, rank + 1], noise),
    }[name]()
    x = torch.randn(T, D, dtype=torch.float64)
    if not noise:
        gates = tuple(torch.rand(T, n, dtype=torch.float64).softmax(-1) for n in modes)
        close(made(x, SoftRouting(gates)), x @ weight.T + bias, **FLOAT64)
    return made


@pytest.mark.parametrize("name", ["cp", "ring", "tucker"])
@pytest.mark.parametrize("modes", [[3], [2, 2]], ids=str)
@pytest.mark.parametrize("rank", [2, 4, 9], ids=lambda rank: f"rank{rank}")
def test_from_a_dense_layer_is_exact_from_its_rank_on(name: str, modes: list[int], rank: int) -> None:
    made = from_dense(name, rank, modes)
    assert all(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("name", ["cp", "ring", "tucker"])
def test_noise_tells_experts_apart(name: str) -> None:
    alike, apart = (from_dense(name, 4, [3], noise).matrices() for noise in (0.0, 0.1))
    close(alike[1], alike[0], **FLOAT64)
    assert 0.01 < (apart[1] - apart[0]).norm() / apart[0].norm() < 0.5


def test_a_dense_layer_of_higher_rank_is_approximated_best() -> None:
    """The error is that of the singular values left out (Eckart and Young)."""
    weight, bias = dense()
    whole = torch.cat([weight.T, bias[None]])
    s = torch.linalg.svdvals(whole)
    made = CPBank.from_dense(weight, bias, [N], rank=2)
    want = float(s[2:].norm() / s.norm())
    assert relative_error(made, whole.expand(N, -1, -1)) == pytest.approx(want, rel=1e-9)


def test_a_dense_layer_needs_no_bias() -> None:
    weight, _ = dense()
    assert CPBank.from_dense(weight, None, [N], rank=4).matrices()[:, -1].abs().max() < 1e-12


@pytest.mark.parametrize("rank", [N * OUT, N * OUT + 2])
def test_from_experts_is_exact_at_the_sum_of_their_ranks(rank: int) -> None:
    want = experts()
    close(CPBank.from_experts(want, rank).matrices(), want, **FLOAT64)


def test_sweeps_share_terms_among_experts() -> None:
    """Alternating least squares: the error never grows, and finds a tensor that has few terms."""
    torch.manual_seed(0)
    true = torch.einsum("nr,ir,or->nio", torch.randn(5, 3), torch.randn(D + 1, 3), torch.randn(OUT, 3)).double()
    errors = [relative_error(CPBank.from_experts(true, 3, sweeps), true) for sweeps in (0, 1, 2, 5, 20, 100)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.3 and errors[-1] < 0.02
    noise = experts()
    errors = [relative_error(CPBank.from_experts(noise, 5, sweeps), noise) for sweeps in range(6)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    # what is exact stays so, and terms that nothing needs stay finite
    close(CPBank.from_experts(noise, N * OUT + 2, 3).matrices(), noise, **FLOAT64)
    assert not CPBank.from_experts(torch.zeros_like(noise), 4, 3).matrices().any()


@pytest.mark.parametrize("more", [0, 1])
def test_chains_and_cores_of_experts_are_exact_at_full_ranks(more: int) -> None:
    want = experts()
    close(TensorRingBank.from_experts(want, [1, N + more, OUT + more]).matrices(), want, **FLOAT64)
    ranks = [N + more, D + 1 + more, OUT + more]
    close(TuckerBank.from_experts(want, ranks).matrices(), want, **FLOAT64)


def test_lower_ranks_lose_no_more_than_their_unfoldings_do() -> None:
    """The error is at most the root of the sum of squares of what each truncation leaves out (Oseledets 2011, Theorem
    2.2; De Lathauwer 2000, Property 10), and as large as the greatest of them."""
    want = experts()
    left = [float(torch.linalg.svdvals(want.transpose(0, m).flatten(1))[2:].norm() / want.norm()) for m in range(3)]
    bound = sum(each**2 for each in left) ** 0.5
    assert max(left) <= relative_error(TuckerBank.from_experts(want, [2, 2, 2]), want) * (1 + 1e-9) <= bound
    bound = (left[0] ** 2 + left[2] ** 2) ** 0.5
    error = relative_error(TensorRingBank.from_experts(want, [1, 2, 2]), want)
    assert max(left[0], left[2]) <= error * (1 + 1e-9) <= bound * (1 + 1e-6)


def test_ranks_are_checked() -> None:
    with pytest.raises(ValueError, match=r"ranks=\[2, 3, 4\], allowed: all but the last equal"):
        TensorRingBank.from_dense(*dense(), [N], [2, 3, 4])
    with pytest.raises(ValueError, match=r"ranks=\[2, 3, 4\], allowed: 1, r_1, r"):
        TensorRingBank.from_experts(experts(), [2, 3, 4])
    with pytest.raises(ValueError, match=r"ranks=\[2, 3\], allowed: 3 for 1 modes"):
        TuckerBank.from_experts(experts(), [2, 3])


def test_from_experts_keeps_the_largest_terms() -> None:
    want = experts()
    s = torch.linalg.svdvals(want).flatten().sort(descending=True).values
    made = CPBank.from_experts(want, rank=5)
    assert relative_error(made, want) == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-9)


ROUTERS = {
    "soft": lambda: ScoredRouter(LinearScore(D, 4, init_std=1.0), Soft("entmax15", "layer")),
    "modes": lambda: ModesRouter(D, 4, [2, 2], init_std=1.0),
    "top_k": lambda: ScoredRouter(LinearScore(D, 4, init_std=1.0), TopK(2)),
    "slots": lambda: SlotRouter(D, 4),
}


def edited(router: Router) -> tuple[MoELayer, Tensor]:
    return MoELayer(router, [CPBank(D, [4], rank=5)]).double(), torch.randn(T, D, dtype=torch.float64)


@pytest.mark.parametrize("kind", ROUTERS)
def test_experts_are_scaled_inside_the_context_alone(kind: str) -> None:
    """A layer of one linear map is linear in the weights: what an expert adds can be taken away, and doubled."""
    layer, x = edited(ROUTERS[kind]())
    before, _ = layer(x)
    with scaled_experts(layer, {1: 0.0}):
        without, (trace,) = layer(x)
    with scaled_experts(layer, {1: 2.0}):
        twice, _ = layer(x)
    close(twice - before, before - without, **FLOAT64)
    assert not trace.routing.dense()[:, 1].any() and (before - without).abs().max() > 1e-3
    assert torch.equal(layer(x)[0], before)


def test_a_block_without_any_expert_leaves_the_stream_alone() -> None:
    """Both of its maps, biases included, are edited."""
    layer = FactoredLayer(D, ROUTERS["modes"](), [CPBank(D, [2, 2], rank=5, d_out=9)]).double()
    x = torch.randn(T, D, dtype=torch.float64)
    with scaled_experts(layer, dict.fromkeys(range(4), 0.0)):
        assert torch.equal(layer(x)[0], x)
    before, _ = layer(x)
    with scaled_experts(layer, dict.fromkeys(range(4), 1.0)):
        close(layer(x)[0], before, **FLOAT64)
    assert (layer(x)[0] - x).abs().max() > 1e-3


def test_the_context_ends_with_an_error_inside() -> None:
    layer, x = edited(ROUTERS["soft"]())
    before, _ = layer(x)
    with pytest.raises(RuntimeError), scaled_experts(layer, {0: 0.0}):
        raise RuntimeError
    assert torch.equal(layer(x)[0], before)


def test_an_expert_that_is_not_there_is_refused() -> None:
    layer, _ = edited(ROUTERS["soft"]())
    with pytest.raises(ValueError, match="expert 4, allowed: 0 to 3"), scaled_experts(layer, {4: 0.0}):
        pass
