"""MoDE (arXiv:2402.00893): mutual distillation among recorded experts.

| check of the specification | test |
|---|---|
| 1 alpha 0: loss, gradients, random numbers of the plain mixture | test_a_weight_of_zero_is_the_plain_mixture |
| 2 one expert: 0 | test_one_expert_alone_has_nobody_to_learn_from |
| 3 identical experts: 0 | test_identical_experts_are_at_rest |
| 4 mean form = 1/2 mean over pairs | test_the_forms_of_the_squared_distance |
| 5 a target without gradient changes nothing | test_a_target_without_gradient_has_the_same_gradient |
| 6 gradients sum to zero over experts | test_the_mean_of_the_experts_does_not_move |
| 7 permutation of experts | test_order_of_experts_does_not_matter |
| 8 no gradient to the router | test_the_router_learns_nothing |
| 9 inactive experts do not count in `active` | test_inactive_experts_have_no_part |
| 10 padding | test_padding_has_no_part |
| 11 scale | test_scale |
| 12 accumulation | test_accumulation_changes_nothing |
| 13 hand case | test_by_hand |
| outputs and gradients = reference | test_losses_equal_the_reference |
| what is recorded, its cost | test_what_is_recorded, test_draws_*, test_recorded_rows_cost |
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moestro.experts import ExpertBank, FFNBank
from moestro.layers import ActiveRows, AllRows, MoELayer, SampledRows
from moestro.objectives import MutualDistillation
from moestro.routers import LinearScore, ProductKeyRouter, ScoredRouter, SlotRouter, Soft, TopK, TopP
from moestro.routing import Overheard, SparseRouting, Trace
from moestro.train.step import backward
from tests.reference import mode as reference
from tests.tolerances import FLOAT64
from tests.train.test_whole_step import ragged
from tests.train.tiny import Counting, tiny_model, tiny_settings

D, E, T = 6, 5, 17
RECORDS = {"active": ActiveRows, "all": AllRows, "sampled": lambda: SampledRows(2, seed=3)}
PLAIN = MutualDistillation(normalize=False)


class Classifiers(ExpertBank):
    """Experts at the head of a model: logits of 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_experts = E
        self.weight = torch.nn.Parameter(torch.randn(E, D, 4))

    def run(self, z: Tensor, offsets: Tensor) -> Tensor:
        return torch.cat([rows @ w for rows, w in zip(z.split(offsets.diff().tolist()), self.weight, strict=True)])

    def row_flops(self) -> float:
        return 2.0 * D * 4


def layer(record: ActiveRows | None, select=None, bank: ExpertBank | None = None) -> MoELayer:
    torch.manual_seed(4)
    router = ScoredRouter(LinearScore(D, E, init_std=1.0), select or TopP(0.7))
    return MoELayer(router, [bank or FFNBank(D, [3, 1, 4, 2, 5])], record=record).double()


def tokens(n: int = T) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def traced(record: ActiveRows, select=None, bank: ExpertBank | None = None) -> tuple[MoELayer, Tensor, Trace]:
    moe, x = layer(record, select, bank), tokens().requires_grad_()
    return moe, x, moe(x)[1][0]


def at_the_head(record: ActiveRows) -> tuple[ExpertBank, Tensor, Trace]:
    """What a layer of experts that return logits would leave."""
    moe, x, bank = layer(record), tokens().requires_grad_(), Classifiers().double()
    routing = moe.router(x).grouped()
    further = record(routing)
    overheard = further and Overheard(further, bank.run(further.gather(x), further.offsets))
    return bank, x, Trace(moe, x, routing, bank.run(routing.gather(x), routing.offsets), overheard=overheard)


def heard_by_token(bank: ExpertBank, x: Tensor, trace: Trace) -> list[list[Tensor]]:
    """Outputs of every token's recorded experts, each computed alone."""
    met = [set() for _ in range(len(x))]
    for routing in (trace.routing, trace.overheard and trace.overheard.routing):
        if routing is not None:
            for t, e in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
                assert e not in met[t]
                met[t].add(e)
    out = []
    for t, experts in enumerate(met):
        offsets = [torch.tensor([0] * (e + 1) + [1] * (E - e)) for e in sorted(experts)]
        out.append([bank.run(x[t : t + 1], each)[0] for each in offsets])
    return out


def by_hand(outputs: list[list[list[float]]]) -> Trace:
    """A trace of tokens whose experts returned these."""
    moe = layer(ActiveRows())
    pairs = [(t, e) for t, experts in enumerate(outputs) for e in range(len(experts))]
    token, expert = (torch.tensor(column, dtype=torch.int64) for column in zip(*pairs, strict=True))
    rows = torch.tensor([row for experts in outputs for row in experts], dtype=torch.float64, requires_grad=True)
    routing = SparseRouting(token, expert, torch.ones(len(token), dtype=torch.float64), len(outputs), E)
    return Trace(moe, torch.zeros(len(outputs), D), routing, rows)


def close(have: Tensor, want: Tensor | float) -> None:
    torch.testing.assert_close(have, torch.as_tensor(want, dtype=have.dtype), **FLOAT64)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(
    "objective",
    [
        MutualDistillation(distance=distance, target=target, features=features, normalize=normalize, temperature=1.5)
        for distance, features, normalize in [
            ("mse", "mean", False),
            ("mse", "sum", False),
            ("mse", "mean", True),
            ("cosine", "mean", True),
            ("kl", "mean", True),
        ]
        for target in ("mean", "pairs", "zero")
        if target != "zero" or distance == "mse"
    ],
    ids=lambda it: f"{it.distance}-{it.target}-{it.features}-{it.normalize}",
)
def test_losses_equal_the_reference(objective: MutualDistillation, record: str) -> None:
    """Value, and gradients to the tokens and to the experts."""
    if objective.distance == "kl":
        bank, x, trace = at_the_head(RECORDS[record]())
    else:
        moe, x, trace = traced(RECORDS[record]())
        bank = moe.bank
    have, o = objective(trace), objective
    heard = heard_by_token(bank, x, trace)
    assert {len(experts) for experts in heard} >= ({5} if record == "all" else {1, 2} if record == "active" else {3, 4})
    want = reference.loss(heard, o.distance, o.target, o.features, o.normalize, o.temperature)
    close(have, want)
    leaves = [x, *bank.parameters()]
    for a, b in zip(torch.autograd.grad(have, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)
        assert a.any()


def test_by_hand() -> None:
    trace = by_hand([[[1, 0], [0, 1]]])
    close(replace(PLAIN, target="pairs", features="sum")(trace), 2)
    close(replace(PLAIN, features="sum")(trace), 0.5)
    close(PLAIN(trace), 0.25)
    close(MutualDistillation(features="sum")(trace), 1)  # the mean is (1/2, 1/2)
    close(MutualDistillation(distance="cosine", target="pairs")(trace), 1)


def test_the_forms_of_the_squared_distance() -> None:
    """To the mean: half of the mean over all ordered pairs, an expert with itself among them."""
    outputs = [[[1.0, 0.5], [0.0, 1.0], [3.0, -2.0]]]
    experts = [torch.tensor(row, dtype=torch.float64) for row in outputs[0]]
    pairs = [reference.squared(a, b, "mean") for a in experts for b in experts]
    close(PLAIN(by_hand(outputs)), float(sum(pairs)) / len(pairs) / 2)
    two = [[[1.0, 0.5], [0.0, 1.0]]]
    close(replace(PLAIN, target="pairs")(by_hand(two)), 4 * PLAIN(by_hand(two)).detach())


def test_one_expert_alone_has_nobody_to_learn_from() -> None:
    for distance in ("mse", "cosine", "kl"):
        for target in ("mean", "pairs"):
            trace = by_hand([[[1, 2]], [[0, 3]]])
            loss = MutualDistillation(distance=distance, target=target)(trace)
            assert float(loss.detach()) == 0
            assert not torch.autograd.grad(loss, trace.rows)[0].any()
    # nor does such a token weigh in the mean
    close(PLAIN(by_hand([[[1, 0], [0, 1]], [[5, 5]]])), 0.25)


def test_identical_experts_are_at_rest() -> None:
    moe, x, trace = traced(AllRows(), bank=FFNBank(D, [4] * E))
    with torch.no_grad():
        for weight in moe.bank.parameters():
            blocks = weight.view(E, -1, D)
            blocks.copy_(blocks[:1].clone().expand_as(blocks))
    for objective in (PLAIN, MutualDistillation(), MutualDistillation("cosine"), replace(PLAIN, target="pairs")):
        loss = objective(moe(x)[1][0])
        close(loss, 0)
        assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, list(moe.bank.parameters())))


def test_a_target_without_gradient_has_the_same_gradient() -> None:
    trace = by_hand([[[1, 2], [0, 3], [4, 1]], [[2, 2], [1, 0]]])
    mean = torch.zeros(2, 2, dtype=torch.float64).index_add(0, trace.routing.token, trace.rows.detach())
    count = torch.tensor([3.0, 2.0], dtype=torch.float64)
    apart = (trace.rows - (mean / count[:, None])[trace.routing.token]).square().mean(-1)
    stopped = (apart / count[trace.routing.token]).sum() / 2
    close(PLAIN(trace), stopped.detach())
    have, want = (torch.autograd.grad(loss, trace.rows)[0] for loss in (PLAIN(trace), stopped))
    close(have, want)


def test_the_mean_of_the_experts_does_not_move() -> None:
    for objective in (PLAIN, MutualDistillation(), replace(PLAIN, target="pairs", features="sum")):
        trace = by_hand([[[1, 2], [0, 3], [4, 1]], [[2, 2], [1, 0]]])
        gradient = torch.autograd.grad(objective(trace), trace.rows)[0]
        assert gradient.any()
        close(torch.zeros(2, 2, dtype=torch.float64).index_add(0, trace.routing.token, gradient), torch.zeros(2, 2))


@pytest.mark.parametrize("record", ["active", "all"])
def test_order_of_experts_does_not_matter(record: str) -> None:
    moe, x, trace = traced(RECORDS[record]())
    moe.reindex(torch.tensor([3, 0, 4, 2, 1]))
    for objective in (PLAIN, MutualDistillation("cosine", "pairs")):
        close(objective(moe(x)[1][0]), objective(trace).detach())


@pytest.mark.parametrize("record", RECORDS)
def test_the_router_learns_nothing(record: str) -> None:
    moe, _, trace = traced(RECORDS[record]())
    MutualDistillation()(trace).backward()
    assert all(parameter.grad is None for parameter in moe.router.parameters())
    assert all(parameter.grad is not None for parameter in moe.bank.parameters())


def test_inactive_experts_have_no_part() -> None:
    """Changing expert 0 changes only the loss of tokens that chose it; the others' loss is the same to the bit."""
    moe, x, trace = traced(ActiveRows(), TopK(2))
    without = torch.tensor([0 not in trace.routing.expert[trace.routing.token == t] for t in range(T)])
    assert 2 < without.sum() < T - 2
    before = PLAIN(moe(x[without])[1][0]), PLAIN(trace)
    with torch.no_grad():
        for weight, rows in moe.bank.weights_of(0):
            weight[rows] += 1
    assert torch.equal(PLAIN(moe(x[without])[1][0]), before[0])
    assert float(PLAIN(moe(x)[1][0]).detach()) != float(before[1].detach())


@pytest.mark.parametrize("record", RECORDS)
def test_padding_has_no_part(record: str) -> None:
    moe, x = layer(RECORDS[record]()), tokens(12).view(3, 4, D)
    keep = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    (padded,), (alone,) = moe(x, keep)[1], moe(x[keep])[1]
    assert padded.rows is not None and torch.equal(PLAIN(padded), PLAIN(alone))


def test_scale() -> None:
    trace = by_hand([[[1, 2], [0, 3], [4, 1]], [[2, 2], [1, 0]]])
    larger = replace(trace, rows=3 * trace.rows)
    close(PLAIN(larger), 9 * PLAIN(trace).detach())
    close(MutualDistillation()(larger), MutualDistillation()(trace).detach())
    assert float(MutualDistillation()(replace(trace, rows=0 * trace.rows)).detach()) == 0


def recording_model(record: ActiveRows | None):
    model = tiny_model(kinds=("moe", "dense", "moe")).double()
    for moe in model.moe_layers().values():
        moe.record, moe.router.select = record, TopP(0.4)
    return model


def one_step(record: ActiveRows | None, objectives: list, accumulate: int = 1, batch=None) -> tuple[dict, dict]:
    model = recording_model(record)
    batch = ragged(Counting().train_batch(0, 8, seed=0)) if batch is None else batch
    sums = backward(model, batch, tiny_settings(batch_size=8, accumulate=accumulate), objectives, ())
    return {name: p.grad for name, p in model.named_parameters()}, sums


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_changes_nothing(record: str, accumulate: int) -> None:
    whole, one = one_step(RECORDS[record](), [("it", 0.7, PLAIN)])
    parts, many = one_step(RECORDS[record](), [("it", 0.7, replace(PLAIN, statistics="step"))], accumulate)
    close(many["objective it"], one["objective it"])
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, **FLOAT64)


@pytest.mark.parametrize("record", RECORDS)
def test_a_weight_of_zero_is_the_plain_mixture(record: str) -> None:
    """The loss and every gradient to the bit, and no random number drawn. What `active` records is computed anyway."""
    silent, sums = one_step(RECORDS[record](), [("it", 0.0, MutualDistillation())])
    drawn = torch.get_rng_state()
    plain, want = one_step(ActiveRows(), [])
    # building the model seeds the generator and draws from it, and nothing else does
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(sums["loss"], want["loss"])
    assert all(torch.equal(silent[name], gradient) for name, gradient in plain.items())
    fast, fastest = one_step(None, [])
    torch.testing.assert_close(fastest["loss"], want["loss"], **FLOAT64)
    for name, gradient in plain.items():
        torch.testing.assert_close(fast[name], gradient, **FLOAT64)
    assert (float(sums["flops"]) > float(fastest["flops"])) == (record != "active")


def test_what_is_recorded() -> None:
    moe, x, trace = traced(AllRows(), TopK(2))
    assert trace.overheard is not None and trace.overheard.routing.n_rows == T * (E - 2)
    assert not trace.overheard.routing.weight.any() and torch.equal(moe(x)[0], layer(ActiveRows(), TopK(2))(x)[0])
    moe.router.set_available(torch.tensor([True, False, True, True, True]))
    (trace,) = moe(x)[1]
    assert trace.overheard is not None and 1 not in trace.overheard.routing.expert
    assert trace.overheard.routing.n_rows == T * (E - 3)
    assert trace.recorded_per_token().tolist() == [E - 1] * T
    every = traced(ActiveRows(), Soft())[0]
    every.router.set_available(torch.tensor([True, False, True, False, True]))
    assert every(x)[1][0].recorded_per_token().tolist() == [3] * T
    soft = traced(AllRows(), Soft())[2]
    assert soft.overheard is not None and soft.overheard.routing.n_rows == 0 and float(PLAIN(soft).detach()) > 0
    for record in (AllRows(), SampledRows()):
        assert layer(record).eval()(x)[1][0].overheard is None


def test_recorded_rows_cost() -> None:
    """FLOPs are those of every row that is computed; active parameters those that the output needs."""
    moe, _, trace = traced(SampledRows(1), TopK(1))
    plain = layer(None, TopK(1))
    assert trace.overheard is not None
    further = sum(float(moe.bank.row_flops()[e]) for e in trace.overheard.routing.expert.tolist())
    assert trace.flops().item().useful == float(plain.flops(trace.routing).useful) + further
    assert trace.experts_per_token().tolist() == [1.0] * T == (trace.recorded_per_token() - 1).tolist()


def test_draws_are_functions_of_the_token() -> None:
    moe, x, trace = traced(SampledRows(2, seed=3), TopK(1))
    met = {(t, e) for t, e in zip(*(part.tolist() for part in trace.overheard.routing.meetings()), strict=True)}
    assert len(met) == 2 * T and not met & {(t, e) for t, e in trace.routing.dense().nonzero().tolist()}
    back = moe(x.flip(0))[1][0].overheard.routing
    assert {(T - 1 - t, e) for t, e in zip(back.token.tolist(), back.expert.tolist(), strict=True)} == met
    moe.record = SampledRows(2, seed=4)
    other = moe(x)[1][0].overheard.routing
    assert set(zip(other.token.tolist(), other.expert.tolist(), strict=True)) != met
    moe.record = SampledRows(9)
    assert moe(x)[1][0].overheard.routing.n_rows == T * (E - 1)


@pytest.mark.parametrize(("by", "shares"), [("uniform", [1 / 4] * 4), ("probability", [0.4, 0.3, 0.2, 0.1])])
def test_draws_have_their_distribution(by: str, shares: list[float]) -> None:
    """20,000 tokens whose logits differ by far less than their probabilities: shares within 5 standard deviations."""
    n = 20_000
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64).log().expand(n, E).clone()
    logits = logits + 0.02 * torch.randn(n, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routing = SampledRows(1, by=by)(TopK(1)(logits))
    assert routing is not None
    have = torch.bincount(routing.expert, minlength=E)[1:] / n
    assert ((have - torch.tensor(shares)).abs() < 5 * (0.25 / n) ** 0.5).all()


def test_what_cannot_be_distilled() -> None:
    x = tokens()
    with pytest.raises(ValueError, match="allowed: ffn: .*record: {kind: active}"):
        PLAIN(layer(None)(x)[1][0])
    with pytest.raises(ValueError, match="these experts return 6 channels"):
        MutualDistillation("kl")(layer(ActiveRows())(x)[1][0])
    slots = MoELayer(SlotRouter(D, E, slots=2), [FFNBank(D, [2] * E)], record=ActiveRows()).double()
    with pytest.raises(ValueError, match="SlotRouting mixes them"):
        PLAIN(slots(x)[1][0])
    slots.record = AllRows()
    with pytest.raises(ValueError, match="SlotRouting mixes tokens"):
        slots(x)
    keys = MoELayer(ProductKeyRouter(D, 16, heads=1, top_k=2, d_key=4), [FFNBank(D, [2] * 16)], record=SampledRows())
    with pytest.raises(ValueError, match="product keys do not have"):
        keys(x.float())
    with pytest.raises(ValueError, match="extra=0, allowed: at least 1"):
        SampledRows(0)
    for wrong in ({"distance": "l1"}, {"target": "all"}, {"features": "max"}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="allowed"):
            MutualDistillation(**wrong)
