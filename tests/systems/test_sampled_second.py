"""The drawn second expert of Lepikhin 2020 (arXiv:2006.16668): its distribution, and that it is a function."""

import pytest
import torch

from moestro.routers import SampledSecond
from moestro.routers.sampling import gumbel

N = 100_000


def logits(spread: float = 0.05) -> torch.Tensor:
    noise = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
    return torch.tensor([2.0, 1.0, 0.0, -1.0]) + spread * noise


def test_the_second_is_drawn_in_proportion_to_its_probability() -> None:
    rows = logits()
    expert, weight = SampledSecond(renormalize=False)(rows).matrix()
    assert not expert[:, 0].any()
    others = rows.softmax(-1)[:, 1:]
    want = (others / others.sum(-1, keepdim=True)).mean(0)
    have = torch.bincount(expert[:, 1] - 1, minlength=3) / N
    assert (have - want).abs().max() < 4 * 0.5 / N**0.5
    torch.testing.assert_close(weight, rows.softmax(-1).gather(1, expert))


def test_the_noise_is_gumbels_and_knows_nothing_of_the_logits() -> None:
    rows = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
    noise = gumbel(rows, 0)
    bound = 5 / N**0.5
    assert (noise.mean(0) - 0.577216).abs().max() < bound * 1.28
    assert (noise.var(0) - 1.644934).abs().max() < bound * 4
    together = torch.corrcoef(torch.cat([noise, rows], 1).T) - torch.eye(8)
    assert together.abs().max() < bound
    assert torch.corrcoef(torch.stack([noise[:, 0], gumbel(rows, 1)[:, 0]]))[0, 1].abs() < bound
    neighbours = torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]))
    assert neighbours[0, 1].abs() < bound


def test_the_draw_is_a_function_of_the_token() -> None:
    rows, select = logits()[:500], SampledSecond()
    again = select(rows)
    assert torch.equal(select(rows.flip(0)).matrix()[0].flip(0), again.matrix()[0])
    assert torch.equal(select(rows[:10]).matrix()[0], again.matrix()[0][:10])
    # nor on what other layouts of the same product change in its last bits
    assert torch.equal(select(rows.double() * (1 + 1e-14)).matrix()[0], select(rows.double()).matrix()[0])
    assert not torch.equal(SampledSecond(seed=1)(rows).matrix()[0], again.matrix()[0])
    torch.testing.assert_close(again.dense().sum(-1), torch.ones(500))


def test_an_expert_that_is_not_available_is_never_drawn() -> None:
    rows = logits()
    rows[:, 1] = -torch.inf
    assert set(SampledSecond()(rows).expert.tolist()) == {0, 2, 3}
    with pytest.raises(ValueError, match="a second expert of 1, allowed: at least 2 experts"):
        SampledSecond().check(1)
