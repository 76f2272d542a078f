"""Soft mixtures of low-rank experts around models of transformers, for PEFT, and in runs that start from others."""

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moestro.evaluate import evaluate
from moestro.hf.peft import export_lora
from moestro.layers import Adapters, LowRankMixtures, adapt
from moestro.recipe.build import build_data, build_model, run_training
from moestro.recipe.evaluation import evaluate_run, opened_run
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import Router
from moestro.routing import SoftRouting
from moestro.train import newest_checkpoint
from moestro.train.checkpoint import read_tensors
from moestro.train.loop import train
from tests.conftest import ROOT
from tests.systems.test_smola import sharp, stirred, uniform
from tests.tolerances import FLOAT32
from tests.train.test_resume import Killed

close = torch.testing.assert_close
MODELS = {
    "llama": (
        lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        ),
        r"[qv]_proj|down_proj",
    ),
    # whose linear maps are Conv1D, with the weight the other way round
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2)), r"c_attn|c_fc"),
}
models = pytest.mark.parametrize("name", MODELS)


def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def adapted(name: str, router=sharp, **values) -> tuple[PreTrainedModel, Adapters]:
    made = model(name)
    adapters = adapt(made, MODELS[name][1], LowRankMixtures(3, 2, router, **values))
    stirred(made)
    return made, adapters


def text(*shape: int) -> Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(0))


@models
def test_any_model_s_linear_maps(name: str) -> None:
    """Nothing changes at first; adapters alone learn; groups pass by the model's own forward; generation is cached."""
    made, x = model(name), text(2, 7)
    before = made(x).logits
    adapters = adapt(made, MODELS[name][1], LowRankMixtures(3, 2, sharp, groups=[None, 1]))
    with adapters.given(groups=torch.zeros_like(x)):
        assert torch.equal(made(x).logits, before)
    stirred(made)
    with adapters.given(groups=torch.zeros_like(x)):
        zeros = made(x).logits
    with adapters.given(groups=torch.tensor([0, 0, 0, 1, 0, 0, 0]).expand_as(x)):
        mixed = made(x).logits
        mixed.square().mean().backward()
    assert torch.equal(mixed[:, :3], zeros[:, :3]) and not torch.allclose(mixed[:, 3:], zeros[:, 3:])
    assert {id(p) for p in made.parameters() if p.grad is not None} == {id(p) for p in adapters.parameters()}
    with adapters.disabled():
        assert torch.equal(made(x).logits, before)
    assert torch.equal(adapters.unwrap()(x).logits, before)


@models
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    made, _ = adapted(name)
    texts = [
        made.generate(text(2, 4), max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


@models
def test_merged_weights_give_the_same(name: str) -> None:
    made, adapters = adapted(name, uniform, scale=2.0)
    before = made(text(2, 5)).logits
    close(adapters.merge()(text(2, 5)).logits, before, **FLOAT32)


class OneHot(Router):
    """All of the weight on one expert."""

    def __init__(self, n_experts: int, expert: int) -> None:
        super().__init__()
        self.n_experts, self.expert = n_experts, expert

    def forward(self, x: Tensor) -> SoftRouting:
        return SoftRouting((nn.functional.one_hot(torch.full((len(x),), self.expert), self.n_experts).to(x),))


@models
@pytest.mark.parametrize("times_experts", [False, True])
def test_peft_reads_every_expert(name: str, times_experts: bool, tmp_path: Path) -> None:
    made, adapters = adapted(name, groups=[None, None], scale=0.5, times_experts=times_experts)
    folders = export_lora(adapters, tmp_path / "experts", base="somewhere")
    assert [folder.name for folder in folders] == [f"mixture-{m}-expert-{e}" for m in (0, 1) for e in range(3)]
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere" and config["r"] == 2
    for mixture, expert in ((0, 1), (1, 2)):
        made, adapters = adapted(name, groups=[None, None], scale=0.5, times_experts=times_experts)
        for layer in adapters.layers.values():
            layer.mixtures[mixture].router = OneHot(3, expert)
            nn.init.zeros_(layer.mixtures[1 - mixture].bank.up)
        theirs = peft.PeftModel.from_pretrained(model(name), folders[3 * mixture + expert])
        assert not torch.allclose(theirs(text(2, 5)).logits, model(name)(text(2, 5)).logits, atol=1e-3)
        close(theirs(text(2, 5)).logits, made(text(2, 5)).logits, **FLOAT32)


SMALL = ["model.d_model=16", "model.n_layers=2", "model.attention.n_heads=2", "model.ffn.width=24", "data.seq_len=32"]
BRIEF = ["train.batch_size=2", "train.budget.steps=6", "train.save_every=3", "train.eval_tokens=64", "optim.lr=0.01"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_file: Path) -> tuple[Path, list[str]]:
    """A trained run, and what recipes that start from it say."""
    folder = tmp_path_factory.mktemp("base") / "run"
    data = [f"data.source={{kind: text, paths: {text_file}, split: blank-line}}", "data.tokenizer={kind: bytes}"]
    said = [*data, *SMALL, *BRIEF, "train.tensorboard=false"]
    run_training(load_recipe(ROOT / "recipes" / "dense.yaml", said), folder, show_preparation=False)
    return folder, said


def smola(said: list[str], start: Path, *more: str):
    return load_recipe(ROOT / "recipes" / "smola.yaml", [*said, f"adapt.start={start}", *more])


def test_a_run_starts_from_another(base, tmp_path: Path) -> None:
    """Before the first step it is the other run's model, after the last its weights are still there."""
    folder, said = base
    recipe = smola(said, folder)
    dataset = build_data(recipe).prepare(progress=False)
    fresh = build_model(recipe, dataset.vocab_size, from_start=True)
    figures = evaluate(fresh, dataset.val_batches(2, 64))
    assert figures["loss"] == pytest.approx(json.loads((folder / "done.json").read_text())["eval"]["loss"])
    run_training(recipe, tmp_path / "run", show_preparation=False)
    theirs = read_tensors(newest_checkpoint(folder), "model")
    mine = read_tensors(newest_checkpoint(tmp_path / "run"), "model")
    assert all(torch.equal(mine.get(name, mine.get(with_base(name))), value) for name, value in theirs.items())
    assert any(".mixtures.0.bank.up" in name and value.any() for name, value in mine.items())
    assert evaluate_run(opened_run(tmp_path / "run"), max_tokens=64)["loss"] != figures["loss"]
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe


def with_base(name: str) -> str:
    return name.removesuffix(".weight") + ".base.weight"


def test_a_killed_run_does_not_start_again(base, tmp_path: Path, monkeypatch) -> None:
    folder, said = base
    recipe = smola(said, folder)
    run_training(recipe, tmp_path / "whole", show_preparation=False)

    def mortal(model, dataset, *rest):
        real, dataset.train_batch = dataset.train_batch, lambda step, *more: real(step, *more) if step < 4 else killed()
        return train(model, dataset, *rest)

    def killed():
        raise Killed

    monkeypatch.setattr("moestro.recipe.build.train", mortal)
    with pytest.raises(Killed):
        run_training(recipe, tmp_path / "parts", show_preparation=False)
    monkeypatch.undo()
    run_training(recipe, tmp_path / "parts", show_preparation=False)
    whole, parts = (read_tensors(newest_checkpoint(tmp_path / name), "model") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_all_of_a_model_may_go_on_learning(base, tmp_path: Path) -> None:
    folder, said = base
    recipe = load_recipe(ROOT / "recipes" / "dense.yaml", [*said, f"adapt.start={folder}"])
    run_training(recipe, tmp_path / "run", show_preparation=False)
    theirs, mine = (read_tensors(newest_checkpoint(run), "model") for run in (folder, tmp_path / "run"))
    assert theirs.keys() == mine.keys() and not any(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_cannot_be_started_from(base, tmp_path: Path) -> None:
    folder, said = base
    for more, message in (
        ([f"adapt.start={tmp_path}"], r"is not the folder of a run: it holds no tokenizer \(.*adapt\.start\)"),
        (["data.tokenizer={kind: bpe, vocab_size: 300}"], r"reads text through another tokenizer; allowed: its own"),
        (["model.d_model=32"], r"the checkpoint is of another model: .*\(.*adapt\.start\)"),
        (["adapt.targets=nowhere"], r"targets='nowhere' matches no linear map; .*\(.*adapt"),
        (["adapt.targets='('"], r"targets='\(' is no regular expression: .*\(.*adapt"),
        (["adapt.mixtures.scale=0"], r"scale=0\.0, allowed: above 0"),
        (
            ["adapt.mixtures.router={kind: scored, score: {kind: linear}, select: {kind: top_k, top_k: 9}}"],
            r"^top_k=9 > 4 experts \([^()]*adapt\.mixtures\.router[^()]*\)$",
        ),
        (["adapt.mixtures.rank=0"], r"rank=0, .*allowed: at least 1"),
        (
            ["adapt.mixtures.router={kind: slots, slots: 2}"],
            r"SlotRouter looks at other tokens.*\(.*adapt\.mixtures\.router\)",
        ),
        (["adapt.mixture=1"], r"unknown key 'mixture'; did you mean 'mixtures'"),
    ):
        with pytest.raises(RecipeError, match=message):
            run_training(smola(said, folder, *more), tmp_path / "run", show_preparation=False)
    assert not (tmp_path / "run").exists()


def test_adapters_of_other_kinds(base) -> None:
    """The router of mixtures is any router, told its sizes; slots where the recipe allows them."""
    folder, said = base
    for router in ("{kind: uniform}", "{kind: scored, score: {kind: cosine}, select: {kind: top_k, top_k: 2}}"):
        made = build_model(smola(said, folder, f"adapt.mixtures.router={router}"), 257)
        assert made(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 257)
    slots = ["adapt.mixtures.router={kind: slots, normalized: true}", "model.allow_non_causal=true"]
    assert build_model(smola(said, folder, *slots), 257).expected_token_flops(32) > 0
