"""Stratified layers against the equations of Xu 2023 (arXiv:2305.02176), and the checks of their definition:

(a) one stratum is a plain block: `test_one_stratum_is_a_block_of_plain_top_2`
(b) all in the last stratum, all in the gate's own: `test_top_1_in_the_last_stratum_...`, `test_top_1_in_the_own_...`
(c) masks: `test_no_gate_sees_an_expert_of_an_earlier_stratum`
(d) batch == token by token: `test_the_layer_equals_the_equations`, with every gradient
(e) tokens at gates: `test_tokens_at_the_gates_add_up_to_the_passes`
(f) expected passes: `test_uniform_gates_make_the_expected_passes`, `test_expected_passes_give_the_papers_flops`
(g) FLOPs: `test_flops_are_counted_pass_by_pass`
(h) balance: `test_balance_is_the_papers_and_1_when_even`
(i) empty gates: `test_a_gate_without_tokens_is_well_defined`
(j) parameters: `test_parameters_are_those_of_a_flat_mixture_and_gates_and_norms`
"""

from functools import partial

import pytest
import torch

from moestro.evaluate import capacity_report, routing_report
from moestro.evaluate.knobs import spending
from moestro.experts import CopyBank, CPBank, FFNBank, MPOBank, SharedExpert
from moestro.layers import DenseFFN, MoELayer, StratifiedLayer
from moestro.layers.stratified import pass_probabilities
from moestro.model import Attention, Block, Transformer
from moestro.model.active import idle_parameters
from moestro.objectives import FirstChoiceBalance
from moestro.ops import backend
from moestro.routers import Capacity, LinearScore, SampledSecond, ScoredRouter, SlotRouter, TopK
from moestro.routing import Trace
from tests.reference import stratified as reference
from tests.tolerances import FLOAT64
from tests.train.tiny import Counting

D, STRATA, WIDTH = 6, [2, 3, 2], 5
E = sum(STRATA)


def gate(n_experts: int, select=None, init_std: float = 1.0) -> ScoredRouter:
    return ScoredRouter(LinearScore(D, n_experts, init_std), select or TopK(2, renormalize=False))


def layer(strata=tuple(STRATA), form="paper", select=None, init_std=1.0) -> StratifiedLayer:
    torch.manual_seed(3)
    bank = FFNBank(D, [WIDTH] * sum(strata), activation="relu", glu=False)
    made = StratifiedLayer(D, strata, partial(gate, select=select, init_std=init_std), [bank], form)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made.double()


def tokens(n: int = 29) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def by_the_equations(of: StratifiedLayer, x: torch.Tensor, renormalize: bool) -> tuple[torch.Tensor, list[int]]:
    bank = of.branches[0]
    experts = list(zip(bank.w_in.matrices(), bank.w_out.matrices(), strict=True))
    gates = [moe.router.score.weight for moe in of.passes]
    norms = [[(n.weight, n.bias) for n in some if isinstance(n, torch.nn.LayerNorm)] for some in norms_of(of)]
    rows = []
    for token in x:
        if of.form == "paper":
            rows.append(reference.paper(token, of.strata, gates, norms[1], experts, renormalize))
        else:
            after = [*norms[0], *norms[2]]
            rows.append(reference.code(token, of.strata, gates, norms[1][0], after, experts, renormalize))
    return torch.stack([y for y, _ in rows]), [passes for _, passes in rows]


def norms_of(of: StratifiedLayer) -> tuple[list, list, list]:
    return list(of.stream_norms), list(of.norms), [of.last_norm]


def passes_of(traces: tuple[Trace, ...]) -> torch.Tensor:
    seen = torch.ones(traces[0].n_tokens, dtype=torch.int64)
    for trace in traces[1:]:
        seen[trace.origin.token] += 1
    return seen


def forced(own: bool) -> StratifiedLayer:
    """Every gate chooses its own stratum first, or the last one, whatever the token; inputs are of norm 1 and more."""
    made = layer(init_std=0.0)
    for number, moe in enumerate(made.passes):
        made.norms[number].bias.data.fill_(100.0)
        moe.router.score.weight.data.zero_()
        moe.router.score.weight.data[0 if own else -1] = 0.01
    return made


@pytest.mark.parametrize("name", backend.EVERYWHERE)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_layer_equals_the_equations(form, renormalize, name) -> None:
    made, x = layer(form=form, select=TopK(2, renormalize)), tokens().requires_grad_()
    inputs = [x, *made.parameters()]
    with backend.force(name):
        y, traces = made(x)
        have = torch.autograd.grad(y.sin().sum(), inputs)
    want_y, want_passes = by_the_equations(made, x, renormalize)
    want = torch.autograd.grad(want_y.sin().sum(), inputs)
    torch.testing.assert_close(y, want_y, **FLOAT64)
    assert passes_of(traces).tolist() == want_passes and len(set(want_passes)) > 1
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


def test_one_stratum_is_a_block_of_plain_top_2() -> None:
    made, x = layer(strata=[5]), tokens()
    plain = MoELayer(made.passes[0].router, [made.branches[0]])
    y, (trace,) = made(x)
    assert torch.equal(y, x + plain(made.norms[0](x))[0])
    assert trace.origin is None
    naive, _ = layer(strata=[5], form="stacked")(x)
    assert torch.equal(naive, plain(x)[0])


def test_a_block_adds_nothing_to_a_layer_that_owns_its_residual() -> None:
    made, x = layer(), tokens(6)[None]
    block = Block(D, Attention(D, n_heads=1), made).double()
    attended = x + block.attention(block.attention_norm(x), torch.arange(6)[None])
    torch.testing.assert_close(block(x, torch.arange(6)[None])[0], made(attended)[0], **FLOAT64)
    assert not list(block.ffn_norm.parameters())
    stacked = Block(D, Attention(D, n_heads=1), layer(form="stacked")).double()
    assert len(list(stacked.ffn_norm.parameters())) == 1


def test_top_1_in_the_last_stratum_ends_after_one_pass() -> None:
    made, x = forced(own=False), tokens()
    y, traces = made(x)
    assert [trace.routing.n_tokens for trace in traces] == [29, 0, 0]
    one, _ = made.passes[0](made.norms[0](x))
    assert torch.equal(y, x + one)


def test_top_1_in_the_own_stratum_composes_all_blocks() -> None:
    made, x = forced(own=True), tokens()
    y, traces = made(x)
    assert [trace.routing.n_tokens for trace in traces] == [29, 29, 29]
    want = x
    for norm, moe in zip(made.norms, made.passes, strict=True):
        want = want + moe(norm(want))[0]
    torch.testing.assert_close(y, want, **FLOAT64)


def test_a_capacity_drops_rows_and_no_token_stays_behind() -> None:
    """What a token chose first says where it goes, whether the expert had room for it or not."""
    made, x = layer(select=Capacity(TopK(2), 0.3)), tokens()
    _, traces = made(x)
    passed = torch.zeros(len(x), dtype=torch.int64)
    for number, (trace, first) in enumerate(zip(traces, made.firsts, strict=True)):
        there = (passed == number).nonzero().squeeze(-1)
        assert torch.equal(there, torch.arange(len(x)) if number == 0 else trace.origin.token)
        choice = trace.routing.logits.argmax(-1) + first
        kept = trace.routing.dense().gather(1, (choice - first)[:, None]).squeeze(1) > 0
        assert not kept.all()
        passed[there] = torch.tensor([reference.stratum_of(int(e), STRATA) for e in choice], dtype=torch.int64)
    assert (passed == len(STRATA)).all()


def test_no_gate_sees_an_expert_of_an_earlier_stratum() -> None:
    made = layer(select=SampledSecond())
    bank = made.branches[0]
    used = []
    bank.register_forward_hook(lambda module, args, output: used.append(int(args[1].expert.min())))
    _, traces = made(tokens(400))
    assert [trace.routing.n_experts for trace in traces] == [7, 5, 2]
    assert used == [0, 2, 5]


def test_tokens_at_the_gates_add_up_to_the_passes() -> None:
    _, traces = layer()(tokens(200))
    at = [trace.routing.n_tokens for trace in traces]
    assert at[0] == 200 and sum(at) == int(passes_of(traces).sum())
    assert 1 < sum(at) / 200 < 3


@pytest.mark.parametrize("strata", [[4, 12], [4, 4, 8], [8, 4, 4], [4, 4, 4, 4]])
def test_uniform_gates_make_the_expected_passes(strata) -> None:
    class Shuffled(LinearScore):
        """Logits that know nothing of the token."""

        def forward(self, x):
            return torch.randn(len(x), self.n_experts, dtype=x.dtype)

    made = StratifiedLayer(
        D, strata, lambda n_experts: ScoredRouter(Shuffled(D, n_experts), TopK(2)), [FFNBank(D, [1] * sum(strata))]
    )
    n = 40_000
    _, traces = made(torch.zeros(n, D))
    mean = sum(trace.routing.n_tokens for trace in traces) / n
    # a token's passes lie between 1 and L: deviation of the mean below L / 2 sqrt(n)
    assert abs(mean - sum(pass_probabilities(strata))) < 4 * len(strata) / 2 / n**0.5


def test_expected_passes_give_the_papers_flops() -> None:
    """Mega-FLOPs a token, Tables 1 and 2, rounded there: a pass more costs the big model 201.6, the base model 50.4."""
    big = {(4, 12): 656, (8, 8): 707, (4, 4, 8): 724, (12, 4): 757, (4, 4, 4, 4): 825}
    for strata, printed in big.items():
        assert abs(606 + 201.6 * (sum(pass_probabilities(strata)) - 1) - printed) < 1
    base = {(4, 4): 217, (2, 2, 2, 2): 247}
    for strata, printed in base.items():
        assert abs(192 + 50.4 * (sum(pass_probabilities(strata)) - 1) - printed) < 1
    assert sum(pass_probabilities([8, 4, 4])) == 2.0 and sum(pass_probabilities([7])) == 1.0


def test_flops_are_counted_pass_by_pass() -> None:
    made = layer()
    _, traces = made(tokens(100))
    expert = 2 * 2 * D * WIDTH
    for trace, n in zip(traces, [7, 5, 2], strict=True):
        assert float(trace.layer.flops(trace.routing).useful) == trace.routing.n_tokens * (2 * expert + 2 * D * n)
    probability = [1.0, 2 / 7, 3 / 5]
    want = sum(p * (2 * expert + 2 * D * n) for p, n in zip(probability, [7, 5, 2], strict=True))
    assert made.expected_token_flops() == pytest.approx(want)


@pytest.mark.parametrize("kind", [MPOBank, partial(CPBank, modes=[E], rank=4)], ids=["mpo", "cp"])
def test_a_pass_costs_what_its_bank_counts(kind) -> None:
    bank = kind(D, n_experts=E, width=8) if kind is MPOBank else kind(D)
    made = StratifiedLayer(D, STRATA, gate, [bank]).double()
    _, (trace, *_) = made(tokens())
    want = bank.flops(trace.routing).item().useful + trace.layer.router.flops(29)
    assert trace.flops().item().useful == want
    assert trace.flops().item().training().useful == 3 * want
    frozen = trace.layer.router.flops(29)
    bank.requires_grad_(False)
    assert trace.flops().item().training().useful == 3 * want - (want - frozen)


def test_figures_count_each_token_once() -> None:
    made = layer()
    _, traces = made(tokens(100))
    passes = passes_of(traces).float()
    used = sum(trace.experts_per_token().float() for trace in traces)
    torch.testing.assert_close(used, 2 * passes)
    torch.testing.assert_close(sum(t.active_width().float() for t in traces), 2 * WIDTH * passes)
    experts = [set() for _ in range(100)]
    for trace, first in zip(traces, made.firsts, strict=True):
        of = range(100) if trace.origin is None else trace.origin.token.tolist()
        for token, expert in zip(trace.routing.token.tolist(), trace.routing.expert.tolist(), strict=True):
            experts[of[token]].add(expert + first)
    different = sum(len(some) for some in experts) / 100
    assert different < float(used.mean())
    assert float(idle_parameters(traces)) == pytest.approx((E - different) * 2 * D * WIDTH)


def test_balance_is_the_papers_and_1_when_even() -> None:
    _, traces = layer()(tokens(50))
    for trace in traces:
        want = reference.balance(trace.routing.logits.softmax(-1))
        torch.testing.assert_close(FirstChoiceBalance()(trace), want, **FLOAT64)
    router = gate(4, init_std=0.0).double()
    router.score.weight.data[:, :4] = 1e-9 * torch.eye(4)
    x = torch.eye(4, D, dtype=torch.float64).repeat(5, 1)
    even = Trace(MoELayer(router, [FFNBank(D, [1] * 4).double()]), x, router(x))
    assert FirstChoiceBalance()(even).item() == pytest.approx(1.0)


def test_a_gate_without_tokens_is_well_defined() -> None:
    made, x = forced(own=False), tokens().requires_grad_()
    y, traces = made(x)
    loss = y.sum() + sum(FirstChoiceBalance()(trace) for trace in traces)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)
    assert all(not moe.router.score.weight.grad.any() for moe in list(made.passes)[1:])
    empty, traces = made(x[:0])
    assert empty.shape == (0, D) and float(idle_parameters(traces)) == E * 2 * D * WIDTH


def test_parameters_are_those_of_a_flat_mixture_and_gates_and_norms() -> None:
    flat = MoELayer(gate(E), [FFNBank(D, [WIDTH] * E, glu=False)])
    extra = {"paper": 3 * 2 * D, "code": 4 * 2 * D, "stacked": 0}
    for form, norms in extra.items():
        count = sum(p.numel() for p in layer(form=form).parameters())
        assert count == sum(p.numel() for p in flat.parameters()) + (5 + 2) * D + norms
    assert [name for name in layer().state_dict() if "w_" in name] == [
        "branches.0.w_in.weight",
        "branches.0.w_out.weight",
    ]


def test_padding_reaches_no_gate() -> None:
    made, x = layer(), tokens(12).view(3, 4, D)
    keep = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    y, traces = made(x, keep)
    alone, _ = made(x[keep])
    assert traces[0].n_tokens == int(keep.sum()) and not y[~keep].any()
    torch.testing.assert_close(y[keep], alone, **FLOAT64)


@pytest.mark.parametrize("select", [TopK(2), SampledSecond()])
def test_a_token_is_treated_alike_wherever_it_stands(select) -> None:
    made, x = layer(select=select), tokens(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(made(x[order])[0], made(x)[0][order], **FLOAT64)
    torch.testing.assert_close(made(x[:7])[0], made(x)[0][:7], **FLOAT64)


def test_moving_experts_within_their_strata_changes_nothing() -> None:
    made, x = layer(), tokens()
    before, _ = made(x)
    made.reindex(torch.tensor([1, 0, 4, 2, 3, 6, 5]))
    torch.testing.assert_close(made(x)[0], before, **FLOAT64)
    made.reindex(torch.tensor([0, 2, 3, 4, -1, 5, 6, -1]))
    assert made.strata == (1, 4, 3)
    _, traces = made(x)
    assert [trace.routing.n_experts for trace in traces] == [8, 7, 3]
    with pytest.raises(ValueError, match=r"index=\[2, 0, 5\] puts strata \[1, 0, 2\]"):
        layer().reindex(torch.tensor([2, 0, 5]))
    with pytest.raises(ValueError, match="shared by several routers"):
        made.passes[1].reindex(torch.arange(7))


def test_in_a_decoder_every_pass_leaves_a_trace_under_its_name() -> None:
    model = Transformer(11, D, [Block(D, Attention(D, n_heads=1), layer())]).double()
    text = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    output = model(text)
    assert list(model.moe_layers()) == [f"blocks.0.ffn.passes.{i}" for i in range(3)]
    assert [id(t.layer) for t in output.traces] == [id(moe) for moe in model.moe_layers().values()]
    model.recompute = True
    torch.testing.assert_close(model(text).logits, output.logits, **FLOAT64)
    prefix = model(text[:, :5]).logits
    torch.testing.assert_close(prefix, output.logits[:, :5], **FLOAT64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strata": []}, r"strata=\[\], allowed: at least one stratum"),
        ({"strata": [3, 0, 4]}, r"strata=\[3, 0, 4\], allowed: at least one stratum, none empty"),
        ({"strata": [3, 3]}, r"strata=\[3, 3\] are 6 experts, FFNBank 7"),
        ({"branches": [SharedExpert(D, 4)]}, r"branches=\['SharedExpert'\], allowed: banks of experts, only"),
        ({"router": lambda n_experts: SlotRouter(D, n_experts)}, "router=SlotRouter looks at other tokens"),
        ({"strata": [6, 1]}, "top_k=2 > 1 experts"),
        ({"strata": [6, 1], "router": partial(gate, select=SampledSecond())}, "a second expert of 1, allowed: at leas"),
    ],
)
def test_impossible_layers_are_refused(changes, message) -> None:
    plain = {"strata": STRATA, "router": gate, "branches": [FFNBank(D, [1] * E)]}
    with pytest.raises(ValueError, match=message):
        StratifiedLayer(D, **{**plain, **changes})


def test_any_banks_can_be_stratified() -> None:
    made = StratifiedLayer(D, STRATA, gate, [FFNBank(D, [1] * E), CopyBank(E)])
    y, traces = made(torch.randn(9, D))
    assert torch.isfinite(y).all() and traces[1].layer.expert_widths().tolist() == [1.0] * 5


def test_requested_capacity_is_reported_layer_by_layer() -> None:
    torch.manual_seed(0)
    model = Transformer(11, D, [Block(D, Attention(D, n_heads=1), layer().float())])
    batches = list(Counting().val_batches(4))
    ((name, figures),) = capacity_report(model, batches).items()
    capacity = torch.cat([passes_of(model(batch.tokens).traces) for batch in batches]).double()
    assert name == "blocks.0.ffn" and figures["mean"] == pytest.approx(float(capacity.mean()))
    shares = [float((capacity == n).double().mean()) for n in (1, 2, 3)]
    assert figures["passes"] == pytest.approx(shares)
    assert sum(figures["by_frequency"]) / 4 == pytest.approx(figures["mean"], abs=0.05)
    report = routing_report(model, batches)
    assert sum(entry["routed"] for entry in report.values()) == int(capacity.sum())
    assert {entry["tokens"] for entry in report.values()} == {len(capacity)}
    spent = spending(model, batches)
    assert spent["experts"] == pytest.approx(2 * figures["mean"])
    assert capacity_report(Transformer(11, D, [Block(D, Attention(D, 1), DenseFFN(D, 4))]), batches) == {}
