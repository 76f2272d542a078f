"""Copies of a dense network: equal at conversion, redrawn from its statistics, cut into virtual groups."""

import pytest
import torch

from moestro.convert.routers import RouterSettings, begin_router
from moestro.convert.upcycle import Upcycle
from tests.convert.networks import KINDS, TOKENS, D, W, drawn, named, network, seen
from tests.reference import factorllm
from tests.tolerances import FLOAT64

close = torch.testing.assert_close


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", [1, 3])
def test_copies_are_the_network_whatever_the_router_says(kind, granularity):
    made = Upcycle(4, 2, granularity=granularity)(seen(kind))
    begin_router(made, seen(kind), RouterSettings("random"))
    x = 30 * drawn(TOKENS, D, seed=1)
    assert made.exact == "routed" and made.layer.router.n_experts == 4 * granularity
    close(made.layer(x)[0], network(kind)(x), **FLOAT64)
    back = made.units().take(made.rows)
    assert torch.equal(back.up, network(kind).up) and torch.equal(back.down, network(kind).down)


def test_virtual_groups_choose_whole_copies():
    """Against the equations, once the copies differ."""
    made = Upcycle(3, 2, granularity=2)(seen())
    begin_router(made, seen(), RouterSettings("random"))
    score = made.layer.router.score
    with torch.no_grad():
        score.weight.mul_(50)
    x = drawn(TOKENS, D, seed=1)
    rows = score.weight.detach()[::2]
    want = [factorllm.virtual_groups(named(network()), "silu", 3, 2, rows, row, 2) for row in x]
    close(made.layer(x)[0], torch.stack(want), **FLOAT64)
    chosen, gates = made.layer.router(x).matrix()
    assert all(len({int(e) // 2 for e in row}) == 2 for row in chosen)
    close(gates.sum(-1), torch.full((TOKENS,), 2.0, dtype=torch.float64), **FLOAT64)


def test_probabilities_before_the_choice_are_exact_at_a_router_of_zeros():
    made = Upcycle(4, 2, granularity=3, gate="softmax")(seen())
    begin_router(made, seen(), RouterSettings("zero"))
    x = drawn(TOKENS, D, seed=1)
    close(made.layer(x)[0], network()(x), **FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_redraws_a_share_of_each_expert_from_its_statistics(kind):
    of = seen(kind, width=4000, tokens=3)
    dense = of.network
    shifted = type(dense)(**{**vars(dense), "up": dense.up * 3 + 5})
    made = Upcycle(3, 1, drop=0.5)(type(of)(shifted, of.x))
    units, kept = made.units(), []
    for e in range(3):
        part = units.take(torch.arange(4000) + 4000 * e)
        same = (part.up == shifted.up).all(-1)
        assert int(same.sum()) == 2000 and torch.equal(same, (part.down == dense.down).all(-1))
        new, old = part.up[~same], shifted.up[~same]
        assert float(new.mean()) == pytest.approx(float(old.mean()), abs=0.1)
        assert float(new.std()) == pytest.approx(float(old.std()), rel=0.03)
        if dense.up_bias is not None:
            assert torch.equal(part.up_bias, dense.up_bias)
        kept.append(same)
    assert not torch.equal(kept[0], kept[1]) and made.exact == "no"
    # an eighth of the units are in no expert any more
    assert int((made.rows < 0).sum()) == int((~torch.stack(kept).any(0)).sum()) > 300
    found = made.rows >= 0
    assert torch.equal(units.take(made.rows).up[found], shifted.up[found])


def test_impossible_copies_are_refused():
    with pytest.raises(ValueError, match=r"granularity=5 does not divide 12, the units"):
        Upcycle(2, 1, granularity=5)(seen())
    with pytest.raises(ValueError, match=r"top_k=3, allowed: 1 to 2"):
        Upcycle(2, 3)
    with pytest.raises(ValueError, match=r"drop=1.5, allowed: 0 to 1"):
        Upcycle(2, 1, drop=1.5)
    assert W == 12
