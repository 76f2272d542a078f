"""One table of values in several layers, gated by the input (Memory+), and layers one after another: against the
equations, in float64; the table held, counted, trained and saved once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moestro.experts import FFNBank, ValueBank
from moestro.layers import DenseFFN, InputGatedLayer, Layer, MoELayer, SequenceLayer
from moestro.model import Attention, Block, Transformer
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import Recipe, load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import LinearScore, ProductKeyRouter, ResidualRouter, TopK
from moestro.train.optim import build_optimizer, clip_gradients
from moestro.train.tensors import load_model, load_optimizer, model_tensors, optimizer_tensors
from tests.conftest import ROOT
from tests.reference import hmoe, peer, transformer
from tests.systems.peer_layers import D, copy, random
from tests.tolerances import FLOAT32, FLOAT64

close = torch.testing.assert_close
HEADS, K, N = 2, 3, 16
RECIPE = ROOT / "recipes" / "memory_plus.yaml"
SMALL = ["model.d_model=16", "model.ffn.width=8", "model.shared_banks.memory.n_experts=256"]


def memory(bank: ValueBank) -> InputGatedLayer:
    router = ProductKeyRouter(D, N, HEADS, K, 6, query_norm="none")
    return InputGatedLayer(D, MoELayer(router, [bank])).double()


def memory_reference(layer: InputGatedLayer, x: Tensor, leaves: dict[str, Tensor], values: Tensor) -> Tensor:
    """y_t = W_out (m_t * silu(W_gate x_t)), m_t the gated sum of values."""
    first, second = leaves["layer.router.keys"].squeeze(1)
    q = peer.queries(x, leaves["layer.router.query"])
    read, _, _ = peer.mixture(x, q, first, second, lambda _, i: values[i], heads=HEADS, k=K)
    gates = [hmoe.silu(leaves["w_gate.weight"] @ x_t) for x_t in x]
    return torch.stack([leaves["w_out.weight"] @ (m * g) for m, g in zip(read, gates, strict=True)])


@pytest.mark.parametrize("sparse", [True, False])
def test_two_layers_that_share_a_table_equal_reference(sparse: bool) -> None:
    """Outputs, and every gradient: the table's is the sum of both layers'."""
    bank = ValueBank(D, N, sparse_gradients=sparse).double()
    layers, x, cotangent = [memory(bank), memory(bank)], random(7, D), random(7, D)
    values = copy(bank.values)
    leaves = [{name: copy(p) for name, p in layer.named_parameters()} for layer in layers]
    ours, theirs = copy(x), copy(x)
    y, want = ours, theirs
    for layer, weights in zip(layers, leaves, strict=True):
        y = layer(y)[0]
        want = memory_reference(layer, want, weights, values)
    close(y, want, **FLOAT64)
    y.backward(cotangent)
    want.backward(cotangent)
    close(ours.grad, theirs.grad, **FLOAT64)
    close(bank.values.grad.to_dense(), values.grad, **FLOAT64)
    for layer, weights in zip(layers, leaves, strict=True):
        for name, parameter in layer.named_parameters():
            if "values" not in name:
                close(parameter.grad, weights[name].grad, **FLOAT64, msg=lambda m, name=name: f"{name}: {m}")


def test_padding_stays_zero_and_reaches_no_value() -> None:
    layer, x = memory(ValueBank(D, N).double()), random(2, 4, D)
    keep = torch.tensor([[True, True, False, True], [False, True, True, False]])
    y, (trace,) = layer(x, keep)
    assert not y[~keep].any() and trace.routing.n_tokens == 5
    close(y[keep], layer(x[keep])[0], **FLOAT64)


def test_flops_count_the_gate() -> None:
    layer = memory(ValueBank(D, N).double())
    inner = layer.layer.expected_token_flops()
    assert layer.expected_token_flops() == inner + 4 * D * D
    assert layer.untraced_flops(7).useful == 7 * 4 * D * D


def test_output_starts_at_the_scale_asked_for() -> None:
    router = ProductKeyRouter(128, 64 * 64, heads=4, top_k=16, d_key=32)
    layer = InputGatedLayer(128, MoELayer(router, [ValueBank(128, 64 * 64, heads=4, top_k=16)]))
    with torch.no_grad():
        y, _ = layer(torch.randn(1000, 128))
    assert abs(float(y.std()) / 0.6 - 1) < 0.1


def test_a_layer_that_owns_its_residual_cannot_be_gated() -> None:
    with pytest.raises(ValueError, match="SequenceLayer returns the residual stream"):
        InputGatedLayer(D, SequenceLayer(D, [DenseFFN(D, 3)]))


def shared_model(*overrides: str) -> Transformer:
    return build_model(load_recipe(RECIPE, [*SMALL, *overrides]), 20)


def tables(model: Transformer) -> list[ValueBank]:
    return [layer.bank for layer in model.moe_layers().values()]  # type: ignore[misc]


def test_a_recipe_s_layers_hold_one_bank() -> None:
    model = shared_model()
    first, second = tables(model)
    assert first is second and list(model.moe_layers()) == ["blocks.1.ffn.layer", "blocks.3.ffn.layer"]
    # its first layer told it how it is weighted: 4 heads, softmax over 16
    assert abs(first.values.std().item() / (0.6 * (16 / 4) ** 0.5) - 1) < 0.1
    stored, tied = model_tensors(model)
    assert (
        list(tied.items()) == [("blocks.3.ffn.layer.branches.0.values", "blocks.1.ffn.layer.branches.0.values")]
        and sum(id(t) == id(first.values) for t in stored.values()) == 1
    )
    assert sum(p is first.values for p in model.parameters()) == 1


@pytest.mark.parametrize("sparse", ["true", "false"])
def test_the_optimizer_trains_and_checkpoints_the_table_once(sparse: str) -> None:
    override = f"model.shared_banks.memory.sparse_gradients={sparse}"
    model, other = shared_model(override), shared_model(override, "train.seed=1")
    settings = build_training(load_recipe(RECIPE))[0].optim
    optimizer, fresh = build_optimizer(model, settings), build_optimizer(other, settings)
    (table, _) = tables(model)
    assert sum(p is table.values for group in optimizer.param_groups for p in group["params"]) == 1
    before = table.values.detach().clone()
    model(torch.randint(20, (2, 6))).logits.square().mean().backward()
    met = table.values.grad.to_dense().any(-1)
    optimizer.step()
    moved = (table.values.detach() != before * (1 - settings.lr * settings.weight_decay)).any(-1)
    assert met.any() and bool(moved[met].all())
    tensors, tied = model_tensors(model)
    load_model(other, {name: t.detach().clone() for name, t in tensors.items()}, tied)
    load_optimizer(other, fresh, optimizer_tensors(model, optimizer))
    assert torch.equal(tables(other)[1].values, table.values)
    assert torch.equal(fresh.state[tables(other)[0].values]["exp_avg"], optimizer.state[table.values]["exp_avg"])


def test_rows_without_a_gradient_tensor_are_those_with_one() -> None:
    """`fused_rows`: both layers leave their factors beside the one table, which moves by their sum."""
    ends, override = [], "model.shared_banks.memory.sparse_gradients=true"
    for fused in (False, True):
        model = shared_model(override)
        optimizer = build_optimizer(model, replace(build_training(load_recipe(RECIPE))[0].optim, fused_rows=fused))
        tokens = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(1))
        model(tokens).logits.square().mean().backward()
        assert (tables(model)[0].values.grad is None) is fused
        clip_gradients(model, 1.0)
        optimizer.step()
        ends.append(tables(model)[1].values.detach())
    close(ends[1], ends[0], **FLOAT32)
    assert (ends[0] != tables(shared_model(override))[0].values).any()


def test_active_parameters_count_the_table_once() -> None:
    """All but the values, and of them those that a token met in either layer."""
    model = shared_model().double()
    with torch.no_grad():
        traces = model(torch.randint(20, (2, 6))).traces
    total = sum(p.numel() for p in model.parameters())
    met = {(t, e) for trace in traces for t, e in zip(*map(Tensor.tolist, trace.routing.meetings()), strict=True)}
    assert float(model.active_parameters(traces)) == pytest.approx(total - 256 * 16 + len(met) * 16 / 12, rel=1e-6)


def test_written_recipes_keep_the_name_and_leave_the_facts_to_the_layer(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, SMALL)
    recipe.write(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    bank = again.tree["model"]["shared_banks"]["memory"]
    assert bank == {"kind": "value", "n_experts": 256, "output_std": 0.6, "sparse_gradients": False}
    assert again.tree["model"]["layers"][1]["layer"]["branches"] == [{"kind": "shared_bank", "name": "memory"}]
    assert torch.equal(*(tables(build_model(r, 20))[0].values for r in (recipe, again)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.layers.3.layer.branches.0.name=memry"],
            r"name='memry', allowed: memory .the keys of model.shared_banks.*layers.3.layer.branches.0.name",
        ),
        (
            ["model.shared_banks.other={kind: value, n_experts: 4}"],
            r"unknown key 'other'; allowed: memory \(command line: model.shared_banks.other\)",
        ),
        (
            ["model.shared_banks.memory={kind: valu, n_experts: 4}"],
            r"unknown kind 'valu'; did you mean 'value'.*model.shared_banks.memory.kind",
        ),
        (["model.layers.1.layer.branches=[{kind: shared_bank}]"], r"missing key 'name'.*layers.1.layer.branches.0"),
    ],
)
def test_names_that_lead_nowhere_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPE, overrides)


def inserted() -> tuple[SequenceLayer, list[Layer]]:
    layers: list[Layer] = [DenseFFN(D, 3), memory(ValueBank(D, N))]
    sequence = SequenceLayer(D, layers).double()
    with torch.no_grad():
        for norm in sequence.norms:
            norm.weight.add_(0.3 * torch.randn_like(norm.weight))
    return sequence, layers


def test_an_inserted_layer_has_a_residual_and_a_norm_of_its_own() -> None:
    sequence, (dense, extra) = inserted()
    x = random(2, 7, D)
    block = Block(D, Attention(D, n_heads=1, head_dim=4), sequence).double()
    positions = torch.arange(7)[None]
    stream = x + block.attention(block.attention_norm(x), positions)
    y, traces = block(x, positions)
    for norm, layer in zip(sequence.norms, (dense, extra), strict=True):
        normed = torch.stack([transformer.rms_norm(x_t, norm.weight, 1e-5) for x_t in stream.flatten(0, 1)]).view_as(
            stream
        )
        stream = stream + layer(normed)[0]
    close(y, stream, **FLOAT64)
    assert [trace.layer for trace in traces] == [extra.layer]
    assert sequence.expected_token_flops() == dense.expected_token_flops() + extra.expected_token_flops()
    assert sequence.untraced_flops(3) == dense.untraced_flops(3) + extra.untraced_flops(3)


def test_a_recipe_inserts_a_layer() -> None:
    layer = (
        "{kind: sequence, sublayers: [{kind: dense, width: 8}, {kind: moe, router: {kind: product_key, heads: 2, "
        "top_k: 2, d_key: 4}, branches: [{kind: singleton, n_experts: 16}]}]}"
    )
    recipe: Recipe = load_recipe(ROOT / "recipes" / "dense.yaml", ["model.d_model=16", f"model.layers.2={layer}"])
    model = build_model(recipe, 20)
    assert list(model.moe_layers()) == ["blocks.2.ffn.sublayers.1"]
    assert len(model(torch.randint(20, (2, 6))).traces) == 1


def test_a_router_follows_the_layer_before_it_in_a_sequence_and_through_a_gate() -> None:
    def moe() -> MoELayer:
        return MoELayer(ResidualRouter(LinearScore(D, 4, init_std=1.0), TopK(2)), [FFNBank(D, [2] * 4)])

    first, second, third = moe(), moe(), moe()
    sequence = SequenceLayer(D, [first, DenseFFN(D, 3), InputGatedLayer(D, second)]).double()
    third.double()
    x = random(5, D)
    assert sequence.follows and not SequenceLayer(D, [DenseFFN(D, 3)]).follows
    _, (before,) = third(x)
    for earlier in ((), (before,)):
        _, (one, two) = sequence(x, None, earlier)
        want = first.router(one.x, earlier[0].routing) if earlier else first.router(one.x)
        close(one.routing.logits, want.logits, **FLOAT64)
        close(two.routing.logits, second.router(two.x, one.routing).logits, **FLOAT64)
        assert not torch.allclose(two.routing.logits, second.router(two.x).logits)


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sublayers=\[\], allowed: at least one layer"):
        SequenceLayer(D, [])


def test_the_paper_s_sizes() -> None:
    """373 million parameters without the memories, whose blocks have queries, keys, gate and W_out instead; 1024^2
    values of 1024 numbers, once. And PEER's baseline: 1024^2 values in its middle block."""
    plus = build_model(load_recipe(ROOT / "recipes/paper/memory-plus-373m.yaml"), 32_000, "meta")
    values, d, key, heads = 1024**2 * 1024, 1024, 512, 4
    dense = 24 * (4 * d * d + 3 * d * 2816 + 2 * d) + 2 * 32_000 * d + d
    assert round(dense / 1e6) == 374
    each = heads * key * d + 2 * heads * 1024 * key // 2 + 2 * d * d
    assert list(plus.moe_layers()) == [f"blocks.{i}.ffn.layer" for i in (4, 12, 20)]
    assert sum(p.numel() for p in plus.parameters()) == dense - 3 * (3 * d * 2816 - each) + values
    pkm = build_model(load_recipe(ROOT / "recipes/paper/pkm-1m.yaml"), 32_000, "meta")
    ((name, layer),) = pkm.moe_layers().items()
    assert name == "blocks.5.ffn" and layer.router.rows_per_token() == 8 * 32
    assert sum(p.numel() for p in layer.bank.parameters()) == 1024**2 * 768
