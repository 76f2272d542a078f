"""Decoders of transformers with our layers inside: the same bits, traces, packed text, caches, training."""

import copy

import pytest
import torch

from moestro.experts import FFNBank
from moestro.hf import Hosted
from moestro.layers import DenseFFN, LowRankMixtures, MoELayer, adapt
from moestro.objectives import LoadBalance
from moestro.ops import backend
from moestro.routers import ExpertChoice, LinearScore, ResidualRouter, ScoredRouter, SlotRouter, TopK
from moestro.train.rules import BiasBalance
from tests.hf.families import DENSE, MOE, some_tokens, tiny
from tests.tolerances import FLOAT32

FAMILIES = [*MOE, *DENSE]


def mixture(widths=(8, 16, 24)) -> MoELayer:
    return MoELayer(ScoredRouter(LinearScore(32, len(widths)), TopK(2)), [FFNBank(32, widths)])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_eager_s_bits_and_every_mixture_leaves_a_trace(family):
    with torch.no_grad():
        want = tiny(family)(some_tokens()).logits
        model = Hosted(tiny(family)).eval()
        with backend.force("reference"):
            found = model(some_tokens())
    assert torch.equal(found.logits, want)
    assert len(found.traces) == len(model.moe_layers()) == model.n_mixtures()
    assert [trace.layer for trace in found.traces] == list(model.moe_layers().values())
    assert all(float(trace.experts_per_token().min()) == 2 for trace in found.traces)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_there_once_and_comes_back(family, tmp_path):
    stock = tiny(family)
    state = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model = Hosted(stock).eval()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny(family).parameters())
    assert all(name.startswith(("decoder.", "blocks.")) for name in model.state_dict())
    with model.stock() as again, torch.no_grad():
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
        assert torch.equal(again(some_tokens()).logits, tiny(family)(some_tokens()).logits)
        again.save_pretrained(tmp_path)
    assert "gate" not in "".join(name for name, _ in model.decoder.named_parameters())
    copied = type(stock).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(copied[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "jamba"])
def test_packed_documents_do_not_see_each_other(family):
    model = Hosted(tiny(family)).eval()
    tokens = some_tokens(1, 12)
    documents = torch.tensor([[7] * 3 + [8] * 1 + [9] * 8])
    with torch.no_grad():
        packed = model(tokens, documents=documents).logits
        apart = [model(tokens[:, a:b]).logits for a, b in ((0, 3), (3, 4), (4, 12))]
    torch.testing.assert_close(packed, torch.cat(apart, 1), **FLOAT32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_continues_what_came_before(family):
    model, tokens = Hosted(tiny(family)).eval(), some_tokens(2, 9)
    with torch.no_grad():
        want = model(tokens).logits
        cache = model.new_cache()
        have = [model(tokens[:, :5], cache=cache).logits]
        have += [model(tokens[:, i : i + 1], cache=cache).logits for i in range(5, 9)]
    torch.testing.assert_close(torch.cat(have, 1), want, **FLOAT32)
    with pytest.raises(ValueError, match="exclude each other"):
        model(tokens, documents=torch.zeros_like(tokens), cache=model.new_cache())


def test_padding_reaches_no_router():
    model, tokens = Hosted(tiny("qwen3_moe")).eval(), some_tokens()
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[1, 7:] = False
    with torch.no_grad():
        padded, whole = model(tokens, keep=keep), model(tokens)
    assert all(trace.n_tokens == 19 for trace in padded.traces)
    torch.testing.assert_close(padded.logits[keep], whole.logits[keep], **FLOAT32)


def test_layers_of_ours_take_the_place_of_blocks():
    torch.manual_seed(0)
    ours = mixture()
    model = Hosted(tiny("llama"), {1: ours})
    assert list(model.moe_layers()) == ["blocks.1.ffn"] and isinstance(model.blocks[0].ffn, DenseFFN)
    found = model(some_tokens())
    assert found.traces[0].layer is ours and float(found.traces[0].routing.load().sum()) == 48
    (found.logits.square().mean() + LoadBalance()(found.traces[0])).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="layer 1 is no longer the LlamaMLP of llama"), model.stock():
        pass
    # a layer may be exchanged later, as in a decoder of ours
    model.blocks[0].ffn = mixture((4, 4))
    assert [trace.layer.router.n_experts for trace in model(some_tokens()).traces] == [2, 3]


def test_a_router_may_follow_the_one_before():
    torch.manual_seed(0)
    layers = {i: MoELayer(ResidualRouter(LinearScore(32, 3), TopK(2)), [FFNBank(32, [8, 8, 8])]) for i in (0, 1)}
    model = Hosted(tiny("qwen2"), layers)
    alone = Hosted(tiny("qwen2"), {1: layers[1]})
    first, second = (model(some_tokens()).traces for _ in range(2))
    assert torch.equal(first[1].routing.weight, second[1].routing.weight)
    assert not torch.equal(first[1].routing.weight, alone(some_tokens()).traces[0].routing.weight)
    with pytest.raises(ValueError, match="recompute: true with a layer that follows"):
        model.recompute = True


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "gpt2"])
def test_recomputation_changes_no_gradient(family):
    model = Hosted(tiny(family)).train()
    if family == "gpt2":
        model.decoder.config.resid_pdrop = 0.0
        [setattr(m, "p", 0.0) for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[0, 9:] = False

    def gradients(recompute: bool):
        model.recompute = recompute
        model.zero_grad()
        found = model(some_tokens(), keep=keep)
        loss = found.logits[keep].square().mean() + sum(LoadBalance()(trace) for trace in found.traces)
        loss.backward()
        return [p.grad for p in model.parameters()], found

    (want, plain), (have, again) = gradients(False), gradients(True)
    assert model.decoder.is_activation_checkpointing and torch.equal(plain.logits, again.logits)
    for mine, theirs in zip(have, want, strict=True):
        torch.testing.assert_close(mine, theirs, **FLOAT32)


def test_what_is_computed_again_is_told_what_it_was_told_first_and_leaves_nothing():
    """Also where another forward pass lies between one and its backward pass."""
    model = Hosted(tiny("mixtral")).train()
    keep = torch.ones(2, 2, 12, dtype=torch.bool)
    keep[0, 0, 5:], keep[1, 1, 3:] = False, False

    def gradients(recompute: bool):
        model.recompute = recompute
        model.zero_grad()
        for found in [model(some_tokens(), keep=each) for each in keep]:
            (found.logits.square().mean() + LoadBalance()(found.traces[0])).backward()
        return [p.grad for p in model.parameters()]

    for mine, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(mine, theirs, **FLOAT32)
    assert model.traces is None and model.keep is None


def test_adapters_count_and_look_ahead_as_in_a_decoder_of_ours():
    model, plain = Hosted(tiny("llama")), Hosted(tiny("llama"))
    adapters = adapt(model, r"q_proj|up$", LowRankMixtures(3, 2))
    sizes = [(layer.base.in_features, layer.base.out_features) for layer in adapters.layers.values()]
    assert sizes == 2 * [(32, 32)] + 2 * [(32, 40)]
    more = sum(2 * 3 * i + 3 * 2 * 2 * (i + o) for i, o in sizes)
    assert model.expected_token_flops(12) == pytest.approx(plain.expected_token_flops(12) + more)
    assert float(model.flops(2, 12, ()).useful) == pytest.approx(float(plain.flops(2, 12, ()).useful) + 24 * more)
    assert model.causal
    adapters.unwrap()
    slots = LowRankMixtures(3, 2, lambda d_model, n_experts: SlotRouter(d_model, n_experts))
    adapt(model, "q_proj", slots, allow_non_causal=True)
    assert not model.causal


def test_costs_of_a_llama_are_those_of_its_matrices():
    model = Hosted(tiny("llama"))
    found = model(some_tokens())
    blocks = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 40)
    projections = 2.0 * 24 * (blocks + 32 * 128)
    square = 4.0 * 2 * 2 * 32 * 12 * 12
    cost = model.flops(2, 12, found.traces)
    assert cost.computed == projections + square
    assert cost.useful == pytest.approx(projections + square * 13 / 24)
    assert model.expected_token_flops(12) == pytest.approx(cost.useful / 24)
    assert model.active_parameters(()) == sum(p.numel() for p in model.parameters())


def test_costs_of_a_mixture_count_the_experts_that_are_used():
    model = Hosted(tiny("mixtral"))
    found = model(some_tokens())
    idle = 2 * 2 * 3 * 32 * 24
    assert model.active_parameters(found.traces) == sum(p.numel() for p in model.parameters()) - idle
    assert float(model.flops(2, 12, found.traces).useful) == pytest.approx(24 * model.expected_token_flops(12))


def test_a_copy_is_a_model_of_its_own():
    model = Hosted(tiny("olmoe")).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].ffn.bank.gate_up.zero_()
        other.blocks[1].ffn.bank.gate_up.zero_()
        assert not torch.equal(other(some_tokens()).logits, model(some_tokens()).logits)
        assert torch.equal(model(some_tokens()).logits, Hosted(tiny("olmoe")).eval()(some_tokens()).logits)


def test_what_cannot_be_hosted_is_refused():
    with pytest.raises(ValueError, match="layer 5, allowed: 0 to 1"):
        Hosted(tiny("llama"), {5: mixture()})
    looks_ahead = MoELayer(ScoredRouter(LinearScore(32, 2), ExpertChoice(1.0)), [FFNBank(32, [8, 8])])
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn: ScoredRouter looks at other tokens.*allow_non_causal"):
        Hosted(tiny("llama"), {0: looks_ahead})
    assert not Hosted(tiny("llama"), {0: looks_ahead}, allow_non_causal=True).causal
    moved = Hosted(tiny("mixtral"))
    moved.blocks[0].ffn.reindex(torch.tensor([3, 2, 1, 0]))
    with pytest.raises(ValueError, match="layer 0 is no longer the MixtralSparseMoeBlock"), moved.stock():
        pass
    switched = Hosted(tiny("mixtral"))
    switched.blocks[1].ffn.router.set_available(torch.tensor([True, True, False, True]))
    with pytest.raises(ValueError, match="layer 1 is no longer"), switched.stock():
        pass


def test_a_rule_moves_deepseek_s_own_bias_and_the_stock_model_has_it():
    model = Hosted(tiny("deepseek_v3")).train()
    before = model.moe_layers()["blocks.1.ffn"].router.bias.clone()
    rule = BiasBalance(rate=0.25)
    found = model(some_tokens())
    rule.observe(found.traces[0])
    rule.apply(1)
    with model.stock() as stock:
        after = stock.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"]
    load = found.traces[0].routing.load()
    torch.testing.assert_close(after - before, 0.25 * (load.mean() - load).sign(), **FLOAT32)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_released_decoder_generates_and_holds_all_its_tensors(replaced):
    torch.manual_seed(0)
    model = Hosted(tiny("gpt_oss"), {1: mixture()} if replaced else {}).eval()
    want = model(some_tokens(1, 5)).logits
    hosted_says = model.decoder.generate(some_tokens(1, 5), max_new_tokens=6, do_sample=False)
    assert model.traces is None
    n_parameters = sum(p.numel() for p in model.parameters())
    decoder = model.release()
    assert sum(p.numel() for p in decoder.parameters()) == n_parameters
    torch.testing.assert_close(decoder(some_tokens(1, 5)).logits, want, **FLOAT32)
    assert torch.equal(decoder.generate(some_tokens(1, 5), max_new_tokens=6, do_sample=False), hosted_says)
    assert decoder.double()(some_tokens(1, 5)).logits.dtype == torch.float64
