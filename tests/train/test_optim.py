"""Parameter groups, the fused optimizer, clipping."""

import pytest
import torch
from torch import nn

from moestro.experts import ClampedBank, FreeAdapters
from moestro.train import OptimSettings, ParameterGroup
from moestro.train.optim import build_optimizer, clip_gradients, parameter_groups, set_learning_rate
from moestro.train.tensors import load_optimizer, optimizer_tensors
from tests.tolerances import FLOAT32
from tests.train.tiny import tiny_model


def by_name(model: nn.Module, settings: OptimSettings) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, settings)
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_norms_biases_and_embeddings_do_not_decay():
    model = tiny_model()
    found = by_name(model, OptimSettings(weight_decay=0.1))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name == "embedding.weight"
        assert found[name] == (1.0, 0.0 if plain else 0.1), name
    assert found["blocks.0.attention_norm.weight"] == (1.0, 0.0)
    assert found["blocks.1.ffn.router.query_norm.bias"] == (1.0, 0.0)
    assert found["blocks.1.ffn.branches.0.up"] == (1.0, 0.1)


@pytest.mark.parametrize("bank", [FreeAdapters(4, 3, rank=2), ClampedBank(4, 3, width=2)], ids=type)
def test_biases_of_experts_in_one_tensor_do_not_decay(bank):
    for name, (_, decay) in by_name(bank, OptimSettings(weight_decay=0.3)).items():
        assert decay == (0.0 if name.endswith("bias") else 0.3), name


def test_a_tied_head_is_one_parameter_and_does_not_decay():
    found = by_name(tiny_model(tie_embeddings=True), OptimSettings())
    assert found["embedding.weight"] == (1.0, 0.0)
    assert "head.weight" not in found


def test_the_first_group_that_matches_wins():
    tables = ParameterGroup(r"branches\.0\.(up|down)$", lr_scale=4.0, weight_decay=0.0)
    peer = ParameterGroup(r"^blocks\.1\.ffn", lr_scale=2.0)
    found = by_name(tiny_model(), OptimSettings(weight_decay=0.1, groups=(tables, peer)))
    assert found["blocks.1.ffn.branches.0.up"] == (4.0, 0.0)
    assert found["blocks.1.ffn.router.keys"] == (2.0, 0.1)
    assert found["blocks.1.ffn.router.query_norm.weight"] == (2.0, 0.0)
    assert found["head.weight"] == (1.0, 0.1)


def test_a_pattern_without_a_parameter_is_refused():
    settings = OptimSettings(groups=(ParameterGroup("tables"),))
    with pytest.raises(ValueError, match=r"pattern='tables' matches no parameter; there are: embedding\.weight"):
        parameter_groups(tiny_model(), settings)


def test_frozen_parameters_stay_out():
    model = tiny_model()
    model.embedding.weight.requires_grad_(False)
    assert "embedding.weight" not in by_name(model, OptimSettings())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Transformer has no trainable parameters"):
        parameter_groups(model, OptimSettings())


def test_learning_rates_follow_their_scale():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimSettings(groups=(ParameterGroup("head", lr_scale=3.0),)))
    set_learning_rate(optimizer, 0.5)
    assert {group["lr_scale"]: group["lr"] for group in optimizer.param_groups} == {1.0: 0.5, 3.0: 1.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_on_the_cpu_equals_the_plain_optimizer_and_repeats_to_the_bit(dtype):
    plain = stepped(dtype, fused=False)
    fused, again = stepped(dtype, fused=True), stepped(dtype, fused=True)
    for a, b, c in zip(plain, fused, again, strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)
        assert torch.equal(b, c)


def stepped(dtype: torch.dtype, fused: bool) -> list[torch.Tensor]:
    model = tiny_model().to(dtype)
    settings = OptimSettings(lr=0.1)
    optimizer = build_optimizer(model, settings)
    (only,) = optimizer.parts
    assert only.defaults["fused"] is True
    if not fused:
        groups = parameter_groups(model, settings)
        optimizer = torch.optim.AdamW(groups, lr=0.1, betas=settings.betas, eps=settings.eps, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_clipping_scales_all_gradients_to_the_global_norm():
    model = nn.Linear(3, 1)
    model.weight.grad = torch.tensor([[3.0, 0.0, 0.0]])
    model.bias.grad = torch.tensor([4.0])
    norm = clip_gradients(model, 1.0)
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0, 0.0]]), **FLOAT32)
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.8]), **FLOAT32)


@pytest.mark.parametrize("clip", [10.0, None])
def test_small_gradients_and_no_clipping_change_nothing(clip):
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(model, clip).item() == pytest.approx(5.0)
    assert model.weight.grad.tolist() == [[3.0, 4.0]]


def test_rows_are_forgotten_and_no_others():
    """Moments of the rows named are 0, and no decay is owed; other rows and parameters, and the step count, are as they
    were."""
    model = tiny_model(kinds=("moe", "rows"))
    optimizer = build_optimizer(model, OptimSettings())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(6)[None] % 5).logits.square().sum().backward()
        optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    before = {p: {key: value.clone() for key, value in entries.items()} for p, entries in optimizer.state.items()}
    weight = model.get_parameter("blocks.0.ffn.router.score.weight")
    table = model.get_parameter("blocks.1.ffn.branches.0.up")
    met = int(optimizer.state[table]["clock"].argmax())
    # a row that no step met owes the decay of all
    idle = int(optimizer.state[table]["clock"].argmin())
    assert before[weight]["exp_avg"][1].any() and before[table]["exp_avg"][met].any()
    assert before[table]["log_decay"] < 0 == before[table]["charged"][idle]
    optimizer.reset_rows(weight, 1)
    optimizer.reset_rows(table, slice(met, met + 1))
    optimizer.reset_rows(table, idle)
    optimizer.reset_rows(nn.Parameter(torch.zeros(3)), 0)
    for parameter, entries in before.items():
        for key, value in entries.items():
            for forgotten, row in ((weight, 1), (table, met), (table, idle)):
                if parameter is forgotten and key in ("exp_avg", "exp_avg_sq", "clock"):
                    value[row] = 0
                if parameter is forgotten and key == "charged":
                    value[row] = entries["log_decay"]
            assert torch.equal(optimizer.state[parameter][key], value), (names[parameter], key)


def test_state_lies_in_memory_as_its_parameter_does():
    """Fused kernels walk parameter, gradient and moments in the order of memory, whatever their strides."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Linear(3, 5)
        made.weight = nn.Parameter(torch.randn(3, 5).T)
        return made

    def step(of, optimizer) -> None:
        optimizer.zero_grad()
        of(torch.linspace(-1, 1, 6).view(2, 3)).square().sum().backward()
        optimizer.step()

    settings = OptimSettings(lr=0.1)
    whole, part = model(), model()
    first, second = build_optimizer(whole, settings), build_optimizer(part, settings)
    step(whole, first)
    part.load_state_dict(whole.state_dict())
    load_optimizer(part, second, {name: t.clone().contiguous() for name, t in optimizer_tensors(whole, first).items()})
    step(whole, first)
    step(part, second)
    assert torch.equal(whole.weight, part.weight) and torch.equal(whole.bias, part.bias)
