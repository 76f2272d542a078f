"""HyperMoE (arXiv:2402.12656): a generated expert beside those that a router chose.

| check of the specification | test |
|---|---|
| 1 silent heads: the plain mixture; nearly, at the start | test_at_the_start_it_is_nearly_the_plain_mixture |
| 2 per token = per set, values and gradients | test_layer_equals_reference |
| 3 top-1: an adapter an expert; cached = trained forward | test_top_1_has_an_adapter_an_expert, test_the_cache |
| 4 complement identity | test_unchosen_is_all_less_chosen |
| 5 permuting experts | test_moving_experts_changes_nothing |
| 6 all chosen | test_all_experts_chosen_leave_nothing_out |
| 7 one generator, gradients of all layers | test_one_generator_for_all_layers |
| 8 who learns at step 0 | test_embeddings_of_unchosen_experts_learn |
| 9 unchosen experts get no gradient | test_unchosen_experts_learn_nothing |
| 10 bf16 | test_generation_is_not_lowered |
| counts | test_counts |
| the control: free adapters | test_free_adapters_* |
| killed and continued | test_a_killed_run_continues |
"""

import copy

import pytest
import torch
from torch import Tensor

from moestro.experts import FFNBank, FreeAdapters, HyperExpert, HyperGenerator
from moestro.layers import MoELayer
from moestro.model import Attention, Block, Transformer
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.routers import Capacity, LinearScore, ScoredRouter, SlotRouter, Soft, TopK, TopP
from moestro.train import train
from tests.conftest import ROOT
from tests.reference import hypermoe as reference
from tests.tolerances import FLOAT64
from tests.train.test_resume import Killed, Mortal, require_equal_runs
from tests.train.tiny import VOCABULARY, WIDTH, Counting, tiny_settings

D, E, T, R = 6, 5, 19, 3
SELECTS = {
    "top-1": lambda: TopK(1, renormalize=False),
    "top-2": lambda: TopK(2),
    "top-p": lambda: TopP(0.7),
    "all": lambda: TopK(E),
    "capacity": lambda: Capacity(TopK(2), factor=1.0),
}


def layer(select: str = "top-1", scale: float = 1e3) -> tuple[MoELayer, HyperExpert]:
    """Heads are `scale` times larger than at the start, so that what they make can be seen."""
    torch.manual_seed(2)
    generator = HyperGenerator(D, rank=R, selection=4, layer=3, hidden=7)
    branch = HyperExpert(D, E, generator, embedding=4, hidden=5, init_std=0.7)
    router = ScoredRouter(LinearScore(D, E, init_std=1.0), SELECTS[select]())
    with torch.no_grad():
        for head in generator.heads.values():
            head.weight *= scale
            head.bias += 0.1 * (scale > 1) * torch.randn_like(head.bias)
    return MoELayer(router, [FFNBank(D, [3, 1, 4, 2, 5]), branch]).double(), branch


def tokens(n: int = T) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def plain(moe: MoELayer) -> MoELayer:
    return MoELayer(moe.router, [moe.bank])


def sets(moe: MoELayer, x: Tensor) -> list[set[int]]:
    chosen: list[set[int]] = [set() for _ in range(len(x))]
    routing = moe.router(x)
    for t, e in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
        chosen[t].add(e)
    return chosen


@pytest.mark.parametrize("select", SELECTS)
def test_layer_equals_reference(select: str) -> None:
    moe, branch = layer(select)
    x = tokens().requires_grad_()
    have, (trace,) = moe(x)
    weights = dict(branch.named_parameters())
    made = reference.branch(x, sets(moe, x), weights, R)
    want = plain(moe)(x)[0] + made
    torch.testing.assert_close(have, want, **FLOAT64)
    assert made.abs().mean() > 0.01
    slope = torch.linspace(-1, 1, have.numel(), dtype=torch.float64).view_as(have)
    leaves = [x, *weights.values()]
    mine, theirs = (
        torch.autograd.grad((value * slope).sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in (have, want)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)
        assert a.any() or select == "all"


def test_at_the_start_it_is_nearly_the_plain_mixture() -> None:
    torch.manual_seed(0)
    branch = HyperExpert(64, E, HyperGenerator(64))
    moe = MoELayer(ScoredRouter(LinearScore(64, E, init_std=1.0), TopK(1)), [FFNBank(64, [32] * E), branch])
    x = torch.randn(T, 64)
    # of this only 1e-6 is the product's; the rest are the biases, which start at 1e-3 |h|
    assert 0 < (moe(x)[0] - plain(moe)(x)[0]).abs().max() < 1e-3
    with torch.no_grad():
        branch.generator.heads["up_bias"].weight.zero_()
        assert 0 < branch(x, moe.router(x)).abs().max() < 1e-5
    with torch.no_grad():
        for name in ("up", "up_bias"):
            branch.generator.heads[name].weight.zero_()
    assert torch.equal(moe(x)[0], plain(moe)(x)[0])


def test_top_1_has_an_adapter_an_expert() -> None:
    moe, branch = layer()
    x = tokens()
    weights = {name: p.detach() for name, p in branch.named_parameters()}
    delta = moe(x)[0] - plain(moe)(x)[0]
    for t, (expert,) in enumerate(sets(moe, x)):
        others = sum(weights["experts"][j] for j in range(E) if j != expert)
        down, a, up, b = reference.adapter(weights, others, D, R)
        torch.testing.assert_close(delta[t], torch.relu(x[t] @ down + a) @ up + b, **FLOAT64)
    assert len(branch.generated(torch.eye(E, dtype=torch.bool)).down) == E


def test_the_cache() -> None:
    """In evaluation nothing is generated twice, whatever the batch; a new weight empties it."""
    moe, branch = layer("top-2")
    x = tokens()
    want = moe(x)[0].detach()
    calls: list[int] = []
    branch.generator.register_forward_hook(lambda module, inputs, made: calls.append(len(inputs[0])))
    moe.eval()
    with torch.no_grad():
        for part in (slice(0, 7), slice(3, T), slice(0, T)):
            torch.testing.assert_close(moe(x[part])[0], want[part], **FLOAT64)
        different = len({frozenset(chosen) for chosen in sets(moe, x)})
        assert sum(calls) == different
        branch.generator.heads["up"].weight.mul_(2)
        changed = moe(x)[0]
        assert sum(calls) == 2 * different and not torch.allclose(changed, want)
        branch.cached = 1
        torch.testing.assert_close(moe(x)[0], changed, **FLOAT64)
        assert len(branch._kept) == 1
    torch.testing.assert_close(moe.train()(x)[0], changed, **FLOAT64)


def test_the_cache_does_not_outlive_an_optimizer_step() -> None:
    """Fused kernels do not say that they changed a weight."""
    moe, branch = layer("top-2")
    optimizer, x = torch.optim.AdamW(branch.parameters(), lr=0.1, fused=True), tokens()
    with torch.no_grad():
        before = moe.eval()(x)[0]
    moe.train()(x)[0].square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = moe.eval()(x)[0]
    assert not torch.allclose(after, before)
    torch.testing.assert_close(moe.train()(x)[0], after, **FLOAT64)


def test_unchosen_is_all_less_chosen() -> None:
    table = layer()[1].experts.detach()
    for chosen in ({0}, {1, 3}, {0, 2, 4}, set(range(E))):
        less = table.sum(0) - sum(table[e] for e in chosen)
        torch.testing.assert_close(reference.unchosen_sum(table, chosen), less, **FLOAT64)


@pytest.mark.parametrize("select", ["top-1", "top-2", "top-p"])
def test_moving_experts_changes_nothing(select: str) -> None:
    moe, branch = layer(select)
    before = moe(tokens())[0]
    moe.reindex(torch.tensor([3, 0, 4, 2, 1]))
    torch.testing.assert_close(moe(tokens())[0], before, **FLOAT64)
    old = branch.experts.detach().clone()
    branch.reindex(torch.tensor([0, -1, 2]))
    assert torch.equal(branch.experts[[0, 2]], old[[0, 2]]) and not torch.equal(branch.experts[1], old[1])


def test_all_experts_chosen_leave_nothing_out() -> None:
    moe, branch = layer("all")
    x = tokens()
    want = reference.branch(x, [set(range(E))] * T, dict(branch.named_parameters()), R)
    torch.testing.assert_close(moe(x)[0] - plain(moe)(x)[0], want, **FLOAT64)
    with pytest.raises(ValueError, match="SoftRouting leaves none out"):
        MoELayer(ScoredRouter(LinearScore(D, E), Soft()), [moe.bank, branch]).double()(x)
    with pytest.raises(ValueError, match="SlotRouting leaves none out"):
        MoELayer(SlotRouter(D, E, slots=2), [moe.bank, branch]).double()(x)


def test_embeddings_of_unchosen_experts_learn() -> None:
    moe, branch = layer(scale=1.0)
    x = tokens()
    chosen = set.union(*sets(moe, x[:3]))
    moe(x[:3])[0].square().sum().backward()
    assert len(chosen) < E
    for expert in set(range(E)) - chosen:
        assert branch.experts.grad is not None and branch.experts.grad[expert].any()
    assert branch.generator.trunk.weight.grad is not None and branch.generator.trunk.weight.grad.any()
    assert all(head.weight.grad.any() for head in branch.generator.heads.values())


def test_unchosen_experts_learn_nothing() -> None:
    moe, _ = layer()
    x = tokens()[:3]
    moe(x)[0].square().sum().backward()
    for expert in set(range(E)) - set.union(*sets(moe, x)):
        assert all(not weight.grad[rows].any() for weight, rows in moe.bank.weights_of(expert))
    branch_only, branch = layer()
    (branch(x, branch_only.router(x)).square().sum()).backward()
    assert all(p.grad is None for p in branch_only.router.parameters())


def test_generation_is_not_lowered() -> None:
    moe, branch = layer(scale=1.0)
    moe = moe.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = branch(tokens().float(), moe.router(tokens().float()))
        made: list = []
        branch.generator.register_forward_hook(lambda module, inputs, out: made.append(out))
        branch(tokens().float(), moe.router(tokens().float()))
    assert y.dtype == torch.bfloat16 and all(weight.dtype == torch.float32 for weight in made[0].tensors())


def test_one_generator_for_all_layers() -> None:
    recipe = load_recipe(ROOT / "recipes" / "hypermoe.yaml", ["model.d_model=16", "model.attention.n_heads=2"])
    model, apart = build_model(recipe, 11).double(), build_model(recipe, 11).double()
    branches = [moe.branches[1] for moe in model.moe_layers().values()]
    assert len(branches) == 4 and len({id(branch.generator) for branch in branches}) == 1
    assert sum("trunk.weight" in name for name, _ in model.named_parameters()) == 1
    own = [moe.branches[1] for moe in apart.moe_layers().values()]
    for branch in own:
        branch.generator = copy.deepcopy(branch.generator)
    text = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    model(text).logits.square().sum().backward()
    apart(text).logits.square().sum().backward()
    for name, parameter in branches[0].generator.named_parameters():
        each = [dict(branch.generator.named_parameters())[name].grad for branch in own]
        assert all(gradient.any() for gradient in each)
        torch.testing.assert_close(parameter.grad, sum(each), **FLOAT64)


def test_counts() -> None:
    moe, branch = layer("top-2")
    x = tokens()
    (trace,) = moe(x)[1]
    each = 4 * D * R
    plain_cost = float(plain(moe).flops(trace.routing).useful)
    different = len({frozenset(chosen) for chosen in sets(moe, x)})
    made = 2 * (E * 4 + 4 * 5 + 5 * 4 + (4 + 3) * 7 + 7 * (2 * D * R + R + D))
    assert float(moe.flops(trace.routing).useful) == plain_cost + T * each + different * made
    assert float(moe.eval().flops(trace.routing).useful) == plain_cost + T * each
    paper = build_model(load_recipe(ROOT / "recipes" / "paper" / "hypermoe-gpt2.yaml"), 50_257, "meta")
    generator = next(iter(paper.moe_layers().values())).branches[1].generator
    assert round(sum(p.numel() for p in generator.parameters()) / 1e6, 1) == 12.8
    for wrong in ({"n_experts": 0}, {"cached": 0}):
        with pytest.raises(ValueError, match="allowed: at least 1"):
            HyperExpert(**{"d_model": D, "n_experts": E, "generator": branch.generator, **wrong})
    with pytest.raises(ValueError, match="the router knows 5 experts, HyperExpert 4"):
        MoELayer(moe.router, [moe.bank, HyperExpert(D, 4, branch.generator)])


def decoder() -> Transformer:
    """Two layers with one generator."""
    torch.manual_seed(0)
    generator = HyperGenerator(WIDTH, rank=R, selection=4, layer=3, hidden=5)

    def moe() -> MoELayer:
        branch = HyperExpert(WIDTH, 3, generator, embedding=4, hidden=4)
        return MoELayer(ScoredRouter(LinearScore(WIDTH, 3), TopK(2)), [FFNBank(WIDTH, [2, 4, 6]), branch])

    return Transformer(VOCABULARY, WIDTH, [Block(WIDTH, Attention(WIDTH, n_heads=2), moe()) for _ in range(2)])


def test_a_killed_run_continues(tmp_path) -> None:
    """As if it had not been killed, evaluations on the way included."""
    settings = tiny_settings(6, save_every=2, eval_every=2)
    train(decoder(), Counting(), settings, [], [], tmp_path / "whole")
    with pytest.raises(Killed):
        train(decoder(), Mortal(3), settings, [], [], tmp_path / "parts")
    train(decoder(), Counting(), settings, [], [], tmp_path / "parts")
    require_equal_runs(tmp_path / "parts", tmp_path / "whole", 6)


def free(select: str) -> tuple[MoELayer, FreeAdapters]:
    torch.manual_seed(4)
    branch = FreeAdapters(D, E, R)
    router = ScoredRouter(LinearScore(D, E, init_std=1.0), SELECTS[select]())
    return MoELayer(router, [FFNBank(D, [3, 1, 4, 2, 5]), branch]).double(), branch


@pytest.mark.parametrize("select", ["top-1", "top-2", "top-p", "capacity"])
def test_free_adapters_equal_their_definition(select: str) -> None:
    """And change nothing at the start; moved with their experts they give the same."""
    moe, branch = free(select)
    x = tokens()
    assert torch.equal(moe(x)[0], plain(moe)(x)[0])
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter)
    have = moe(x)[0] - plain(moe)(x)[0]
    for t, chosen in enumerate(sets(moe, x)):
        want = torch.zeros(D, dtype=torch.float64)
        for e in chosen:
            hidden = torch.relu(branch.down[e] @ x[t] + branch.down_bias[e])
            want = want + branch.up[e] @ hidden + branch.up_bias[e]
        torch.testing.assert_close(have[t], want, **FLOAT64)
    before = moe(x)[0]
    moe.reindex(torch.tensor([3, 0, 4, 2, 1]))
    torch.testing.assert_close(moe(x)[0], before, **FLOAT64)
    branch.reindex(torch.tensor([0, -1]))
    assert branch.n_experts == 2 and not branch.up[1].any() and branch.up[0].any()


def test_free_adapters_with_top_1_can_be_what_a_generator_makes() -> None:
    moe, branch = layer()
    twin = FreeAdapters(D, E, R).double()
    made = branch.generated(torch.eye(E, dtype=torch.bool))
    with torch.no_grad():
        for mine, theirs in zip(
            (twin.down, twin.down_bias, twin.up, twin.up_bias),
            (made.down.mT, made.down_bias, made.up.mT, made.up_bias),
            strict=True,
        ):
            mine.copy_(theirs)
    x = tokens()
    torch.testing.assert_close(MoELayer(moe.router, [moe.bank, twin])(x)[0], moe(x)[0], **FLOAT64)


def test_free_adapters_refuse_and_count() -> None:
    moe, branch = free("top-2")
    (trace,) = moe(tokens())[1]
    assert float(moe.flops(trace.routing).useful - plain(moe).flops(trace.routing).useful) == 2 * T * 4 * D * R
    with pytest.raises(ValueError, match="rank=0, allowed: at least 1"):
        FreeAdapters(D, E, 0)
    with pytest.raises(ValueError, match="SoftRouting chooses none"):
        MoELayer(ScoredRouter(LinearScore(D, E), Soft()), [moe.bank, branch]).double()(tokens())
