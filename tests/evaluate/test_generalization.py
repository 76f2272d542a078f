"""The generalization bound (arXiv:2403.17404), term by term:

(a) k = T: `test_all_experts_leave_no_choice`; (b) monotone: `test_the_bound_moves_as_it_must`; (c) counts:
`test_the_papers_count_bounds_the_exact_one`; (d) numbers: `test_numbers_of_the_definition`; (e) T = 1:
`test_one_expert_is_the_classic_bound`; (f) scale: `test_an_experts_last_matrix_scales_its_complexity`; (g) refusals and
tags: `test_impossible_values_are_refused`, `test_what_no_theorem_covers_is_said`.
"""

import math

import pytest
import torch

from moestro import DenseFFN, FFNBank, LinearScore, MoELayer, ScoredRouter, SingletonBank, Soft, TopK, TopP
from moestro.evaluate.generalization import expert_term, log_choices, rademacher, router_term, sparse_factor
from moestro.evaluate.generalization_report import generalization_report
from moestro.experts import BankSlice, CopyBank, SharedExpert
from moestro.layers import MultiHeadLayer, StratifiedLayer
from moestro.model import Attention, Block, Transformer
from moestro.recipe.parts import PARTS
from moestro.routers import BiasedRouter, CosineScore, NoisyScore, ProductKeyRouter, Router, SampledSecond, SlotRouter
from moestro.routers.family import SelectionFamily
from moestro.routers.groups import GroupLimit
from tests.train.tiny import Counting

D = 8


def family(t: int, k: int | None, dimension: int | None = None, fixed: bool = True) -> SelectionFamily:
    return SelectionFamily(t, t, k, fixed, 256 * t if dimension is None else dimension)


@pytest.mark.parametrize(("k", "value"), [(1, 0.425), (2, 0.469), (4, 0.525), (8, 0.584), (16, 0.617)])
def test_numbers_of_the_definition(k, value) -> None:
    assert router_term([family(16, k)], 10**6) == pytest.approx(value, abs=5e-4)


def test_more_numbers_of_the_definition() -> None:
    ten = [router_term([family(16, k)], 10**7) for k in (1, 2, 4, 8, 16)]
    assert ten == pytest.approx([0.141, 0.154, 0.171, 0.190, 0.200], abs=6e-4)
    hundred = [router_term([family(16, k)], 10**8) for k in (1, 16)]
    assert hundred == pytest.approx([0.047, 0.065], abs=6e-4)
    pools = [router_term([family(t, 1)], 10**7) for t in (4, 8, 16, 32, 64)]
    assert pools == pytest.approx([0.066, 0.097, 0.141, 0.205, 0.298], abs=6e-4)
    exact = [log_choices(16, k, count="exact") for k in (1, 2, 4, 8, 12, 16)]
    assert exact == pytest.approx([2.77, 4.79, 7.51, 9.46, 7.51, 0.0], abs=5e-3)
    assert [log_choices(16, k) for k in (1, 2, 4, 8, 16)] == pytest.approx([3.77, 6.16, 9.55, 13.55, 16], abs=5e-3)


def test_all_experts_leave_no_choice() -> None:
    m, delta, d = 10**6, 0.05, 256 * 16
    exact = router_term([family(16, 16)], m, delta, "exact")
    assert exact == pytest.approx(2 * math.sqrt((d * math.log(2 * m) + math.log(4 / delta)) / (2 * m)))
    paper = router_term([family(16, 16)], m, delta, "paper")
    assert paper**2 - exact**2 == pytest.approx(4 * 2 * 16 * d / (2 * m))


def test_the_bound_moves_as_it_must() -> None:
    def rises(values: list[float]) -> bool:
        return values == sorted(values) and len(set(values)) == len(values)

    assert rises([router_term([family(16, k)], 10**6) for k in range(1, 17)])
    assert rises([router_term([family(t, 2, 4096)], 10**6) for t in (2, 4, 8, 64)])
    assert rises([router_term([family(16, 2, d)], 10**6) for d in (1, 10, 100)])
    assert rises([router_term([family(16, 2)], 10**6, delta) for delta in (0.5, 0.1, 0.01)])
    assert rises([router_term([family(16, 2)], m) for m in (10**7, 10**6, 10**5)])
    assert rises([router_term([family(16, 2)] * n, 10**6) for n in (1, 2, 3)])
    assert rises([expert_term(r, c) for r, c in ((0.1, 1.0), (0.2, 1.0), (0.2, 2.0))])
    assert rises([sparse_factor(16, k, 100) for k in range(1, 17)])


def test_the_papers_count_bounds_the_exact_one() -> None:
    for t in range(1, 41):
        for k in range(1, t + 1):
            slack = 1e-9
            assert log_choices(t, k) + slack >= log_choices(t, k, count="exact")
            assert log_choices(t, k) + slack >= log_choices(t, k, fixed=False, count="exact")
        assert log_choices(t, None) == pytest.approx(t * math.log(2)) == log_choices(t, None, count="exact")


def test_one_expert_is_the_classic_bound() -> None:
    m, delta = 1000, 0.1
    bound = expert_term(0.3, 2.0) + router_term([family(1, 1, 0)], m, delta)
    assert bound == pytest.approx(4 * 2.0 * 0.3 + math.sqrt(2 * math.log(4 / delta) / m))


def test_complexity_of_a_network() -> None:
    assert rademacher([2.0, 3.0], 5.0, 100) == pytest.approx(5 * (math.sqrt(4 * math.log(2)) + 1) * 6 / 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_choices(4, 5), "k=5, allowed: 1 to 4"),
        (lambda: log_choices(4, 0), "k=0, allowed: 1 to 4"),
        (lambda: router_term([family(4, 2)], 0), "m=0, allowed: at least 1 unit"),
        (lambda: router_term([family(4, 2)], 10, 1.0), "delta=1.0, allowed: between 0 and 1"),
        (lambda: sparse_factor(4, 5, 10), "k=5, allowed: above 0, up to 4"),
        (lambda: rademacher([], 1.0, 10), r"norms=\[\], allowed: that of at least one matrix"),
        (
            lambda: router_term([SelectionFamily(4, 4, 2, True, 8, (), applicable=False)], 10),
            "the bound says nothing of selections that depend on other tokens",
        ),
    ],
)
def test_impossible_values_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def scored(select, n: int = 6) -> ScoredRouter:
    return ScoredRouter(LinearScore(D, n, init_std=1.0), select)


def test_families_of_routers() -> None:
    assert scored(TopK(2)).selection_family() == SelectionFamily(6, 6, 2, True, 48)
    assert scored(Soft()).selection_family() == SelectionFamily(6, 6, 6, True, 48)
    assert scored(TopK(2, limit=GroupLimit(n_groups=1))).selection_family().heuristic == ()
    assert scored(TopK(2, limit=GroupLimit(n_groups=3, top_groups=2))).selection_family().heuristic != ()
    resting = scored(TopK(2))
    resting.set_available(torch.arange(6) < 4)
    assert resting.selection_family() == SelectionFamily(4, 6, 2, True, 48)


@pytest.mark.parametrize(
    ("router", "most", "said"),
    [
        (scored(TopP(0.5)), None, "TopP does not choose a set of best scores"),
        (scored(SampledSecond()), 2, "the second expert is drawn"),
        (ScoredRouter(CosineScore(D, 6), TopK(2)), 2, "CosineScore is not linear"),
        (ScoredRouter(NoisyScore(D, 6), TopK(2)), 2, "NoisyScore is not linear"),
        (BiasedRouter(LinearScore(D, 6), top_k=3), 3, "scores are biased"),
        (ProductKeyRouter(D, 16, heads=2, top_k=3, d_key=4), 6, "product keys"),
    ],
)
def test_what_no_theorem_covers_is_said(router: Router, most, said) -> None:
    found = router.selection_family()
    assert found.most == most and found.applicable and any(said in remark for remark in found.heuristic)


def test_unknown_routers_are_heuristic_and_slots_have_no_bound() -> None:
    class Mine(SlotRouter):
        causal = True

    found = Mine(D, 6).selection_family()
    assert found.most is None and found.dimension == D * 6 and "Mine: any set of experts" in found.heuristic[0]
    assert not SlotRouter(D, 6).selection_family().applicable
    assert set(PARTS["router"]) >= {"scored", "biased", "product_key", "slots"}


def test_norms_of_experts() -> None:
    bank = FFNBank(D, [3, 0, 5], activation="relu", glu=False)
    norms = bank.norms()
    inner, outer = bank.w_in.matrices()[2].detach(), bank.w_out.matrices()[2].detach()
    assert norms.frobenius[2].tolist() == pytest.approx([float(inner.norm()), float(outer.norm())])
    assert norms.spectral[2, 0].item() == pytest.approx(float(torch.linalg.svdvals(inner)[0]), rel=1e-5)
    assert norms.frobenius[1].tolist() == [0.0, 0.0] == norms.spectral[1].tolist() and norms.heuristic == ()
    assert any("gated" in remark for remark in FFNBank(D, [3]).norms().heuristic)
    single = SingletonBank(D, 4)
    want = [float(single.up[1].detach().norm()), float(single.down[1].detach().norm())]
    assert single.norms().frobenius[1].tolist() == pytest.approx(want)
    assert CopyBank(2).norms() is None
    assert torch.equal(BankSlice(bank, 1).norms().frobenius, norms.frobenius[1:])
    assert torch.equal(BankSlice(bank, 1).norms().spectral, norms.spectral[1:])


def model(*layers) -> Transformer:
    torch.manual_seed(0)
    return Transformer(11, D, [Block(D, Attention(D, n_heads=2), layer) for layer in layers])


def moe(select=None, branches=None) -> MoELayer:
    return MoELayer(scored(select or TopK(2)), branches or [FFNBank(D, [3] * 6, activation="relu", glu=False)])


def report(of: Transformer, **options):
    return generalization_report(of, Counting().val_batches(4), {"tokens": 10**6, "sequences": 10**4}, **options)


def test_the_report_is_made_of_the_terms() -> None:
    made = model(moe(), DenseFFN(D, 4), moe(TopK(1, renormalize=False)))
    found = report(made, delta=0.1, lipschitz=2.0)
    first, second = found["layers"].values()
    assert (first["n_experts"], first["most"], first["dimension"]) == (6, 2, 48)
    assert first["mixture_mass"] == pytest.approx(1.0) and 0 < second["mixture_mass"] < 1
    assert first["mean_k"] == 2 and first["sparse_factor"]["tokens"] == sparse_factor(6, 2, 10**6)
    for unit, m in (("tokens", 10**6), ("sequences", 10**4)):
        for count in ("paper", "exact"):
            terms = found["bounds"][unit][count]
            assert terms["router"] == router_term([family(6, 2, 48), family(6, 1, 48)], m, 0.1, count)
            assert terms["router_without_patterns"] < terms["router"]
            assert terms["total"] == terms["router"] + terms["experts"]
            worst = max(layer["norm_product"]["frobenius"] * layer["input_norm"] for layer in (first, second))
            assert terms["experts"] == pytest.approx(expert_term(rademacher([worst, 1.0], 1.0, m), 2.0))
            assert terms["experts_spectral"] < terms["experts"]
    assert len(found["heuristic"]) == 6 and len(report(model(moe()))["heuristic"]) == 4


def test_an_experts_last_matrix_scales_its_complexity() -> None:
    made = model(moe())
    before = report(made)["bounds"]["tokens"]["paper"]["experts"]
    bank = next(iter(made.moe_layers().values())).bank
    bank.w_out.weight.data.mul_(3)
    assert report(made)["bounds"]["tokens"]["paper"]["experts"] == pytest.approx(3 * before)


def test_gates_that_sum_to_more_count() -> None:
    made = model(MoELayer(BiasedRouter(LinearScore(D, 6, init_std=1.0), top_k=4), [FFNBank(D, [3] * 6)]))
    (layer,) = (found := report(made))["layers"].values()
    assert layer["mixture_mass"] > 1.5
    complexity = rademacher([layer["norm_product"]["frobenius"], 1.0], layer["input_norm"], 10**6)
    assert found["bounds"]["tokens"]["paper"]["experts"] == pytest.approx(4 * complexity * layer["mixture_mass"])


def test_passes_and_parts_are_routers_of_their_own() -> None:
    strata = StratifiedLayer(D, [2, 4], lambda n_experts: scored(TopK(2), n_experts), [FFNBank(D, [3] * 6)])
    found = report(model(strata))
    assert [layer["n_experts"] for layer in found["layers"].values()] == [6, 4]
    assert list(found["units"]) == ["tokens", "sequences"]

    def inner(d_model: int) -> MoELayer:
        return MoELayer(ScoredRouter(LinearScore(d_model, 6), TopK(2)), [FFNBank(d_model, [3] * 6)])

    found = report(model(MultiHeadLayer(D, 2, inner)))
    (layer,) = found["layers"].values()
    assert layer["dimension"] == 6 * D // 2 and layer["parts_per_token"] == 2
    assert found["units"]["parts"] == 2 * 10**6 and found["heuristic"][-1].startswith("parts of a token")
    tokens, parts = (found["bounds"][unit]["paper"] for unit in ("tokens", "parts"))
    assert parts["router"] < tokens["router"] and parts["experts"] == tokens["experts"]


def test_banks_of_one_layer_add_up_and_shared_experts_are_named() -> None:
    banks = [FFNBank(D, [3] * 6, activation="relu", glu=False) for _ in range(2)]
    found = report(model(moe(branches=[*banks, SharedExpert(D, 4)])))
    (layer,) = found["layers"].values()
    worst = [float(bank.norms().frobenius.prod(-1).max()) for bank in banks]
    assert layer["norm_product"]["frobenius"] == pytest.approx(sum(worst))
    assert "SharedExpert is left out of the expert term" in layer["heuristic"]


def test_without_a_limit_of_experts_the_sparse_factor_counts_all_sets() -> None:
    (layer,) = report(model(moe(TopP(0.5))))["layers"].values()
    assert layer["sparse_factor"]["tokens"] == pytest.approx(math.sqrt(6 * math.log(2) / 10**6))


def test_without_norms_there_is_no_expert_term_and_without_a_bound_none_is_given() -> None:
    copies = report(model(moe(branches=[CopyBank(6)])))
    assert copies["bounds"]["tokens"]["paper"]["experts"] is None is copies["bounds"]["tokens"]["paper"]["total"]
    partly = report(model(moe(), moe(branches=[CopyBank(6)])))["bounds"]["tokens"]["exact"]
    assert partly["experts"] is None is partly["total"] and partly["router"] > 0
    torch.manual_seed(0)
    slots = MoELayer(SlotRouter(D, 6), [FFNBank(D, [3] * 6)])
    mixing = Transformer(11, D, [Block(D, Attention(D, n_heads=2), slots)], allow_non_causal=True)
    found = report(mixing)
    assert found["bounds"] == {} and not next(iter(found["layers"].values()))["applicable"]
    with pytest.raises(ValueError, match="Transformer has no mixture layers"):
        report(model(DenseFFN(D, 4)))
