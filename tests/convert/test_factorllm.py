"""A split network against the equations: outputs and every gradient, float64; the exact checks of FactorLLM."""

import pytest
import torch

from moestro.convert.grouping import BalancedKMeans, CoActivation, Contiguous, Importance, Shuffled
from moestro.convert.layers import every_expert
from moestro.convert.mixture import units_of
from moestro.convert.routers import expert_outputs, fitted_scale, wanted_sum
from moestro.objectives.router_target import label_experts, router_target_loss, subset_errors, target_distribution
from moestro.routers import ScaledTopK
from tests.convert.networks import KINDS, TOKENS, D, W, drawn, groups, named, network, seen, split
from tests.reference import factorllm
from tests.tolerances import FLOAT64

GATES = ("hard", "straight_through", "share", "softmax")
GROUPINGS = [
    Contiguous(),
    Shuffled(),
    Importance(),
    Importance(dealt=True),
    BalancedKMeans(),
    BalancedKMeans(on="activations"),
    CoActivation(),
]
close = torch.testing.assert_close


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shared", [0, 4])
def test_outputs_and_gradients_are_those_of_the_equations(kind: str, gate: str, shared: int) -> None:
    """Dispatched rows against every expert computed and masked, with an odd scale and unequal experts."""
    made = split(
        seen(kind), widths=[1, 4, 3] if shared else [5, 1, 4, 2], grouping=Shuffled(), shared=shared, gate=gate
    )
    select = made.layer.router.select
    select.scale = 1.3
    weights, x = named(network(kind)), drawn(TOKENS, D, seed=30).requires_grad_()
    router = {n: p.detach().clone().requires_grad_() for n, p in made.layer.router.score.named_parameters()}
    routed, always = groups(made, W)
    activation = network(kind).activation
    want = torch.stack([factorllm.layer(weights, activation, routed, router, row, 2, gate, 1.3, always) for row in x])
    mine = drawn(TOKENS, D, seed=30).requires_grad_()
    have = made.layer(mine)[0]
    close(have, want, **FLOAT64)

    pull = drawn(TOKENS, D, seed=31)
    (have * pull).sum().backward()
    (want * pull).sum().backward()
    close(mine.grad, x.grad, **FLOAT64)
    grads = gradient_units(made.layer).take(made.rows)
    for name, leaf in weights.items():
        close(getattr(grads, name), leaf.grad, **FLOAT64, msg=lambda m, name=name: f"{name}: {m}")
    for name, leaf in router.items():
        own = getattr(made.layer.router.score, name).grad
        if gate == "hard":
            assert own is None and leaf.grad is None
        else:
            close(own, leaf.grad, **FLOAT64)


def gradient_units(layer):
    """The layer's gradients, as units: `units_of` a copy whose parameters they are."""
    grads = {name: p.grad for name, p in layer.named_parameters() if not name.startswith("router.")}
    state = {**layer.state_dict(), **grads}
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    found = units_of(layer).mapped(torch.clone)
    found = type(found)(**{**vars(found), "out_bias": None if found.out_bias is None else found.out_bias.clone()})
    layer.load_state_dict(before)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: repr(grouping))
def test_all_experts_are_the_network_whatever_the_grouping(kind, grouping):
    """Checks 1, 2 and 4: the output, the gradients of the slices, and the weights gathered again, bit by bit."""
    made = split(seen(kind), n_experts=3, grouping=grouping)
    dense, x = network(kind), drawn(TOKENS, D, seed=40)
    with every_expert([made.layer]):
        y = made.layer(x)[0]
    close(y, torch.stack([factorllm.dense(named(dense), dense.activation, row) for row in x]), **FLOAT64)
    back = made.units().take(made.rows)
    for name, value in vars(dense).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(back, name), value), name
    y.sum().backward()
    leaves = named(dense)
    sum(factorllm.dense(leaves, dense.activation, row).sum() for row in x).backward()
    grads = gradient_units(made.layer).take(made.rows)
    for name, leaf in leaves.items():
        close(getattr(grads, name), leaf.grad, **FLOAT64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_all_experts_in_lower_precision(dtype, tolerance):
    of = seen()
    low = type(of)(of.network.mapped(lambda t: t.to(dtype)), of.x.to(dtype))
    made = split(low, n_experts=4, grouping=Shuffled())
    with every_expert([made.layer]):
        y = made.layer(low.x)[0].double().detach()
    want = low.network(low.x).double()
    assert y.dtype == torch.float64 and float((y - want).norm() / want.norm()) < tolerance


def test_one_expert_is_the_network() -> None:
    made = split(seen(), n_experts=1, top_k=1)
    close(made.layer(seen().x)[0], network()(seen().x), **FLOAT64)


def test_the_order_within_a_group_does_not_matter_and_across_groups_does() -> None:
    """Check 5."""

    def order(units):
        return lambda seen, widths: torch.tensor(units)

    plain, within, across = (
        split(seen(), grouping=order(units)).layer(seen().x)[0]
        for units in (
            list(range(12)),
            [2, 0, 1, 3, 4, 5, 8, 7, 6, 11, 10, 9],
            [11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0],
        )
    )
    close(plain, within, **FLOAT64)
    assert float((plain - across).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["subset", "expert_error", "projection"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_labels_are_those_of_the_equations(kind, top_k, scale):
    made = split(seen(tokens=40), n_experts=4)
    x = seen(tokens=40).x
    outputs, target = expert_outputs(made.layer, x), wanted_sum(made.layer, seen(tokens=40), x)
    have = label_experts(outputs, target, top_k, kind, scale)
    for e, t, row in zip(outputs, target, have, strict=True):
        assert set(row.nonzero().flatten().tolist()) == factorllm.label(list(e), t, top_k, kind, scale)


def test_at_scale_two_a_half_and_its_complement_are_equally_good():
    """2 (E_0 + E_2) - T and 2 (E_1 + E_3) - T differ in sign alone where T is the sum: n / k tells nothing apart."""
    outputs = drawn(5, 4, D, seed=52)
    sets, errors = subset_errors(outputs, outputs.sum(1), 2, 2.0)
    other = [int((~sets == one).all(-1).nonzero()) for one in sets]
    close(errors, errors[:, other], **FLOAT64)


def test_the_subset_s_error_is_the_least_and_for_one_expert_the_labels_agree():
    """Check 6: subset <= expert error <= worst subset; for k = 1 and the scale n / k both labels are one."""
    outputs, target = drawn(60, 4, D, seed=50), drawn(60, D, seed=51)
    for top_k in (1, 2, 3):
        scale = 4 / top_k
        sets, errors = subset_errors(outputs, target, top_k, scale)
        for kind in ("subset", "expert_error"):
            label = label_experts(outputs, target, top_k, kind, scale)
            at = (label[:, None] == sets[None]).all(-1)
            found = errors[at]
            assert (errors.min(1).values <= found + 1e-9).all() and (found <= errors.max(1).values + 1e-9).all()
            members = [tuple(row.nonzero().flatten().tolist()) for row in label]
            want = [factorllm.subset_error(e, t, s, scale) for e, t, s in zip(outputs, target, members, strict=True)]
            close(found, torch.tensor(want, dtype=torch.float64), **FLOAT64)
    one = [label_experts(outputs, target, 1, kind, 4.0) for kind in ("subset", "expert_error")]
    assert torch.equal(*one)


def test_the_target_sums_to_one_and_the_loss_is_zero_where_the_router_is_right():
    """Check 7; and both directions of the loss against the equations, with gradients."""
    chosen = label_experts(drawn(9, 4, D, seed=60), drawn(9, D, seed=61), 2)
    wanted = target_distribution(chosen)
    close(wanted.sum(-1), torch.ones(9))
    assert float(router_target_loss(torch.where(chosen, 0.0, -torch.inf), wanted)) == 0
    right = torch.where(chosen, 30.0, -30.0).double()
    assert float(router_target_loss(right, wanted)) < 1e-12 < float(router_target_loss(drawn(9, 4), wanted))
    for literal, loss in ((False, factorllm.prior_loss), (True, factorllm.literal_prior_loss)):
        mine, theirs = drawn(9, 4, seed=62).requires_grad_(), drawn(9, 4, seed=62).requires_grad_()
        have = router_target_loss(mine, wanted, literal)
        each = [
            loss(list(row.softmax(-1)), set(members.nonzero().flatten().tolist()))
            for row, members in zip(theirs, chosen, strict=True)
        ]
        want = sum(each) / 9
        close(have, want, **FLOAT64)
        for value in (have, want):
            value.backward()
        close(mine.grad, theirs.grad, **FLOAT64)


def test_the_literal_target_is_nearly_flat():
    """0.475 against 0.175 for one of four, as the paper's code has it."""
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    label = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert float(router_target_loss(logits, label, literal=True)) == pytest.approx(0, abs=1e-7)
    close(logits.softmax(-1), torch.tensor([[0.475, 0.175, 0.175, 0.175]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_adds_nothing_and_learns_nothing(kind):
    """Check 11: 14 units for 4 experts."""
    made, plain = (split(seen(kind, 14), n_experts=4, grouping=Shuffled(), pad=pad) for pad in (True, False))
    assert made.node["branches"][0]["widths"] == [4, 4, 4, 4] and plain.node["branches"][0]["widths"] == [4, 4, 3, 3]
    x = drawn(TOKENS, D, seed=70)
    y = made.layer(x)[0]
    close(y, plain.layer(x)[0], **FLOAT64)
    y.square().sum().backward()
    padding = torch.ones(16, dtype=torch.bool)
    padding[made.rows] = False
    grads = gradient_units(made.layer)
    assert padding.sum() == 2
    for name in ("up", "down", "gate", "up_bias", "gate_bias"):
        if (grad := getattr(grads, name)) is not None:
            assert not grad[padding].any() and grad[~padding].any()


@pytest.mark.parametrize("kind", KINDS)
def test_it_costs_k_of_n_experts_and_the_router(kind):
    """Check 12: k / n of the dense network's FLOPs and 2 d n; biases count nothing."""
    made = split(seen(kind), n_experts=4, top_k=2)
    matrices = 3 if kind.endswith("glu") else 2
    want = matrices * 2 * D * W * 2 / 4 + 2 * D * 4
    assert made.layer.expected_token_flops() == want
    _, (trace,) = made.layer(drawn(TOKENS, D))
    assert float(trace.flops().useful) == TOKENS * want


def test_the_fitted_scale_is_the_least_squares_one():
    of = seen(tokens=30)
    made = split(of, gate="hard")
    routing = made.layer.router(of.x)
    y = made.layer.bank(of.x, routing)
    assert fitted_scale(made, of) == pytest.approx(factorllm.least_squares_scale(of.network(of.x), y), rel=1e-9)


def test_gates_that_do_not_exist_and_scales_of_nothing():
    with pytest.raises(ValueError, match=r"gate='soft', allowed: hard, straight_through, share, softmax"):
        ScaledTopK(1, "soft")
    with pytest.raises(ValueError, match=r"scale=0.0, allowed: above 0"):
        ScaledTopK(1, scale=0.0)
