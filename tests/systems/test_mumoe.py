"""muMoE against its equations. The exact checks of its specification and where they are:

| check | here |
|---|---|
| 1 forward and gradients are those of the whole tensor, E = 1, 2, 3 | `test_a_bank_equals_the_whole_tensor` |
| 2 a one-hot gate selects an expert | `test_all_weight_on_one_expert_selects_it` |
| 3 zero input gives the mixture of biases | `test_of_nothing_the_biases_are_left` |
| 4 gates at zero weigh all alike | `test_gates_start_alike` |
| 5 entmax | `tests/ops/test_entmax.py` |
| 6 from a dense layer, 7 from experts | `test_mumoe_conversions.py` |
| 8 a mode of one expert changes nothing | `test_a_mode_of_one_expert_changes_nothing` |
| 9 experts may be moved | `tests/properties/test_pairs.py` |
| 10 numbers of parameters | `test_the_block_is_as_large_as_in_the_paper` |
| 11 layer norm is causal, batch norm is not | `test_gates_depend_on_their_own_token_alone` |
| 12 an expert's matrix can be read | `test_a_bank_equals_the_whole_tensor` |
"""

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor

from moestro.experts import CPBank, FactoredBank, TensorRingBank, TuckerBank
from moestro.layers import FactoredLayer, MoELayer
from moestro.model import Transformer
from moestro.model.active import idle_parameters
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import LinearScore, ModesRouter, Router, ScoredRouter, Soft, TopK
from moestro.routing import Routing, SoftRouting, SparseRouting
from tests.conftest import ROOT
from tests.reference import mumoe as reference
from tests.tolerances import FLOAT64

D, OUT, T = 3, 2, 5
close = torch.testing.assert_close
MODES = pytest.mark.parametrize("modes", [[4], [3, 2], [2, 3, 2]], ids=str)
FORMATS: dict[str, Callable[[list[int]], FactoredBank]] = {
    "cp": lambda modes: CPBank(D, modes, rank=5, d_out=OUT),
    "ring": lambda modes: TensorRingBank(D, modes, ranks=[2, *range(2, 2 + len(modes)), 4], d_out=OUT),
    "train": lambda modes: TensorRingBank(D, modes, ranks=[1, *range(2, 2 + len(modes)), 4], d_out=OUT),
    "tucker": lambda modes: TuckerBank(D, modes, ranks=[*range(2, 2 + len(modes)), 3, 2], d_out=OUT),
}
# further modes have ranks that leave a single mode's codes as they are
NEUTRAL: dict[str, Callable[[list[int]], FactoredBank]] = {
    "cp": FORMATS["cp"],
    "ring": lambda modes: TensorRingBank(D, modes, ranks=[2, *(2 for _ in modes), 4], d_out=OUT),
    "train": lambda modes: TensorRingBank(D, modes, ranks=[1, *(2 for _ in modes), 4], d_out=OUT),
    "tucker": lambda modes: TuckerBank(D, modes, ranks=[2, *(1 for _ in modes[1:]), 3, 2], d_out=OUT),
}
formats = pytest.mark.parametrize("name", FORMATS)
KINDS = [
    ("soft", [2, 3, 2]),
    *((kind, modes) for kind in ("soft", "joint", "sparse", "few") for modes in ([4], [3, 2])),
]


def bank(name: str, modes: list[int]) -> FactoredBank:
    """All factors away from what they start with, which is the same for all experts of later modes."""
    made = FORMATS[name](modes).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def tensor(of: FactoredBank) -> Tensor:
    factors = list(of.experts), of.inputs, of.outputs
    if isinstance(of, TuckerBank):
        return reference.tucker_tensor(*factors, of.core)
    make = reference.tensor_ring_tensor if isinstance(of, TensorRingBank) else reference.cp_tensor
    return make(*factors)


def tokens(d: int = D) -> Tensor:
    return torch.randn(T, d, dtype=torch.float64, requires_grad=True)


def routings(modes: list[int]) -> dict[str, Routing]:
    """Mode by mode; the same jointly; some experts a token, one token without any; less than one expert a token."""
    soft = SoftRouting(tuple(torch.rand(T, n, dtype=torch.float64).softmax(-1) for n in modes))
    n = prod(modes)
    token, expert = torch.tensor([0, 0, 1, 3, 3, 4, 4]), torch.tensor([0, n - 1, 2, 1, 0, n - 2, 3]) % n
    sparse = SparseRouting(token, expert, torch.rand(7, dtype=torch.float64), T, n)
    few = sparse.keep(torch.tensor([True, False, False, True, False, True, False]))
    return {"soft": soft, "joint": SoftRouting((soft.dense(),)), "sparse": sparse, "few": few}


@formats
@pytest.mark.parametrize(("kind", "modes"), KINDS, ids=str)
def test_a_bank_equals_the_whole_tensor(name: str, kind: str, modes: list[int]) -> None:
    made, x, routing = bank(name, modes), tokens(), routings(modes)[kind]
    w = tensor(made)
    close(made.matrices(), w, **FLOAT64)
    gates = routing.modes if isinstance(routing, SoftRouting) and kind == "soft" else (routing.dense(),)
    if len(gates) == 1:
        want = torch.stack([reference.linear(w, [a], token) for a, token in zip(gates[0], x, strict=True)])
    else:
        want = torch.stack([reference.linear(w, [a[t] for a in gates], x[t]) for t in range(T)])
    have = made(x, routing)
    close(have, want, **FLOAT64)
    weight = torch.linspace(-1, 1, T * OUT, dtype=torch.float64).view(T, OUT)
    leaves = [x, *made.parameters()]
    mine, theirs = (torch.autograd.grad((y * weight).sum(), leaves) for y in (have, want))
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, **FLOAT64)


@formats
@MODES
def test_all_weight_on_one_expert_selects_it(name: str, modes: list[int]) -> None:
    made, x = bank(name, modes), tokens()
    extended = torch.cat([x, torch.ones(T, 1, dtype=x.dtype)], dim=1)
    for n in range(made.n_experts):
        place = torch.unravel_index(torch.tensor(n), made.modes)
        a = tuple(torch.nn.functional.one_hot(at, m).double().expand(T, m) for at, m in zip(place, modes, strict=True))
        close(made(x, SoftRouting(a)), extended @ made.matrix(n), **FLOAT64)


@formats
@MODES
def test_of_nothing_the_biases_are_left(name: str, modes: list[int]) -> None:
    made, routing = bank(name, modes), routings(modes)["soft"]
    zero = torch.zeros(T, D, dtype=torch.float64)
    close(made(zero, routing), routing.dense() @ made.matrices()[:, -1], **FLOAT64)


@formats
def test_a_mode_of_one_expert_changes_nothing(name: str) -> None:
    """As it starts: further modes are neutral."""
    two, one, x = NEUTRAL[name]([4, 1]).double(), NEUTRAL[name]([4]).double(), tokens()
    one.load_state_dict({key: value for key, value in two.state_dict().items() if key != "experts.1"})
    a = torch.rand(T, 4, dtype=torch.float64)
    close(two(x, SoftRouting((a, torch.ones(T, 1, dtype=a.dtype)))), one(x, SoftRouting((a,))), **FLOAT64)


@formats
@MODES
def test_costs_are_those_of_the_factors(name: str, modes: list[int]) -> None:
    """Gates mode by mode touch every number once, and FLOPs are two for each, beside products with no parameter."""
    made, every = bank(name, modes), routings(modes)
    numbers = sum(p.numel() for p in made.parameters())
    assert made.own_parameters() * made.n_experts + made.shared_parameters() == numbers
    flops = float(made.flops(every["soft"]).useful) / T
    assert flops == made.expected_token_flops(made.n_experts)
    assert flops >= 2 * numbers and (name != "cp" or flops == 2 * numbers)
    assert float(made.flops(every["few"]).useful) == made.row_flops() * 3
    more = float(made.flops(every["joint"]).useful - made.flops(every["soft"]).useful) / T
    code = made.codes(torch.tensor([0])).numel()
    assert more == 2 * (made.n_experts * code - sum(table.numel() for table in made.experts))


def router(modes: list[int], norm: str = "layer", init_std: float = 1.0) -> Router:
    if len(modes) > 1:
        return ModesRouter(D, prod(modes), modes, norm=norm, init_std=init_std)  # type: ignore[arg-type]
    return ScoredRouter(LinearScore(D, modes[0], init_std), Soft("entmax15", norm))  # type: ignore[arg-type]


def layer(name: str, modes: list[int], reads_stream: bool = True) -> FactoredLayer:
    made = FactoredLayer(D, router(modes), [FORMATS[name](modes)], reads_stream=reads_stream).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def score_weights(of: Router) -> list[Tensor]:
    return [score.weight for score in of.modules() if isinstance(score, LinearScore)]


@formats
@pytest.mark.parametrize("modes", [[4], [3, 2]], ids=str)
def test_the_block_equals_the_equations(name: str, modes: list[int]) -> None:
    made, x = layer(name, modes), tokens()
    have, (trace,) = made(x)
    first, second = (tensor(each) for each in made.banks())  # type: ignore[arg-type]
    eps = float(made.norm.eps)  # type: ignore[arg-type]
    weight = score_weights(made.router)
    want = torch.stack(
        [reference.block(t, reference.gates(t, weight, 1e-5), first, second, made.norm.weight, eps) for t in x]  # type: ignore[arg-type]
    )
    close(have, want, **FLOAT64)
    assert isinstance(trace.routing, SoftRouting) and len(trace.routing.modes) == len(modes)
    names = dict(made.named_parameters())
    mine, theirs = (torch.autograd.grad(y.square().sum(), [x, *names.values()]) for y in (have, want))
    for key, a, b in zip(["x", *names], mine, theirs, strict=True):
        close(a, b, **FLOAT64, msg=lambda m, key=key: f"{key}: {m}")


def test_where_the_block_has_the_residual_the_gates_read_what_experts_read() -> None:
    made, x = layer("cp", [4], reads_stream=False), tokens()
    first, second = made.banks()
    routing = made.router(x)
    close(made(x)[0], second(torch.nn.functional.gelu(first(x, routing)), routing), **FLOAT64)
    assert not made.owns_residual and layer("cp", [4]).owns_residual


def test_padding_keeps_its_stream() -> None:
    made, x = layer("cp", [4]), tokens()
    keep = torch.tensor([True, False, True, True, False])
    y, (trace,) = made(x, keep)
    assert torch.equal(y[~keep], x[~keep]) and trace.routing.n_tokens == 3
    close(y[keep], made(x[keep])[0], **FLOAT64)


@pytest.mark.parametrize("modes", [[64], [16, 4]], ids=str)
def test_gates_start_alike(modes: list[int]) -> None:
    """Exactly: these numbers are powers of 2."""
    routing = router(modes, init_std=0.0)(tokens().detach().float())
    assert (routing.dense() == 1 / 64).all()


@pytest.mark.parametrize("modes", [[4], [3, 2]], ids=str)
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_gates_depend_on_their_own_token_alone(modes: list[int], norm: str) -> None:
    """But for batch norms, which a causal decoder refuses."""
    made, x = router(modes, norm).double(), tokens().detach()
    other = x.clone()
    other[1:] += 1
    same = torch.equal(made(x).dense()[0], made(other).dense()[0])
    assert same == made.causal == (norm != "batch")


def test_a_causal_decoder_refuses_batch_norms() -> None:
    recipe = load_recipe(ROOT / "recipes" / "mumoe.yaml", ["model.ffn.router.select.norm=batch"])
    with pytest.raises(RecipeError, match="looks at other tokens"):
        build_model(recipe, 20)


def test_norms_are_those_of_torch() -> None:
    z = torch.randn(7, 6, dtype=torch.float64)
    layer_norm = torch.nn.functional.layer_norm(z, (6,))
    batch_norm = torch.nn.functional.batch_norm(z, None, None, training=True)
    close(Soft(norm="layer")(z).dense(), layer_norm.softmax(-1), **FLOAT64)
    close(Soft(norm="batch")(z).dense(), batch_norm.softmax(-1), **FLOAT64)


def paper(name: str) -> Transformer:
    return build_model(load_recipe(ROOT / "recipes" / "paper" / f"{name}.yaml"), 50_304, "meta")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cp", 556 * (256 + 769 + 3072 + 256 + 3073 + 768)),
        ("ring", 4 * 256 * 4 * 2 + 4 * (769 + 3072 + 3073 + 768) * 149),
    ],
)
def test_the_block_is_as_large_as_in_the_paper(name: str, expected: int) -> None:
    """4.73 to 4.78 million beside 4.72 million of the dense layer, gates included, all of them active."""
    model = paper(f"mumoe-gpt2-{name}")
    (made, *_) = model.moe_layers().values()
    assert sum(p.numel() for p in made.bank.parameters()) + sum(p.numel() for p in made.banks()[1].parameters()) == (
        expected
    )
    total = sum(p.numel() for p in made.parameters()) - 768
    assert total == expected + 768 * 256 and 4.73e6 < total < 4.79e6


@formats
@pytest.mark.parametrize("modes", [[4], [3, 2]], ids=str)
def test_every_parameter_of_a_soft_block_is_active(name: str, modes: list[int]) -> None:
    _, traces = layer(name, modes)(tokens())
    assert float(idle_parameters(traces)) == 0


def test_rows_that_were_not_met_are_idle() -> None:
    made = MoELayer(ScoredRouter(LinearScore(D, 6), TopK(2)), [CPBank(D, [6], rank=5)])
    _, traces = made(tokens().detach().float())
    assert float(idle_parameters(traces)) == 4 * 5


def test_outputs_start_at_a_useful_scale() -> None:
    """Standard deviations of the first bank of the paper's GPT-2, of standard normal tokens."""
    made, x = CPBank(768, [256], 556, d_out=3072), torch.randn(64, 768)
    uniform = made(x, SoftRouting((torch.full((64, 256), 1 / 256),))).std().item()
    one_hot = made(x, SoftRouting((torch.eye(256)[:64],))).std().item()
    assert uniform == pytest.approx(0.34, abs=0.02) and one_hot == pytest.approx(0.47, abs=0.02)


@formats
def test_gates_stay_in_float32_where_products_are_lowered(name: str) -> None:
    made, x = layer(name, [4]).float(), tokens().detach().float()
    want, _ = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        have, (trace,) = made(x)
    assert trace.routing.dense().dtype == torch.float32
    assert (have - want).norm() / want.norm() < 0.05


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match=r"modes=\[\], allowed"):
        CPBank(D, [], 3)
    with pytest.raises(ValueError, match=r"ranks=\[0\], allowed: at least 1"):
        CPBank(D, [3], 0)
    with pytest.raises(ValueError, match=r"modes=\[3, 3\], allowed: a product of 8"):
        ModesRouter(D, 8, [3, 3])
    with pytest.raises(ValueError, match="from d_model=3 to any width and back"):
        FactoredLayer(D, router([3]), [CPBank(D, [3], 2), CPBank(D, [3], 2, d_out=5)])
    with pytest.raises(ValueError, match="one or two factored banks"):
        FactoredLayer(D, router([3]), [])
    with pytest.raises(ValueError, match="cannot be moved"):
        CPBank(D, [3, 2], 2).reindex(torch.tensor([0]))
    with pytest.raises(ValueError, match="norm_eps=0.0, allowed: above 0"):
        Soft(norm="layer", norm_eps=0.0)
