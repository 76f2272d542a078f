"""Every registered router with every registered bank, against the definition. An unregistered part cannot ship, a
registered one cannot skip: the pairs come from the registry."""

import pytest
import torch

from moestro.experts import ConstantBank, CopyBank, ExpertBank, FFNBank, SingletonBank, quantized
from moestro.layers import ActiveRows, MoELayer
from moestro.ops import backend
from moestro.recipe.parts import PARTS
from moestro.routers import (
    BiasedRouter,
    GroupedRouter,
    LinearScore,
    RemappedRouter,
    ResidualRouter,
    ScoredRouter,
    SlotRouter,
    TopK,
    TopP,
)
from moestro.routing import SlotRouting, SparseRouting
from tests.tolerances import FLOAT64

D, E, T = 6, 9, 23
SCORES = {
    "linear": {"init_std": 1.0},
    "affine": {"init_std": 1.0},
    "noisy": {"init_std": 1.0},
    "cosine": {},
    "low_rank_cosine": {"rank": 4, "temperature": 0.2},
}
SELECTS = {
    "top_k": {"top_k": 3},
    "muted_top_k": {"top_k": 3, "muted": [2, 5]},
    "softmax_of_chosen": {"top_k": 3},
    "sparse_mixer": {"jitter": 0.2},
    "scaled_top_k": {"top_k": 3, "gate": "straight_through", "scale": 1.7},
    "skipping_top_k": {"top_k": 3, "skip_below": 0.7},
    "top_p": {"threshold": 0.6},
    "steered_top_p": {"start": 0.6},
    "top_any": {"n_experts": 9},
    "sampled_second": {},
    "soft": {"gate": "entmax15", "norm": "layer"},
    "capacity": {"select": TopP(0.9, renormalize=False), "factor": 1.5},
    "expert_choice": {"factor": 2.5},
    "relu": {"target": 2},
}
ROUTERS = {
    "product_key": {"heads": 2, "top_k": 3, "d_key": 4},
    "modes": {"modes": [3, 3], "init_std": 1.0},
    "slots": {"slots": 2, "normalized": True},
    "uniform": {},
}
# experts named by their place, and what says so
PLACED = {"product_key": "named by its pair of keys", "modes": "named by its place in the grid"}
BANKS = {
    "ffn": lambda make: make(D, [3, 5, 0, 8, 1, 2, 2, 7, 4]),
    "stacked": lambda make: make(D, E, width=5),
    "clamped": lambda make: make(D, E, width=5),
    "biased_ffn": lambda make: make(D, [3, 5, 0, 8, 1, 2, 2, 7, 4]),
    "singleton": lambda make: make(D, E),
    "glu_singleton": lambda make: make(D, E),
    "value": lambda make: make(D, E),
    "ragged": lambda make: make(D, [1, 2, 4, 1, 1, 3, 2, 1, 8]),
    "quantized_singleton": lambda make: quantized(SingletonBank(D, E)),
    "copy": lambda make: make(E),
    "constant": lambda make: make(D, E),
    "cp": lambda make: make(D, [E], rank=4),
    "tensor_ring": lambda make: make(D, [E], ranks=[2, 3, 4]),
    "tucker": lambda make: make(D, [E], ranks=[2, 4, 3]),
    "low_rank": lambda make: make(D, E, rank=2, up_std=0.7),
    "mpo": lambda make: make(D, E, 4, width_factors=[2, 1, 2], d_factors=[1, 3, 2]),
    "mixed": lambda make: make([FFNBank(D, [3, 5, 0, 8]), CopyBank(), ConstantBank(D, 2), SingletonBank(D, 2)]),
}
SHARED = {"shared": {"width": 5}, "bias": {}}
# a bank that stands elsewhere in the recipe
NAMED = {"shared_bank"}
# made of a routing and weighted by no gate: tests/systems/test_hypermoe.py
GENERATED = {"hyper", "free_adapters"}


def test_every_registered_part_has_an_example():
    assert set(PARTS["score"]) == set(SCORES)
    assert set(PARTS["select"]) == set(SELECTS)
    assert set(PARTS["router"]) == set(ROUTERS) | {"scored", "biased", "residual", "grouped", "remapped"}
    assert set(PARTS["branches"]) == set(BANKS) | set(SHARED) | NAMED | GENERATED
    assert set(PARTS["banks"]) == set(BANKS) - {"mixed"}


def scored(score: str, select: str) -> ScoredRouter:
    router = ScoredRouter(PARTS["score"][score](D, E, **SCORES[score]), PARTS["select"][select](**SELECTS[select]))
    # two calls are compared: noise belongs to training
    return router.eval() if score == "noisy" or select == "sparse_mixer" else router


def biased(gate: str) -> BiasedRouter:
    router = BiasedRouter(LinearScore(D, E, init_std=1.0), top_k=3, gate=gate)
    router.bias.copy_(torch.linspace(-0.3, 0.3, E))
    return router


def remapped() -> RemappedRouter:
    """12 old experts: two that expert 0 answers for, two for expert 4, one without an answer."""
    router = ScoredRouter(LinearScore(D, 12, init_std=1.0), TopK(4, renormalize=False))
    return RemappedRouter(router, [3, 0, 1, 4, 2, 4, 0, -1, 5, 6, 7, 8])


ROUTER_MAKERS = {
    "plain-slots": lambda: SlotRouter(D, E, slots=2),
    "residual": lambda: ResidualRouter(LinearScore(D, E, init_std=1.0), TopK(3)),
    "grouped": lambda: GroupedRouter(D, LinearScore(D, E, init_std=1.0), [3, 2, 4], 2, 3, init_std=1.0),
    "softmax": lambda: ScoredRouter(LinearScore(D, E, init_std=1.0), PARTS["select"]["soft"]()),
    "remapped": remapped,
    "biased-sigmoid": lambda: biased("sigmoid"),
    "biased-softmax": lambda: biased("softmax"),
    # a selection sees logits and not where they come from: all scores with one selection, all selections with one score
    **{f"{s}-top_k": (lambda s=s: scored(s, "top_k")) for s in SCORES},
    **{f"linear-{c}": (lambda c=c: scored("linear", c)) for c in SELECTS},
    **{kind: (lambda kind=kind: PARTS["router"][kind](D, E, **ROUTERS[kind])) for kind in ROUTERS},
}


def bank(kind: str) -> ExpertBank:
    return BANKS[kind](PARTS["branches"][kind])


def layer(router: str, kind: str) -> MoELayer:
    torch.manual_seed(7)
    return MoELayer(ROUTER_MAKERS[router](), [bank(kind), PARTS["branches"]["shared"](D, width=5)]).double()


def tokens(n: int = T) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def one_expert(experts: ExpertBank, e: int, x: torch.Tensor) -> torch.Tensor:
    offsets = torch.zeros(experts.n_experts + 1, dtype=torch.int64)
    offsets[e + 1 :] = len(x)
    return experts.run(x, offsets)


def definition(moe: MoELayer, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token (or slot), weighted: no sorting, no grouping, no fast path."""
    routing = moe.router(x)
    y = moe.branches[1](x)
    for e in range(moe.bank.n_experts):
        if isinstance(routing, SlotRouting):
            y = y + routing.merge[:, e] @ one_expert(moe.bank, e, routing.dispatch[:, e].T @ x)
        else:
            y = y + routing.dense()[:, e, None] * one_expert(moe.bank, e, x)
    return y


def gradients(moe: MoELayer, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    names = dict(moe.named_parameters())
    weighted = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return dict(zip(["x", *names], torch.autograd.grad(weighted, [x, *names.values()], allow_unused=True), strict=True))


pairs = pytest.mark.parametrize(("router", "kind"), [(r, b) for r in ROUTER_MAKERS for b in BANKS])
routers = pytest.mark.parametrize("router", ROUTER_MAKERS)


@pairs
@pytest.mark.parametrize("name", backend.EVERYWHERE)
def test_output_and_gradients_equal_the_definition(router, kind, name):
    moe, x = layer(router, kind), tokens().requires_grad_()
    with backend.force(name):
        have, _ = moe(x)
        have_gradients = gradients(moe, x, have)
    want = definition(moe, x)
    torch.testing.assert_close(have, want, **FLOAT64)
    for key, gradient in gradients(moe, x, want).items():
        zero = torch.zeros(())
        want_gradient = zero if gradient is None else gradient
        have_gradient = zero if have_gradients[key] is None else have_gradients[key]
        torch.testing.assert_close(have_gradient + 0 * want_gradient, want_gradient + 0 * have_gradient, **FLOAT64)


@pairs
def test_recorded_rows_combine_to_the_output(router, kind):
    moe, x = layer(router, kind), tokens()
    plain, _ = moe(x)
    recording = MoELayer(moe.router, list(moe.branches), record=ActiveRows())
    y, (trace,) = recording(x)
    torch.testing.assert_close(y, plain, **FLOAT64)
    torch.testing.assert_close(trace.routing.combine(trace.rows) + moe.branches[1](x), plain, **FLOAT64)


@pairs
def test_moving_experts_changes_nothing(router, kind):
    moe, x = layer(router, kind), tokens()
    index = torch.randperm(E, generator=torch.Generator().manual_seed(3))
    if kind == "mixed":
        index = torch.tensor([2, 0, 3, 1, 4, 6, 5, 8, 7])
    if router in PLACED:
        with pytest.raises(ValueError, match=PLACED[router]):
            moe.reindex(index)
        return
    before, _ = moe(x)
    moe.reindex(index)
    after, _ = moe(x)
    torch.testing.assert_close(after, before, **FLOAT64)


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("router", [r for r in ROUTER_MAKERS if r not in PLACED])
def test_a_fresh_expert_replaces_an_old_one_and_no_other(router, kind):
    moe, x = layer(router, kind), tokens()
    old = [one_expert(moe.bank, e, x) for e in range(E)]
    moe.reindex(torch.tensor([0, -1, *range(2, E)]))
    new = [one_expert(moe.bank, e, x) for e in range(E)]
    assert torch.equal(new[1], old[1]) == (kind == "copy")  # which are all alike
    assert all(torch.equal(new[e], old[e]) for e in range(E) if e != 1)


@pytest.mark.parametrize("kind", BANKS)
def test_the_weights_of_an_expert_are_all_its_own(kind):
    """Changing them changes its output and no other's, and together with what is shared they are all there is."""
    experts, x = bank(kind).double(), tokens()
    before = [one_expert(experts, e, x) for e in range(E)]
    owned = {parameter: torch.zeros(len(parameter)) for parameter in experts.parameters()}
    for expert in range(E):
        for parameter, rows in experts.weights_of(expert):
            owned[parameter][rows] += 1
            with torch.no_grad():
                parameter[rows] *= 2
        after = [one_expert(experts, e, x) for e in range(E)]
        changed = [e for e in range(E) if not torch.equal(after[e], before[e])]
        assert changed == [expert] or (not changed and not sum(r.stop - r.start for _, r in experts.weights_of(expert)))
        before = after
    assert all((count == 1).all() or not count.any() for count in owned.values())
    shared = sum(parameter.numel() for parameter, count in owned.items() if not count.any())
    assert shared == experts.shared_parameters()


@pairs
def test_forward_in_training_changes_no_state(router, kind):
    moe = layer(router, kind).train()
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    moe(tokens())
    moe(tokens())
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())


@pairs
def test_padding_reaches_no_expert(router, kind):
    moe, x = layer(router, kind), tokens(12).view(3, 4, D)
    keep = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    y, (trace,) = moe(x, keep)
    alone, _ = moe(x[keep])
    assert trace.routing.n_tokens == int(keep.sum())
    assert not y[~keep].any()
    torch.testing.assert_close(y[keep], alone, **FLOAT64)


@routers
def test_rows_are_the_sum_of_the_load(router):
    routing = ROUTER_MAKERS[router]().double()(tokens())
    assert routing.load().sum() == routing.n_rows
    assert routing.offsets[-1] == routing.n_rows
    assert routing.per_token(1.0).sum().item() == pytest.approx(routing.n_rows)


@routers
def test_importance_is_the_sum_of_the_weights(router):
    routing = ROUTER_MAKERS[router]().double()(tokens())
    torch.testing.assert_close(routing.importance(), routing.dense().sum(0), **FLOAT64)


@routers
def test_gather_and_combine_are_adjoint(router):
    """<gather(x), r> weighted = <x, combine(r)> where rows are weighted copies of tokens."""
    routing, x = ROUTER_MAKERS[router]().double()(tokens()).grouped(), tokens()
    rows = torch.randn(routing.n_rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    right = (x * routing.combine(rows)).sum()
    if isinstance(routing, SlotRouting):
        routing = SlotRouting(routing.merge, routing.merge)
        left = (routing.gather(x) * rows).sum()
    else:
        weight = routing.weight if isinstance(routing, SparseRouting) else routing.dense().T.flatten()
        left = (routing.gather(x) * rows * weight[:, None]).sum()
    torch.testing.assert_close(left, right, **FLOAT64)


@pairs
def test_tokens_are_treated_alike_wherever_they_stand(router, kind):
    moe, x = layer(router, kind), tokens()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(moe(x[order])[0], moe(x)[0][order], **FLOAT64)


def test_tokens_without_experts_get_zeros():
    routing = SparseRouting(torch.tensor([1, 1]), torch.tensor([0, 2]), torch.ones(2, dtype=torch.float64), 3, E)
    for kind in BANKS:
        y = bank(kind).double()(tokens(3), routing)
        assert not y[[0, 2]].any()
        assert y[1].any()


def test_dropped_rows_contribute_nothing():
    routing = scored("linear", "top_k").double()(tokens())
    kept = routing.keep(routing.expert != 4)
    assert kept.load()[4] == 0
    assert kept.n_rows == routing.n_rows - int((routing.expert == 4).sum())
