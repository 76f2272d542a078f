"""Omni-SMoLA (arXiv:2312.00968): soft mixtures of low-rank experts around linear maps.

| check of the specification | test |
|---|---|
| 1 fresh adapters change nothing; a frozen base stays | test_fresh_adapters_change_nothing, test_only_adapters_learn |
| 2 token mixing = its definition = a gated LoRA | test_token_mixing_equals_reference |
| 3 identical experts = one LoRA | test_identical_experts_are_one_lora |
| 4 one expert | test_one_expert |
| 5 sums of slot weights | test_slot_mixing_equals_reference |
| 6 order of tokens and experts | test_order_does_not_matter |
| 7 padding | test_padding_changes_nothing |
| 8 groups see their own tokens alone | test_groups_see_their_own_tokens |
| 9 causality; slots are refused | test_slots_look_ahead_and_are_refused |
| 10 a step at a time = all at once | test_a_step_at_a_time |
| 11 numbers of parameters, costs | test_counts |
| 12 merging | test_merging |
| 13 gradients at the start | test_gradients_at_the_start |
"""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from moestro.experts import LowRankBank
from moestro.layers import AdaptedLinear, Adapters, LowRankMixtures, adapt, adapters_of
from moestro.layers.adapted import TokenFacts, soft
from moestro.model import Cache, Transformer
from moestro.routers import LinearScore, Router, ScoredRouter, SlotRouter, Soft, TopK, UniformRouter
from moestro.train import train
from moestro.train.weights import load_adapters, save_adapters
from tests.reference import smola as reference
from tests.tolerances import FLOAT64
from tests.train.tiny import VOCABULARY, Counting, tiny_model, tiny_settings

D_IN, D_OUT, E, R, T = 5, 4, 3, 2, 7
close = torch.testing.assert_close
TARGETS = r"attention\.|expert\."


def slots(d_model: int, n_experts: int, each: int = 2) -> Router:
    return SlotRouter(d_model, n_experts, each, normalized=True)


def uniform(d_model: int, n_experts: int) -> Router:
    return UniformRouter(d_model, n_experts)


def top_1(d_model: int, n_experts: int) -> Router:
    return ScoredRouter(LinearScore(d_model, n_experts, init_std=1.0), TopK(1, renormalize=False))


def closed(d_model: int, n_experts: int) -> ScoredRouter:
    """A single expert whose gate depends on the token."""
    return ScoredRouter(LinearScore(d_model, n_experts, init_std=1.0), Soft("sigmoid"))


def sharp(d_model: int, n_experts: int) -> Router:
    return ScoredRouter(LinearScore(d_model, n_experts, init_std=1.0), Soft())


def stirred(module: nn.Module) -> None:
    """Experts that do something."""
    for bank in module.modules():
        if isinstance(bank, LowRankBank):
            nn.init.normal_(bank.up, std=0.5)


def wrapped(router=sharp, n_experts: int = E, **values) -> tuple[AdaptedLinear, TokenFacts]:
    torch.manual_seed(3)
    told = TokenFacts()
    layer = LowRankMixtures(n_experts, R, router, **values).around(nn.Linear(D_IN, D_OUT), told)
    stirred(layer)
    return layer.double(), told


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (T,)), D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def delta(layer: AdaptedLinear, x: Tensor) -> Tensor:
    return layer(x) - layer.base(x)


def adapted(router=soft, kinds: tuple[str, ...] = ("dense", "moe"), **values) -> tuple[Transformer, Adapters]:
    model = tiny_model(kinds=kinds)
    return model, adapt(model, TARGETS, LowRankMixtures(E, R, router, **values))


def text(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, shape or (2, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("router", [soft, slots, uniform, top_1])
def test_fresh_adapters_change_nothing(router) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = nn.Linear(D_IN, D_OUT).to(dtype)
        layer = LowRankMixtures(E, R, router).around(base, TokenFacts())
        x = tokens(2, T).to(dtype)
        for mode in (True, False):
            y = layer.train(mode)(x)
            assert y.dtype == dtype and torch.equal(y, base(x))
        stirred(layer)
        assert not torch.equal(layer(x), base(x))


@pytest.mark.parametrize("times_experts", [False, True])
def test_token_mixing_equals_reference(times_experts: bool) -> None:
    """Values and gradients, and the same as a product with all A, one gate a rank, and one with all B."""
    layer, _ = wrapped(scale=0.7, times_experts=times_experts)
    mixture, x = layer.mixtures[0], tokens().requires_grad_()
    phi, bank = mixture.router.score.weight, mixture.bank
    have = delta(layer, x)
    want = 0.7 * (E if times_experts else 1) * reference.token_mixture(x, phi, bank.down, bank.up)
    close(have, want, **FLOAT64)
    slope = torch.linspace(-1, 1, have.numel(), dtype=torch.float64).view_as(have)
    leaves = [x, phi, bank.down, bank.up]
    for mine, theirs in zip(
        *(torch.autograd.grad((y * slope).sum(), leaves, retain_graph=True) for y in (have, want)), strict=True
    ):
        close(mine, theirs, **FLOAT64)
    gates = (x @ phi.T).softmax(-1).repeat_interleave(R, 1)
    close(((x @ bank.down.flatten(0, 1).T) * gates) @ bank.up.flatten(0, 1) * layer.scale, have, **FLOAT64)


def test_slot_mixing_equals_reference() -> None:
    """Each sequence of a batch by itself; tokens of a slot, and slots of a token, have weights that sum to 1."""
    layer, _ = wrapped(slots)
    x = tokens(2, T).requires_grad_()
    mixture = layer.mixtures[0]
    with torch.no_grad():
        mixture.router.scale.fill_(3.0)
    phi, scale, bank = mixture.router.score.weight, mixture.router.scale, mixture.bank
    have = delta(layer, x)
    want = torch.stack([reference.slot_mixture(each, phi, scale, bank.down, bank.up) for each in x])
    close(have, want, **FLOAT64)
    leaves = [x, phi, scale, bank.down, bank.up]
    for mine, theirs in zip(
        *(torch.autograd.grad(y.pow(3).sum(), leaves, retain_graph=True) for y in (have, want)), strict=True
    ):
        close(mine, theirs, **FLOAT64)
    routing = mixture.router(x[0])
    close(routing.dispatch.sum(0), torch.ones_like(routing.dispatch[0]), **FLOAT64)
    close(routing.merge.flatten(1).sum(1), torch.ones(T, dtype=torch.float64), **FLOAT64)


def test_identical_experts_are_one_lora() -> None:
    layer, _ = wrapped()
    bank = layer.mixtures[0].bank
    with torch.no_grad():
        bank.down.copy_(bank.down[:1].clone().expand_as(bank.down))
        bank.up.copy_(bank.up[:1].clone().expand_as(bank.up))
    x = tokens()
    close(delta(layer, x), x @ bank.down[0].T @ bank.up[0], **FLOAT64)


def test_one_expert() -> None:
    layer, _ = wrapped(n_experts=1)
    bank, x = layer.mixtures[0].bank, tokens()
    close(delta(layer, x), x @ bank.down[0].T @ bank.up[0], **FLOAT64)
    one_slot, _ = wrapped(partial(slots, each=1), n_experts=1)
    rows = delta(one_slot, x)
    close(rows, rows[:1].expand_as(rows), **FLOAT64)
    assert rows.any()


@pytest.mark.parametrize("router", [sharp, slots])
def test_order_does_not_matter(router) -> None:
    layer, _ = wrapped(router)
    x, order = tokens(), torch.randperm(T, generator=torch.Generator().manual_seed(0))
    before = delta(layer, x)
    close(delta(layer, x[order]), before[order], **FLOAT64)
    for part in (layer.mixtures[0].router, layer.mixtures[0].bank):
        part.reindex(torch.tensor([2, 0, 1]))
    close(delta(layer, x), before, **FLOAT64)


def test_padding_changes_nothing() -> None:
    layer, told = wrapped(slots)
    x, padding = tokens(2, T), tokens(2, 3, seed=9)
    longer = torch.cat([x, padding], 1)
    assert not torch.allclose(delta(layer, longer)[:, :T], delta(layer, x))
    told.keep = torch.tensor([True] * T + [False] * 3).expand(2, -1)
    close(delta(layer, longer)[:, :T], delta(told_nothing(layer), x), **FLOAT64)
    assert not delta(layer, longer)[:, T:].any()


@pytest.mark.parametrize("router", [sharp, slots])
def test_tokens_in_one_row_are_those_of_their_sequences(router) -> None:
    """As experts inside a mixture see them."""
    layer, told = wrapped(router, groups=[None, 1])
    x = tokens(2, T)
    told.groups = torch.tensor([[0, 1, 1, 0, 0, 1, 2], [1, 1, 1, 1, 1, 1, 1]])
    close(delta(layer, x.flatten(0, 1)), delta(layer, x).flatten(0, 1), **FLOAT64)
    told.groups = told.groups[:0]
    assert layer(x[:0]).shape == (0, T, D_OUT)


def told_nothing(layer: AdaptedLinear) -> AdaptedLinear:
    """The same layer, told nothing."""
    twin = copy.deepcopy(layer)
    twin.told = TokenFacts()
    return twin


@pytest.mark.parametrize("router", [sharp, slots])
def test_groups_see_their_own_tokens(router) -> None:
    """Y = base + D_all(X) + 1_vis D_V(X_vis) + 1_txt D_T(X_txt): a group's part is that of its tokens alone."""
    layer, told = wrapped(router, groups=[None, 0, 1])
    x = tokens(2, T)
    group = torch.tensor([[0, 1, 1, 0, 0, 1, 2], [1, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="experts of group 0 were not told the groups of tokens"):
        layer(x)
    told.groups = group
    have = delta(layer, x)
    want = layer.mixtures[0](x, TokenFacts()).detach()
    for mixture, number in zip(layer.mixtures[1:], (0, 1), strict=True):
        for row, (sequence, ids) in enumerate(zip(x, group, strict=True)):
            mine = ids == number
            if mine.any():
                want[row, mine] += mixture(sequence[mine], TokenFacts(ids[mine])).detach()
    close(have, want, **FLOAT64)
    changed = x.clone()
    changed[0, group[0] == 1] += 1
    for mixture, others in ((layer.mixtures[1], group == 0),):
        assert torch.equal(mixture(changed, told)[others], mixture(x, told)[others])
    told.groups = group[:, :-1]
    with pytest.raises(ValueError, match=r"groups of \[2, 6\] tokens, here are \[2, 7\]"):
        layer(x)


def test_slots_look_ahead_and_are_refused() -> None:
    for router, causal in ((sharp, True), (top_1, True), (slots, False)):
        layer, _ = wrapped(router)
        x = tokens(1, T)
        changed = x.clone()
        changed[:, -1] += 1
        assert torch.equal(delta(layer, changed)[:, :-1], delta(layer, x)[:, :-1]) == causal
    model = tiny_model(kinds=("dense",))
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.query: SlotRouter looks at other tokens"):
        adapt(model, TARGETS, LowRankMixtures(E, R, slots))
    assert adapters_of(model) is None
    adapt(model, TARGETS, LowRankMixtures(E, R, slots), allow_non_causal=True)
    stirred(model)
    sequence = text(1, 6)
    other = sequence.clone()
    other[0, -1] = (other[0, -1] + 1) % VOCABULARY
    assert not torch.allclose(model(sequence).logits[:, :-1], model(other).logits[:, :-1])


def test_a_step_at_a_time() -> None:
    model, _ = adapted(sharp)
    stirred(model)
    model, sequence, cache = model.double().eval(), text(2, 6), Cache()
    steps = [model(sequence[:, i : i + 1], cache=cache).logits for i in range(6)]
    close(torch.cat(steps, 1), model(sequence).logits, **FLOAT64)


def test_counts() -> None:
    model, adapters = adapted()
    sizes = [(layer.base.in_features, layer.base.out_features) for layer in adapters.layers.values()]
    assert len(sizes) == 4 + 2 + 4
    assert sum(p.numel() for p in adapters.parameters()) == sum(E * R * (i + o) + i * E for i, o in sizes)
    plain = tiny_model(kinds=("dense", "moe"))
    output, bare = model(text()), plain(text())
    more = sum(2 * E * i + E * 2 * R * (i + o) for i, o in sizes)
    have, want = (float(m.flops(2, 6, o.traces).useful) for m, o in ((model, output), (plain, bare)))
    assert have == want + 12 * more
    assert model.expected_token_flops(6) == pytest.approx(plain.expected_token_flops(6) + more)
    slotted, _ = wrapped(slots)
    router, rows = 2 * T * 2 * E * (D_IN + D_IN + D_OUT), 2 * E
    assert float(slotted.flops(3, T).useful) == 3 * (router + rows * 2 * R * (D_IN + D_OUT))


def test_merging() -> None:
    x = text()
    for router, n_experts in ((uniform, E), (sharp, 1)):
        model = tiny_model(kinds=("dense", "dense")).double()
        adapters = adapt(model, TARGETS, LowRankMixtures(n_experts, R, router, scale=0.5))
        stirred(model.double())
        before = model(x).logits
        names = set(adapters.layers)
        assert adapters.merge() is model and adapters_of(model) is None
        close(model(x).logits, before, **FLOAT64)
        assert names <= {name for name, module in model.named_modules() if type(module) is nn.Linear}
    for router, n_experts in ((sharp, E), (closed, 1)):
        model = tiny_model(kinds=("dense", "dense")).double()
        adapters = adapt(model, TARGETS, LowRankMixtures(n_experts, R, router))
        stirred(model)
        weights = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match="gates depend on tokens"):
            adapters.merge()
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_tied_weights_are_not_merged() -> None:
    model = tiny_model(kinds=("dense",))
    model.head.weight = model.embedding.weight
    adapters = adapt(model, "head", LowRankMixtures(E, R, uniform))
    with pytest.raises(ValueError, match="head: its weight is tied to another module's"):
        adapters.merge()


def test_gradients_at_the_start() -> None:
    layer = LowRankMixtures(E, R, sharp).around(nn.Linear(D_IN, D_OUT), TokenFacts()).double()
    layer(tokens()).square().sum().backward()
    mixture = layer.mixtures[0]
    assert not mixture.bank.down.grad.any() and not mixture.router.score.weight.grad.any()
    assert all(gradient.any() for gradient in mixture.bank.up.grad)


def test_only_adapters_learn(tmp_path) -> None:
    """Of a frozen model the rest is as it was, to the last bit."""
    model, adapters = adapted()
    base = {name: p.clone() for name, p in model.named_parameters() if ".mixtures." not in name}
    before = {name: value.clone() for name, value in adapters.state_dict().items()}
    train(model, Counting(), tiny_settings(6), [], [], tmp_path)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())
    learnt = {name for name, value in adapters.state_dict().items() if not torch.equal(value, before[name])}
    assert learnt == {name for name in before if name.endswith(("weight", "down", "up"))}
    assert {id(p) for p in adapters.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_adapters_alone_are_saved_and_loaded(tmp_path) -> None:
    model, adapters = adapted(sharp)
    stirred(model)
    save_adapters(adapters, tmp_path / "adapters.safetensors")
    other, theirs = adapted(sharp)
    assert not torch.allclose(other(text()).logits, model(text()).logits)
    load_adapters(theirs, tmp_path / "adapters.safetensors")
    close(other(text()).logits, model(text()).logits)
    with theirs.disabled():
        assert torch.equal(other(text()).logits, tiny_model(kinds=("dense", "moe"))(text()).logits)
    plain = copy.deepcopy(other)
    adapters_of(plain).unwrap()
    assert plain.state_dict().keys() == tiny_model(kinds=("dense", "moe")).state_dict().keys()
    with pytest.raises(ValueError, match=r"down is \[3, 2, 8\] here, \[3, 4, 8\] in what is loaded"):
        bigger = tiny_model(kinds=("dense", "moe"))
        theirs.load_state_dict(adapt(bigger, TARGETS, LowRankMixtures(E, 4)).state_dict())


def test_groups_reach_every_layer() -> None:
    model, adapters = adapted(sharp, groups=[0, 1])
    stirred(model)
    x, group = text(), torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]])
    with adapters.given(groups=group):
        have = model(x).logits
    with adapters.given(groups=torch.full_like(group, 7)), adapters.disabled():
        plain = model(x).logits
    with adapters.given(groups=torch.full_like(group, 7)):
        assert torch.equal(model(x).logits, plain)
    assert not torch.allclose(have, plain)
    with pytest.raises(ValueError, match="were not told the groups"):
        model(x)


class Int8Linear(nn.Module):
    """Stands for the linear maps of quantisation libraries."""

    in_features, out_features = D_IN, D_OUT

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (D_OUT, D_IN), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x).T / 127


def test_a_quantised_base_is_called_and_nothing_else() -> None:
    quantised = nn.Sequential(Int8Linear())
    x = tokens().float()
    want = quantised(x)
    adapters = adapt(quantised, "0", LowRankMixtures(E, R))
    assert torch.equal(quantised(x), want)
    stirred(quantised)
    quantised(x).sum().backward()
    assert all(p.grad is not None for p in adapters.parameters())
    with pytest.raises(ValueError, match="is no matrix to which one could be added"):
        adapters.merge()


def test_what_is_refused() -> None:
    model = tiny_model(kinds=("dense",))
    with pytest.raises(ValueError, match=r"targets='nothing' matches no linear map; there are: blocks\.0\.attention"):
        adapt(model, "nothing", LowRankMixtures())
    adapt(model, TARGETS, LowRankMixtures())
    with pytest.raises(ValueError, match="has adapters already"):
        adapt(model, "head", LowRankMixtures())
    for wrong in ({"n_experts": 0}, {"rank": 0}, {"groups": []}):
        with pytest.raises(ValueError, match="allowed: at least 1 of each"):
            LowRankMixtures(**wrong)
    with pytest.raises(ValueError, match="up_std=-1"):
        LowRankBank(3, 2, up_std=-1)
    with pytest.raises(ValueError, match="Embedding is no linear map"):
        LowRankMixtures().around(nn.Embedding(3, 2), TokenFacts())
