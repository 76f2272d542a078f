"""MPOE (arXiv:2203.01104): matrices as chains of cores, the central one shared by all experts.

| check of the specification | test |
|---|---|
| 1 full bonds: exact | test_full_bonds_are_exact |
| 2 bonds and numbers of parameters | test_sizes_are_the_papers |
| 3 the gauge does not change the matrix | test_the_gauge_changes_nothing |
| 4 truncation: error grows, one bond is Eckart-Young | test_truncation |
| 5 matrices without full rank, zero | test_matrices_without_full_rank |
| 6 through the cores = built | test_through_the_cores |
| 7 from a dense network: equal for any routing | test_from_dense_and_back |
| 8 one expert: a plain chain | test_layer_equals_reference[1] |
| 9 gradient of C is the sum over experts | test_layer_equals_reference, test_the_central_gradient_is_a_sum |
| 10 masked central gradients | test_masked_steps, test_half_of_the_steps, test_accumulation_draws_once_a_step |
| 11 C once in the state, counts | test_sizes_are_the_papers |
| 12 to dense experts | test_from_dense_and_back |
"""

import copy
import math

import pytest
import torch
from torch import Tensor

from moestro.experts import FFNBank, MPOBank, MPOLinear, SharedExpert
from moestro.layers import MoELayer
from moestro.model import Attention, Block, Transformer
from moestro.model.active import idle_parameters
from moestro.ops.mpo import balanced, mpo_bonds, mpo_cores, mpo_factors, mpo_flops, mpo_matrix
from moestro.routers import LinearScore, ScoredRouter, Soft, TopK
from moestro.train import train
from moestro.train.central_mask import CentralMask
from tests.reference import mpoe as reference
from tests.tolerances import FLOAT64
from tests.train.test_resume import Killed, Mortal, require_equal_runs
from tests.train.tiny import VOCABULARY, WIDTH, Counting, tiny_settings

ROWS, COLUMNS = (2, 2, 3, 1, 2), (2, 1, 2, 2, 1)
W, D, T = math.prod(ROWS), math.prod(COLUMNS), 13
close = torch.testing.assert_close


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bank(n_experts: int = 3, **changes) -> MPOBank:
    torch.manual_seed(1)
    return MPOBank(D, n_experts, W, width_factors=ROWS, d_factors=COLUMNS, **changes).double()


def layer(experts: MPOBank | FFNBank, select: str = "top-k") -> MoELayer:
    torch.manual_seed(2)
    selects = {"top-k": TopK(min(2, experts.n_experts)), "soft": Soft(), "top-1": TopK(1, renormalize=False)}
    router = ScoredRouter(LinearScore(D, experts.n_experts, init_std=1.0), selects[select])
    return MoELayer(router, [experts]).double()


def test_full_bonds_are_exact() -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        w = random(W * 8, D * 6).to(dtype)
        cores = mpo_cores(w, (4, 4, 4, 3), (2, 4, 3, 2))
        assert (mpo_matrix(cores) - w).norm() / w.norm() < bound
    w = random(W, D)
    close(reference.matrix(mpo_cores(w, ROWS, COLUMNS)), w, **FLOAT64)


def test_through_the_cores() -> None:
    """x W contracted with one core after another, never building W, is the product with what is built."""
    w, x = random(W, D), random(T, W)
    state = x.view(T, 1, 1, W)
    for core in mpo_cores(w, ROWS, COLUMNS):
        # token, columns so far, bond, rows still to come
        state = state.unflatten(3, (core.shape[1], -1))
        state = torch.einsum("tcbir,bijd->tcjdr", state, core).flatten(1, 2)
    close(state.flatten(1), x @ mpo_matrix(mpo_cores(w, ROWS, COLUMNS)), **FLOAT64)
    close(state.flatten(1), x @ w, **FLOAT64)


def test_sizes_are_the_papers() -> None:
    rows, columns = mpo_factors(3072), mpo_factors(768)
    assert (rows, columns) == ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    assert mpo_factors(7, 3) == (1, 7, 1) and math.prod(mpo_factors(13 * 17 * 4)) == 13 * 17 * 4
    assert mpo_bonds(rows, columns) == reference.bonds(rows, columns) == [1, 12, 192, 384, 16, 1]
    with torch.device("meta"):
        for n_experts, millions in ((8, 3.84), (16, 5.31)):
            linear = MPOLinear(n_experts, (rows, columns), "in")
            total = sum(p.numel() for p in linear.parameters())
            assert total == reference.parameters(rows, columns, n_experts) and round(total / 1e6, 2) == millions
            assert [name for name in linear.state_dict() if "central" in name] == ["central"]
            assert linear.central.numel() == 2_359_296
    experts = bank(4)
    each = [reference.parameters(ROWS, COLUMNS, 4), linear_shared(experts.w_out)]
    assert sum(p.numel() for p in experts.parameters()) == 3 * each[0]
    assert experts.shared_parameters() == 3 * each[1] and experts.own_parameters() == 3 * (each[0] - each[1]) / 4
    twin = bank(4)
    torch.nn.init.zeros_(twin.w_in.central)
    twin.load_state_dict(experts.state_dict())
    close(twin.w_in.weight, experts.w_in.weight, **FLOAT64)


def linear_shared(linear: MPOLinear) -> int:
    return linear.central.numel() // linear.blocks


def test_the_gauge_changes_nothing() -> None:
    w = random(W, D)
    cores = mpo_cores(w, ROWS, COLUMNS)
    bonds = [core.shape[0] for core in cores]
    moved = [torch.eye(1).double(), *(random(d, d, seed=d) for d in bonds[1:]), torch.eye(1).double()]
    other = [
        torch.einsum("ab,bijc,cd->aijd", torch.linalg.inv(moved[k]), core, moved[k + 1]) for k, core in enumerate(cores)
    ]
    close(mpo_matrix(other), w, rtol=1e-7, atol=1e-8)
    back = balanced(other)
    close(mpo_matrix(back), w, rtol=1e-7, atol=1e-8)
    # either side of a single bond has the square roots of its singular values
    left, right = balanced(mpo_cores(w, (6, 4), (2, 4)))
    values = torch.linalg.svdvals(w.reshape(6, 4, 2, 4).permute(0, 2, 1, 3).reshape(12, 16))
    close(left.flatten(0, 2).T @ left.flatten(0, 2), values.diag(), **FLOAT64)
    close(right.flatten(1) @ right.flatten(1).T, values.diag(), **FLOAT64)


def test_truncation() -> None:
    w = random(24, 16)
    errors = [
        float((mpo_matrix(mpo_cores(w, (2, 3, 4), (4, 2, 2), most)) - w).norm()) for most in (1, 2, 3, 4, 6, 8, 99)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12 < 1 < errors[0]
    pairs = w.reshape(4, 6, 2, 8).permute(0, 2, 1, 3).reshape(8, 48)
    tail = torch.linalg.svdvals(pairs)
    for most in range(1, 8):
        cores = mpo_cores(w, (4, 6), (2, 8), most)
        close((mpo_matrix(cores) - w).norm(), tail[most:].square().sum().sqrt(), **FLOAT64)
    assert max(core.shape[3] for core in mpo_cores(w, (2, 3, 4), (4, 2, 2), 5)) == 5


def test_matrices_without_full_rank() -> None:
    kron = torch.kron(random(4, 4, seed=1), random(6, 3, seed=2))
    for w in (kron, torch.zeros(24, 12).double(), torch.nn.functional.pad(random(20, 12), (0, 0, 0, 4)), kron.float()):
        cores = mpo_cores(w, (4, 3, 2), (4, 1, 3))
        assert all(core.isfinite().all() and core.abs().max() < 1e3 for core in cores)
        close(mpo_matrix(cores), w, rtol=1e-5, atol=1e-5 if w.dtype == torch.float32 else 1e-12)
    # a product of two factors needs one term between them, and nothing needs one
    assert [core.shape[3] for core in mpo_cores(kron, (4, 3, 2), (4, 1, 3))] == [1, 3, 1]
    assert [core.shape[3] for core in mpo_cores(0 * kron, (4, 3, 2), (4, 1, 3))] == [1, 1, 1]


@pytest.mark.parametrize("n_experts", [1, 3])
def test_layer_equals_reference(n_experts: int) -> None:
    """Outputs and every gradient, each expert from its own and the shared cores by itself."""
    experts = bank(n_experts)
    moe, x = layer(experts), random(5, D).requires_grad_()
    have, (trace,) = moe(x)
    gates, rows = trace.routing.dense(), []
    for t in range(len(x)):
        y = torch.zeros(D, dtype=torch.float64)
        for e in range(n_experts):
            if gates[t, e] > 0:
                gate, up = ([core[e if len(core) > 1 else 0, b] for core in experts.w_in.cores()] for b in range(2))
                out = [core[e if len(core) > 1 else 0, 0] for core in experts.w_out.cores()]
                y = y + gates[t, e] * reference.expert(x[t], gate, up, out)
        rows.append(y)
    want = torch.stack(rows)
    close(have, want, **FLOAT64)
    slope = torch.linspace(-1, 1, have.numel(), dtype=torch.float64).view_as(have)
    leaves = [x, *experts.parameters()]
    for mine, theirs in zip(
        *(torch.autograd.grad((y * slope).sum(), leaves, retain_graph=True) for y in (have, want)), strict=True
    ):
        close(mine, theirs, **FLOAT64)


def test_the_central_gradient_is_a_sum() -> None:
    """Over experts that have a C of their own; an expert without tokens learns nothing."""
    experts = bank(4)
    moe, x = layer(experts, "top-1"), random(3, D)
    moe(x)[0].square().sum().backward()
    used = set(moe.router(x).expert.tolist())
    assert 1 < len(used) < 4
    for core in [*experts.w_in.outer, *experts.w_out.outer]:
        assert all(bool(core.grad[e].any()) == (e in used) for e in range(4))
    apart = copy.deepcopy(moe)
    for linear in (apart.bank.w_in, apart.bank.w_out):
        linear.central = torch.nn.Parameter(linear.central.detach().expand(4, *linear.central.shape[1:]).clone())
    apart.zero_grad()
    apart(x)[0].square().sum().backward()
    for mine, theirs in ((experts.w_in, apart.bank.w_in), (experts.w_out, apart.bank.w_out)):
        close(mine.central.grad, theirs.central.grad.sum(0, keepdim=True), **FLOAT64)


@pytest.mark.parametrize("glu", [True, False])
def test_from_dense_and_back(glu: bool) -> None:
    torch.manual_seed(0)
    dense, x = SharedExpert(D, W, glu=glu).double(), random(T, D)
    experts = MPOBank.from_dense(dense, 4, ROWS, COLUMNS)
    # top-2 gates sum to 1, and so do soft ones
    for select in ("top-k", "soft"):
        close(layer(experts, select)(x)[0], dense(x), **FLOAT64)
    with torch.no_grad():
        for core in experts.w_in.outer:
            core.add_(random(*core.shape, seed=5), alpha=0.3)
    apart = experts.unshared()
    close(layer(apart)(x)[0], layer(experts)(x)[0], **FLOAT64)
    assert isinstance(apart, FFNBank) and not torch.allclose(layer(apart)(x)[0], dense(x))
    rough = MPOBank.from_dense(dense, 4, ROWS, COLUMNS, most_bond=2)
    assert max(core.shape[-1] for core in rough.w_in.cores()) == 2
    # a network of rank one in one projection: bonds of its blocks differ
    with torch.no_grad():
        dense.w_in.weight[:W] = 1.0
    close(layer(MPOBank.from_dense(dense, 2, ROWS, COLUMNS))(x)[0], dense(x), **FLOAT64)


def test_from_a_dense_network_in_bfloat16() -> None:
    torch.manual_seed(0)
    dense = SharedExpert(D, W).bfloat16()
    experts = MPOBank.from_dense(dense, 3, ROWS, COLUMNS)
    assert all(p.dtype == torch.bfloat16 for p in experts.parameters())
    near = copy.deepcopy(experts).float().w_in.matrices()[1] - dense.w_in.weight.float()
    assert near.norm() / dense.w_in.weight.float().norm() < 0.02


def test_biases_are_refused() -> None:
    with pytest.raises(ValueError, match="this network has biases"):
        MPOBank.from_dense(SharedExpert(D, W, bias=True), 4, ROWS, COLUMNS)


def test_matrices_start_at_the_usual_scale_and_differ() -> None:
    torch.manual_seed(0)
    for most in (None, 9):
        experts = MPOBank(128, 6, 64, most_bond=most)
        for linear, fan_in in ((experts.w_in, 128), (experts.w_out, 64)):
            std = torch.stack([m.std() for m in linear.matrices()]).detach()
            close(std, torch.full_like(std, fan_in**-0.5), rtol=0.1, atol=0)
        first, second = (m.flatten() for m in experts.w_out.matrices()[:2])
        assert torch.nn.functional.cosine_similarity(first, second, dim=0).abs() < 0.2


def test_built_once_in_evaluation() -> None:
    experts = bank().eval()
    with torch.no_grad():
        kept = experts.w_in.weight
        assert experts.w_in.weight is kept
        experts.w_in.central.mul_(2)
        close(experts.w_in.weight, 2 * kept, **FLOAT64)
    assert experts.w_in.weight.requires_grad
    # fused kernels do not say that they changed a core
    optimizer = torch.optim.AdamW(experts.train().parameters(), lr=0.1, fused=True)
    experts.w_in.weight.sum().backward()
    optimizer.step()
    with torch.no_grad():
        close(experts.eval().w_in.weight, experts.w_in._built(), **FLOAT64)
    experts.float()
    with torch.no_grad():
        assert experts.w_in.weight.dtype == torch.float32


def test_costs() -> None:
    experts = bank(3)
    moe = layer(experts)
    _, traces = moe(random(T, D))
    rows, router = 2 * T * 6 * D * W, 2 * T * D * 3
    build = 3 * 3 * mpo_flops([core.shape[2:] for core in experts.w_out.cores()])
    assert float(moe.flops(traces[0].routing).useful) == rows + router + build
    assert float(moe.eval().flops(traces[0].routing).useful) == rows + router
    assert mpo_flops([(1, 2, 3, 4), (4, 5, 6, 7)]) == 2 * (2 * 3) * 4 * (5 * 6) * 7
    # of the shared cores a token touches all, of an expert's own those of its two
    idle = sum(p.numel() for p in experts.parameters()) - experts.shared_parameters() - 2 * experts.own_parameters()
    assert float(idle_parameters(traces)) == pytest.approx(idle)


def test_values_are_checked() -> None:
    for wrong, message in (
        ({"n_experts": 0}, "n_experts=0"),
        ({"most_bond": 0}, "most_bond=0, allowed: at least 1"),
        ({"width_factors": [2, 2]}, r"width_factors=\[2, 2\], d_factors=\[1, 2, 2, 2, 1\], allowed: as many numbers"),
        ({"d_factors": [2, 2, 3, 1, 1]}, "with products width=24 and d_model=8"),
    ):
        with pytest.raises(ValueError, match=message):
            MPOBank(**{"d_model": D, "n_experts": 3, "width": W, **wrong})
    for wrong, message in (
        ({"probability": 1.2}, "probability=1.2, allowed: 0 to 1"),
        ({"probability": 1.0, "rescale": True}, "below 1 with rescale"),
        ({"mode": "drop"}, "mode='drop'"),
        ({"granularity": "element"}, "only whole tensors can be skipped"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            CentralMask(**wrong)


def decoder(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    moe = MoELayer(ScoredRouter(LinearScore(WIDTH, 3), TopK(2)), [MPOBank(WIDTH, 3, 12, d_factors=[1, 2, 2, 2, 1])])
    return Transformer(VOCABULARY, WIDTH, [Block(WIDTH, Attention(WIDTH, n_heads=2), moe)])


def centrals(model: Transformer) -> list[Tensor]:
    return [module.central.detach().clone() for module in model.modules() if isinstance(module, MPOLinear)]


def trained(folder, rule: CentralMask | None, steps: int = 6, **changes) -> Transformer:
    model = decoder()
    train(model, Counting(), tiny_settings(steps, **changes), [], [rule] if rule else [], folder)
    return model


def test_masked_steps(tmp_path) -> None:
    plain = trained(tmp_path / "plain", None)
    never = trained(tmp_path / "never", CentralMask(0.0))
    always = trained(tmp_path / "always", CentralMask(1.0))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), never.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(centrals(always), centrals(decoder()), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(centrals(plain), centrals(always), strict=True))
    # momentum and decay still move what has a gradient of zero
    zero = trained(tmp_path / "zero", CentralMask(1.0, mode="zero"))
    assert not any(torch.equal(a, b) for a, b in zip(centrals(zero), centrals(always), strict=True))
    with pytest.raises(ValueError, match="found no central tensor"):
        CentralMask().start(torch.nn.Linear(2, 2), None)  # type: ignore[arg-type]


def test_half_of_the_steps() -> None:
    """Each tensor by itself, in as many steps as a coin would say, whatever was there before."""
    model, drawn = decoder(), []
    for rule in (CentralMask(0.3), CentralMask(0.3), CentralMask(0.3, seed=1)):
        rule.start(model, None)  # type: ignore[arg-type]
        kept = []
        for step in range(1, 501):
            for central in rule.centrals:
                central.grad = torch.ones_like(central)
            rule.gradients(step)
            kept.append([central.grad is not None for central in rule.centrals])
        drawn.append(torch.tensor(kept, dtype=torch.float64))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert ((drawn[0].mean(0) - 0.7).abs() < 4 * (0.3 * 0.7 / 500) ** 0.5).all()
    assert not torch.equal(drawn[0][:, 0], drawn[0][:, 1])
    element = CentralMask(0.3, mode="zero", granularity="element", rescale=True)
    element.start(model, None)  # type: ignore[arg-type]
    central = element.centrals[0]
    central.grad = torch.ones_like(central)
    element.gradients(1)
    assert central.grad.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert abs(float((central.grad > 0).double().mean()) - 0.7) < 4 * (0.21 / central.numel()) ** 0.5


def test_accumulation_draws_once_a_step(tmp_path) -> None:
    """As many micro-batches as one likes: the same steps are masked."""
    whole = trained(tmp_path / "whole", CentralMask(0.5))
    parts = trained(tmp_path / "parts", CentralMask(0.5), accumulate=2)
    start = decoder()
    for a, b, c in zip(centrals(whole), centrals(parts), centrals(start), strict=True):
        close(a, b, rtol=1e-3, atol=1e-4)
        assert not torch.equal(a, c)


def test_a_masked_run_goes_on_as_if_never_stopped(tmp_path) -> None:
    """Also where no step has met a central tensor yet, so that AdamW knows nothing of it."""
    for probability in (0.5, 1.0):
        whole, parts = tmp_path / f"whole {probability}", tmp_path / f"parts {probability}"
        trained(whole, CentralMask(probability), save_every=3)
        with pytest.raises(Killed):
            train(decoder(), Mortal(4), tiny_settings(6, save_every=3), [], [CentralMask(probability)], parts)
        trained(parts, CentralMask(probability), save_every=3)
        require_equal_runs(parts, whole, 6)
