"""Gates that may be zero, the pressure on them and the rule that sets it, against ReMoE's equations."""

import pytest
import torch

from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.model import Attention, Block, Transformer
from moestro.objectives import GateL1
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.routers import LinearScore, ReLU, ScoredRouter, TopK
from moestro.routing import Trace
from moestro.train import train
from moestro.train.gate_sparsity import GateSparsity
from moestro.train.step import backward
from tests.conftest import ROOT
from tests.reference import choices as reference
from tests.tolerances import FLOAT64
from tests.train.tiny import VOCABULARY, WIDTH, Counting, tiny_model, tiny_settings

D, E, T, TARGET = 6, 8, 30, 2.0


def layer(d_model: int = D, target: float = TARGET, pressure: float = 0.5) -> MoELayer:
    router = ScoredRouter(LinearScore(d_model, E, init_std=1.0), ReLU(target, pressure))
    return MoELayer(router, [FFNBank(d_model, [3] * E)])


def parts(of: MoELayer) -> tuple[torch.Tensor, ReLU]:
    router = of.router
    assert isinstance(router, ScoredRouter) and isinstance(router.select, ReLU)
    return router.score.weight, router.select


def tokens(n: int = T) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def model(pressure: float = 1e-8) -> Transformer:
    torch.manual_seed(0)
    blocks = [Block(WIDTH, Attention(WIDTH, n_heads=2), layer(WIDTH, pressure=pressure)) for _ in range(2)]
    return Transformer(VOCABULARY, WIDTH, blocks)


def pressures(of: Transformer) -> list[float]:
    return [float(parts(moe)[1].pressure) for moe in of.moe_layers().values()]


def test_gates_and_pressure_equal_the_reference() -> None:
    torch.manual_seed(0)
    moe, x = layer().double(), tokens().requires_grad_()
    weight, select = parts(moe)
    _, (trace,) = moe(x)
    logits = torch.stack([weight @ token for token in x])
    slope = torch.arange(float(E), dtype=torch.float64)
    cases = [
        ((trace.routing.dense() * slope).sum(), (reference.relu_gates(logits) * slope).sum()),
        (GateL1()(trace), reference.gate_l1(logits, 0.5, TARGET)),
    ]
    for have, want in cases:
        torch.testing.assert_close(have, want, **FLOAT64)
        mine, theirs = (torch.autograd.grad(value, [x, weight], retain_graph=True) for value in (have, want))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, **FLOAT64)
    torch.testing.assert_close(trace.routing.dense(), reference.relu_gates(logits), **FLOAT64)
    assert set(trace.experts_per_token().tolist()) > {2.0, 4.0}


def test_the_layer_is_continuous_where_an_expert_appears() -> None:
    moe = layer().double()
    weight, _ = parts(moe)
    with torch.no_grad():
        weight.zero_()
        weight[0, 0], weight[1, 1] = 1.0, 1.0
    x = tokens(1)
    x[0, 0] = 1.0
    just_off, just_on = x.clone(), x.clone()
    just_off[0, 1], just_on[0, 1] = -1e-9, 1e-9
    (off, (few,)), (on, (many,)) = moe(just_off), moe(just_on)
    assert many.routing.n_rows == few.routing.n_rows + 1
    torch.testing.assert_close(on, off, rtol=0, atol=1e-6)


def test_a_token_may_have_no_expert() -> None:
    moe = layer().double()
    with torch.no_grad():
        parts(moe)[0].fill_(-1.0)
    y, (trace,) = moe(tokens(3).abs())
    assert trace.routing.n_rows == 0 and not y.any()
    assert GateL1()(trace) == 0


def test_even_loads_at_the_target_cost_the_pressure_times_the_gates() -> None:
    """f_e = 1 / E: lambda times the sum over experts of mean gates, the plain L1 norm."""
    logits = -torch.ones(E, E, dtype=torch.float64)
    for t in range(E):
        logits[t, t], logits[t, (t + 1) % E] = 0.5, 1.5
    moe = layer(pressure=0.25).double()
    routing = parts(moe)[1](logits)
    _, (trace,) = moe(tokens(1))
    value = GateL1()(type(trace)(moe, tokens(E), routing))
    assert float(value) == pytest.approx(0.25 * 2.0, rel=1e-12)


def test_the_rule_moves_the_pressure_as_the_paper_does() -> None:
    torch.manual_seed(1)
    layers, rule, want = [layer().double(), layer().double()], GateSparsity(), 0.5
    for step, shift in enumerate((0.0, -2.0, 0.3, -3.0), start=1):
        seen = []
        for part in (tokens(20), tokens(10)):
            for moe in layers:
                _, (trace,) = moe(part + shift)
                seen.append((moe, trace))
                rule.observe(trace)
        each = [torch.cat([trace.routing.logits for of, trace in seen if of is moe]) for moe in layers]
        want = reference.next_pressure(want, each, TARGET)
        rule.apply(step)
        for moe in layers:
            assert float(parts(moe)[1].pressure) == pytest.approx(want, rel=1e-6)
    assert want != 0.5


def test_shares_of_gates_are_averaged_over_layers_not_numbers_of_experts() -> None:
    """Half an expert of 4 too many is more than one of 16 too few."""
    rule, pressed = GateSparsity(), []
    for n_experts, target, rows in ((4, 1.0, 3), (16, 2.0, 2)):
        select = ReLU(target, pressure=0.5)
        logits = -torch.ones(2, n_experts)
        logits.view(-1)[torch.arange(rows) * n_experts // 2] = 1.0
        moe = MoELayer(ScoredRouter(LinearScore(D, n_experts), select), [FFNBank(D, [3] * n_experts)])
        rule.observe(Trace(moe, torch.zeros(2, D), select(logits)))
        pressed.append(select)
    rule.apply(1)
    assert [float(select.pressure) for select in pressed] == pytest.approx([0.6, 0.6])


def test_the_pressure_finds_the_target() -> None:
    """Gates whose task is a sum of 4 are pressed until as many experts as wanted are left."""
    torch.manual_seed(0)
    # tokens have a mean: without one, a router without biases cannot turn an expert off for more than half of them
    moe, rule, x = layer(pressure=1e-8), GateSparsity(), torch.randn(64, D) + 1
    optimizer = torch.optim.Adam([parts(moe)[0]], lr=0.02)
    counts = []
    for step in range(200):
        _, (trace,) = moe(x)
        optimizer.zero_grad()
        loss = (trace.routing.dense().sum(-1) - 4).square().mean() * 0.1 + GateL1()(trace)
        loss.backward()
        optimizer.step()
        rule.observe(trace)
        rule.apply(step + 1)
        counts.append(float(trace.experts_per_token().mean()))
    assert counts[0] > 3.5
    assert 1.5 < sum(counts[-100:]) / 100 < 2.5, counts[-100:]


def test_accumulation_changes_nothing() -> None:
    batch, ends = Counting().train_batch(0, 4, 0), []
    for accumulate in (1, 2, 4):
        fresh, rule = model(), GateSparsity()
        backward(fresh, batch, tiny_settings(accumulate=accumulate), [], [rule])
        rule.apply(1)
        ends.append(pressures(fresh))
    assert ends[0] == ends[1] == ends[2] == [pytest.approx(1.2e-8)] * 2


def test_an_interrupted_run_ends_as_a_whole_one(tmp_path) -> None:
    class Killed(BaseException):
        pass

    class DiesAt(GateSparsity):
        def apply(self, step: int) -> None:
            if step == 5:
                raise Killed
            super().apply(step)

    DiesAt.__name__ = "GateSparsity"
    settings, whole, resumed = tiny_settings(8, save_every=3), model(), model()
    loss = [("gate_l1", 1.0, GateL1())]
    train(whole, Counting(), settings, loss, [GateSparsity()], tmp_path / "whole")
    with pytest.raises(Killed):
        train(model(), Counting(), settings, loss, [DiesAt()], tmp_path / "half")
    train(resumed, Counting(), settings, loss, [GateSparsity()], tmp_path / "half")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert pressures(whole)[0] > 1e-8


def test_values_are_checked(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"target=0, pressure=1e-08, allowed: above 0"):
        ReLU(0)
    with pytest.raises(ValueError, match=r"target=9.0, allowed: at most 8, the number of experts"):
        layer(target=9.0)
    with pytest.raises(ValueError, match="gate sparsity factor=1, allowed: above 1"):
        GateSparsity(1)
    with pytest.raises(ValueError, match="gate sparsity found no gates that may be zero"):
        train(tiny_model(), Counting(), tiny_settings(1), [], [GateSparsity()], tmp_path)
    bare = MoELayer(ScoredRouter(LinearScore(D, E), TopK(1)), [FFNBank(D, [3] * E)])
    with pytest.raises(ValueError, match="gate_l1 needs gates that may be zero"):
        GateL1()(bare(torch.zeros(3, D))[1][0])


@pytest.mark.parametrize(("name", "experts", "target", "blocks"), [("remoe", 8, 2, 4), ("paper/remoe", 8, 1, 12)])
def test_recipes(name: str, experts: int, target: int, blocks: int) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    layers = build_model(recipe, 16, "meta").moe_layers().values()
    assert len(layers) == blocks
    for moe in layers:
        select = parts(moe)[1]
        assert (moe.router.n_experts, select.target, moe.router.rows_per_token()) == (experts, target, target)
    _, objectives, (rule,) = build_training(recipe)
    assert objectives == [("gate_l1", 1.0, GateL1())]
    assert isinstance(rule, GateSparsity) and rule.factor == 1.2
