"""The experts of transformers' models: our grouped operation in place of theirs, and calls that are looked at."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from moestro.hf import experts as hf_experts
from moestro.hf import experts_modules, intercepted
from moestro.hf.experts import eager_experts
from tests.hf.families import MOE, some_tokens, tiny
from tests.tolerances import FLOAT32, FLOAT64


def logits_and_gradients(model):
    model.zero_grad()
    logits = model(some_tokens()).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)], ids=["64", "32"])
def test_moestro_s_operation_gives_eager_s_logits_and_gradients(family, dtype, close):
    model = tiny(family, dtype=dtype)
    want, gradients = logits_and_gradients(model)
    model.set_experts_implementation("moestro")
    have, mine = logits_and_gradients(model)
    assert gradients.keys() == mine.keys() and any("experts" in name for name in mine)
    torch.testing.assert_close(have, want, **close)
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, msg=name, **close)


def odd_experts(name: str, **config) -> torch.nn.Module:
    """A module of experts that lie, or compute, otherwise than most."""
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    make = next(kind for attribute, kind in vars(module).items() if attribute.endswith("Experts"))
    sizes = {"hidden_size": 12, "num_local_experts": 5, "intermediate_size": 7, "moe_intermediate_size": 7}
    torch.manual_seed(0)
    experts = make(SimpleNamespace(**{**sizes, "_experts_implementation": "eager", **config})).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


ODD = {
    "no gate": ("nemotron_h", {"n_routed_experts": 5, "moe_latent_size": None, "mlp_hidden_act": "relu2"}),
    "a norm behind": ("muse_spark", {"moe_hidden_size": 12, "hidden_act": "silu", "post_norm_eps": 1e-5}),
    "transposed": ("aria", {"moe_num_experts": 5}),
    "side by side with biases": ("openai_privacy_filter", {"swiglu_alpha": 1.7, "swiglu_limit": 0.5}),
    "interleaved with biases": ("gpt_oss", {"swiglu_alpha": 1.7, "swiglu_limit": 0.5}),
    "an activation that we lack": ("mixtral", {"hidden_act": "quick_gelu"}),
    "exact gelu": ("mixtral", {"hidden_act": "gelu"}),
    "gelu by tanh": ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}),
}


@pytest.mark.parametrize("n_tokens", [9, 1, 0])
@pytest.mark.parametrize("name", ODD)
def test_experts_of_every_layout_give_eager_s_outputs_and_gradients(name, n_tokens):
    kind, config = ODD[name]
    experts = odd_experts(kind, **config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_tokens, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    # expert 4 is not met
    ids = torch.rand(n_tokens, 4, generator=generator).argsort(-1)[:, :3]
    weights = torch.rand(n_tokens, 3, dtype=torch.float64, generator=generator, requires_grad=True)

    def run(implementation: str):
        experts.config._experts_implementation = implementation
        y = experts(x, ids, weights)
        leaves = [x, weights, *experts.parameters()] if n_tokens else []
        loss = (y * torch.linspace(1, 2, 12)).sum()
        return y, torch.autograd.grad(loss, leaves, materialize_grads=True) if leaves else ()

    want, gradients = run("eager")
    have, mine = run("moestro")
    # two families round to float32 inside, whatever they are given
    close = FLOAT32 if kind in ("muse_spark", "openai_privacy_filter") else FLOAT64
    torch.testing.assert_close(have, want, **close)
    for gradient, my_gradient in zip(gradients, mine, strict=True):
        torch.testing.assert_close(my_gradient, gradient, **close)


def test_experts_spread_over_processes_are_refused():
    experts = odd_experts("mixtral", hidden_act="silu", _experts_implementation="moestro")
    experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="spread over processes; use eager"):
        experts(torch.zeros(2, 12).double(), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1).double())


def test_stock_models_use_it_with_one_argument(tmp_path, monkeypatch):
    tiny("olmoe").save_pretrained(tmp_path)
    calls = []
    real = hf_experts.expert_ffn
    monkeypatch.setattr(hf_experts, "expert_ffn", lambda *given: calls.append(given[6]) or real(*given))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moestro")
    assert model.config._experts_implementation == "moestro"
    have = model(some_tokens()).logits
    assert calls == [[24] * 4] * 2
    torch.testing.assert_close(have, tiny("olmoe")(some_tokens()).logits, **FLOAT32)


def test_a_step_of_generation_runs_without_sorting_and_agrees():
    eager, ours = tiny("qwen3_moe"), tiny("qwen3_moe", experts="moestro")
    with torch.no_grad():
        one = some_tokens(1, 1)
        torch.testing.assert_close(ours(one).logits, eager(one).logits, **FLOAT32)
    said = [m.generate(some_tokens(1, 5), max_new_tokens=8, do_sample=False) for m in (eager, ours)]
    assert torch.equal(*said)


@pytest.mark.parametrize("family", MOE)
def test_an_intercepted_model_sees_every_call_and_computes_eager_s_bits(family):
    model, seen = tiny(family), []
    want = model(some_tokens()).logits

    def look(layer, module, hidden, ids, weights):
        seen.append((layer, module))
        assert hidden.shape == (24, 32) and ids.shape == weights.shape == (24, 2)
        assert int(ids.max()) < module.num_experts

    with intercepted(model, look):
        have = model(some_tokens()).logits
    assert torch.equal(have, want)
    layers = [1] if family in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "jamba") else [0, 1]
    assert [layer for layer, _ in seen] == layers and dict(seen) == experts_modules(model)
    assert torch.equal(model(some_tokens()).logits, want) and len(seen) == len(layers)


def test_what_the_intercept_returns_is_the_output_and_has_gradients():
    model = tiny("mixtral")
    scale = torch.tensor(1.0, requires_grad=True)
    with intercepted(model, lambda layer, module, x, ids, weights: eager_experts(module, x, ids, weights) * scale):
        logits = model(some_tokens()).logits
    assert torch.equal(logits, model(some_tokens()).logits)
    logits.square().mean().backward()
    assert float(scale.grad.abs()) > 0


def test_intercepts_nest_and_an_error_puts_everything_back():
    model, calls = tiny("mixtral", experts="grouped_mm"), []
    want = model(some_tokens()).logits
    with intercepted(model, lambda layer, *_: calls.append(("outer", layer))):
        with intercepted(model, lambda layer, *_: calls.append(("inner", layer)), otherwise="grouped_mm"):
            assert torch.equal(model(some_tokens()).logits, want)
        model(some_tokens())
    assert calls == [("inner", 0), ("inner", 1), ("outer", 0), ("outer", 1)]
    with pytest.raises(RuntimeError, match="stop"), intercepted(model, lambda *_: None):
        raise RuntimeError("stop")
    assert model.config._experts_implementation == "grouped_mm" and torch.equal(model(some_tokens()).logits, want)


def test_models_without_experts_and_unknown_implementations_are_refused():
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM has no experts"),
        intercepted(tiny("llama"), lambda *_: None),
    ):
        pass
    with (
        pytest.raises(ValueError, match="otherwise='fast', allowed: eager, .*moestro"),
        intercepted(tiny("mixtral"), lambda *_: None, otherwise="fast"),
    ):
        pass
