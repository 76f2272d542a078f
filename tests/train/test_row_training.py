"""Training with sparse table gradients: clipping, accumulation, recomputation, checkpoints, and no table-sized work."""

import copy
import math

import pytest
import torch
from torch import nn

from moestro.experts import SingletonBank
from moestro.layers import MoELayer
from moestro.routers import ProductKeyRouter
from moestro.train import CheckpointError, Diverged, OptimSettings, ParameterGroup, train
from moestro.train.optim import build_optimizer, clip_gradients, set_learning_rate
from moestro.train.row_adamw import RowAdamW
from moestro.train.tensors import load_optimizer, optimizer_tensors
from tests.ops.test_singleton_rows import largest_allocation
from tests.tolerances import FLOAT32, FLOAT64
from tests.train.test_resume import Killed, Mortal, require_equal_runs
from tests.train.test_step import gradients
from tests.train.tiny import Counting, tiny_model, tiny_settings

TABLES = ("blocks.1.ffn.branches.0.up", "blocks.1.ffn.branches.0.down")


def model_with_rows():
    return tiny_model(kinds=("moe", "rows"))


def with_gradients(sparse: bool = True):
    """A model after one backward pass."""
    model = model_with_rows()
    if not sparse:
        model.blocks[1].ffn.bank.sparse_gradients = False
    batch = Counting().train_batch(0, 4, seed=0)
    nn.functional.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten()).backward()
    return model


def test_tables_go_to_the_optimizer_for_rows_with_their_group_s_settings():
    model = model_with_rows()
    table = ParameterGroup(r"branches\.0\.up$", lr_scale=4.0, weight_decay=0.0)
    settings = OptimSettings(lr=0.5, betas=(0.8, 0.9), eps=1e-6, skipped_rows="decay", groups=(table,))
    optimizer = build_optimizer(model, settings)
    dense, rows = optimizer.parts
    assert type(dense) is torch.optim.AdamW and isinstance(rows, RowAdamW) and rows.skipped == "decay"
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in rows.param_groups for p in group["params"]}
    assert found.keys() == set(TABLES)
    assert [(found[n]["lr_scale"], found[n]["weight_decay"]) for n in TABLES] == [(4.0, 0.0), (1.0, 0.1)]
    assert all((g["betas"], g["eps"]) == ((0.8, 0.9), 1e-6) for g in optimizer.param_groups)
    everything = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(names.values())
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] / group["lr_scale"] for part in optimizer.parts for group in part.param_groups} == {0.25}


def test_a_model_of_nothing_but_rows_has_one_part():
    bank = SingletonBank(4, 9, sparse_gradients=True)
    (only,) = build_optimizer(bank, OptimSettings()).parts
    assert isinstance(only, RowAdamW)


def test_the_norm_contains_the_rows_and_clipping_scales_them_where_they_lie():
    sparse, dense = with_gradients(True), with_gradients(False)
    places = [sparse.get_parameter(name).grad._values().data_ptr() for name in TABLES]
    norm, want = clip_gradients(sparse, 0.01), clip_gradients(dense, 0.01)
    torch.testing.assert_close(norm, want, **FLOAT32)
    without = math.sqrt(sum(p.grad.square().sum().item() for n, p in dense.named_parameters() if n not in TABLES))
    assert without < 0.01 * 0.999
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(sparse.get_parameter(name).grad.to_dense(), parameter.grad, **FLOAT32)
    assert places == [sparse.get_parameter(name).grad._values().data_ptr() for name in TABLES]


def test_clipping_works_with_nothing_but_rows():
    bank = SingletonBank(1, 9, sparse_gradients=True)
    for parameter, value in ((bank.up, 3.0), (bank.down, 4.0)):
        parameter.grad = torch.sparse_coo_tensor([[2]], torch.tensor([[value]]), (9, 1), check_invariants=False)
    assert clip_gradients(bank, 1.0).item() == pytest.approx(5.0)
    assert bank.down.grad.to_dense()[2].item() == pytest.approx(0.8, rel=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_rows_equal_those_of_the_whole_batch(accumulate):
    model = model_with_rows().double()
    batch = Counting().train_batch(0, 8, seed=0)
    whole, _ = gradients(model, batch)
    parts, _ = gradients(model, batch, accumulate=accumulate)
    for name in TABLES:
        assert whole[name].is_sparse and parts[name].is_sparse
        assert 0 < parts[name]._nnz() == whole[name]._nnz() < 256
    for name in whole:
        torch.testing.assert_close(parts[name].to_dense(), whole[name].to_dense(), **FLOAT64)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputation_changes_no_bit(precision):
    batch = Counting().train_batch(0, 4, seed=0)
    stored, _ = gradients(model_with_rows(), batch, precision=precision)
    again, _ = gradients(model_with_rows(), batch, precision=precision, recompute=True)
    assert stored[TABLES[0]].is_sparse and stored[TABLES[0]].dtype == torch.float32
    assert all(torch.equal(stored[name].to_dense(), again[name].to_dense()) for name in stored)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_row_that_is_not_finite_stops_training(tmp_path, value):
    model = model_with_rows()
    table = model.get_parameter(TABLES[0])
    table.register_hook(lambda grad: grad * value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Diverged, match="step 1: gradient norm = (inf|nan)"):
        train(model, Counting(), tiny_settings(2), [], [], tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def settings(skipped: str = "keep"):
    optim = OptimSettings(lr=0.01, skipped_rows=skipped)
    return tiny_settings(6, save_every=2, eval_every=3, keep_last=1, accumulate=2, optim=optim)


@pytest.mark.parametrize("skipped", ["keep", "decay"])
def test_dying_at_any_step_changes_no_bit(tmp_path, skipped):
    train(model_with_rows(), Counting(), settings(skipped), [], [], tmp_path / "whole")
    for last in range(6):
        run = tmp_path / str(last)
        with pytest.raises(Killed):
            train(model_with_rows(), Mortal(last), settings(skipped), [], [], run)
        train(model_with_rows(), Counting(), settings(skipped), [], [], run)
        require_equal_runs(run, tmp_path / "whole", 6)


def test_skipped_rows_are_part_of_what_a_run_is(tmp_path):
    with pytest.raises(Killed):
        train(model_with_rows(), Mortal(3), settings("keep"), [], [], tmp_path)
    with pytest.raises(CheckpointError, match=r"optim\.skipped_rows was 'keep', now 'decay'"):
        train(model_with_rows(), Counting(), settings("decay"), [], [], tmp_path)
    with pytest.raises(ValueError, match=r"skipped_rows='lose': allowed are 'keep', 'decay'"):
        OptimSettings(skipped_rows="lose")  # type: ignore[arg-type]


@pytest.mark.parametrize("sparse", [True, False])
def test_state_of_the_other_kind_of_gradients_is_refused(sparse):
    model, other = with_gradients(sparse), with_gradients(not sparse)
    optimizer = build_optimizer(model, OptimSettings())
    optimizer.step()
    kinds = "trained with sparse gradients, here they are dense" if sparse else "dense gradients, here they are sparse"
    with pytest.raises(CheckpointError, match=kinds):
        load_optimizer(other, build_optimizer(other, OptimSettings()), optimizer_tensors(model, optimizer))


def test_restored_state_shares_no_memory_with_what_was_read():
    """It would keep the mapped file of a checkpoint, gigabytes for a million experts, for as long as training goes."""
    model, other = with_gradients(), with_gradients()
    optimizer, resumed = build_optimizer(model, OptimSettings()), build_optimizer(other, OptimSettings())
    optimizer.step()
    read = optimizer_tensors(model, optimizer)
    load_optimizer(other, resumed, read)
    back = optimizer_tensors(other, resumed)
    assert back.keys() == read.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, read[name]) and tensor.dtype == read[name].dtype
        assert tensor.untyped_storage().data_ptr() != read[name].untyped_storage().data_ptr(), name


def test_sparse_and_dense_training_agree_where_nothing_is_skipped():
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        router = ProductKeyRouter(4, 9, heads=2, top_k=3, d_key=4, query_norm="none")
        layer = MoELayer(router, [SingletonBank(4, 9, sparse_gradients=sparse)]).double()
        optimizer = build_optimizer(layer, OptimSettings(lr=0.01))
        for _ in range(10):
            optimizer.zero_grad()
            layer(torch.randn(200, 4, dtype=torch.float64))[0].square().sum().backward()
            assert not sparse or layer.bank.up.grad._nnz() == 9
            clip_gradients(layer, 1.0)
            optimizer.step()
        ends.append(layer.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], **FLOAT64)


@pytest.mark.gpu
@pytest.mark.parametrize("skipped", ["keep", "decay"])
def test_a_gpu_trains_rows_as_the_cpu_does(skipped):
    """Two micro-batches a step; torch adds sparse gradients in another way there."""
    torch.manual_seed(0)
    router = ProductKeyRouter(8, 256, heads=2, top_k=3, d_key=4, query_norm="none")
    first = MoELayer(router, [SingletonBank(8, 256, sparse_gradients=True)]).double()
    layers = [first, copy.deepcopy(first).cuda()]
    optimizers = [build_optimizer(layer, OptimSettings(lr=0.01, skipped_rows=skipped)) for layer in layers]
    for _ in range(5):
        batches = torch.randn(2, 10, 8, dtype=torch.float64)
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            for x in batches.to(layer.bank.up.device):
                layer(x)[0].square().sum().backward()
            clip_gradients(layer, 1.0)
            optimizer.step()
    for here, there in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(there.cpu(), here, **FLOAT64)


def test_a_step_of_a_million_experts_allocates_rows_only():
    """Forward, backward, clipping and update at N = 1024^2, d = 64: no allocation is a hundredth of a table."""
    n, d, tokens = 1024**2, 64, 16
    torch.manual_seed(0)
    router = ProductKeyRouter(d, n, heads=4, top_k=8, d_key=16)
    layer = MoELayer(router, [SingletonBank(d, n, sparse_gradients=True)])
    optimizer = build_optimizer(layer, OptimSettings())
    x = torch.randn(tokens, d)
    before = layer.bank.up.detach().sum(-1)

    def step() -> None:
        optimizer.zero_grad()
        layer(x)[0].square().sum().backward()
        clip_gradients(layer, 1.0)
        optimizer.step()

    assert largest_allocation(step) < n * d * 4 / 100
    moved = (layer.bank.up.detach().sum(-1) != before).sum().item()
    assert 100 < moved <= 2 * tokens * 32
