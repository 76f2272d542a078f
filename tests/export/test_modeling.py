"""Our models inside transformers: the same logits, caches, padding, generation, saving."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from moestro.export import MoestroForCausalLM, MoestroModel, open_model
from moestro.export.assembly import assembled
from moestro.export.construction import construction
from moestro.export.opening import configured
from moestro.export.vocabulary import vocabulary
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.train import load_weights, newest_checkpoint
from tests.conftest import ROOT
from tests.export.conftest import SHRUNK, SYSTEMS, hosted, some_tokens
from tests.tolerances import FLOAT64

PAPER = sorted(path.stem for path in (ROOT / "recipes" / "paper").glob("*.yaml"))
CACHED = ["hmoe", "peer", "dynmoe", "hypermoe", "stratified", "memory_plus"]
close = torch.testing.assert_close


@pytest.mark.parametrize("name", [*SYSTEMS, *(pytest.param(f"paper/{name}", marks=pytest.mark.slow) for name in PAPER)])
def test_a_construction_is_the_recipe_s_model(name: str) -> None:
    """Through JSON with sorted keys, as configurations are written."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", SHRUNK.get(name, []))
    stored = json.loads(json.dumps(construction(recipe, 50), sort_keys=True))
    with torch.device("meta"):
        model = assembled(stored, vocabulary())
    expected = build_model(recipe, 50, "meta")
    assert str(model) == str(expected)
    shapes, wanted = ({n: (v.shape, v.dtype) for n, v in m.state_dict().items()} for m in (model, expected))
    assert shapes == wanted
    ties = [[id(v) for v in m.state_dict(keep_vars=True).values()] for m in (model, expected)]
    assert [ties[0].index(i) for i in ties[0]] == [ties[1].index(i) for i in ties[1]]


def test_a_construction_says_defaults_and_calls_nothing_else() -> None:
    node = construction(load_recipe(ROOT / "recipes" / "hmoe.yaml"), 50)["blocks"][0]["ffn"]
    assert node["branches"][0]["activation"] == "silu" and node["router"]["select"]["renormalize"] is True
    with pytest.raises(ValueError, match="unknown part 'system'"):
        assembled({"make": "system", "command": "true"}, vocabulary())


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
def test_with_a_cache_token_by_token_and_in_pieces_equals_the_whole(name: str) -> None:
    model, tokens = hosted(name).double(), some_tokens(2, 12)
    whole = model(tokens).logits
    close(whole, model.decoder(tokens).logits, rtol=0, atol=0)
    for sizes in ([1] * 12, [5, 1, 6]):
        past, pieces = DynamicCache(config=model.config), []
        for piece in tokens.split(sizes, dim=1):
            pieces.append(model(piece, past_key_values=past, use_cache=True).logits)
        assert past.get_seq_length() == 12
        close(torch.cat(pieces, 1), whole, **FLOAT64)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hmoe", "peer"])
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    model, tokens = hosted(name).double(), some_tokens(1, 9)
    padded, mask = torch.full((3, 12), 256), torch.zeros(3, 12, dtype=torch.int64)
    for row, left in enumerate((0, 3, 1)):
        padded[row, left : left + 9], mask[row, left : left + 9] = tokens[0], 1
    whole, batch = model(tokens).logits[0], model(padded, attention_mask=mask)
    assert batch.logits.isfinite().all()
    for row, left in enumerate((0, 3, 1)):
        close(batch.logits[row, left : left + 9], whole, **FLOAT64)
    first = model(padded[:, :7], attention_mask=mask[:, :7], use_cache=True)
    rest = model(padded[:, 7:], attention_mask=mask, past_key_values=first.past_key_values)
    close(rest.logits[1], whole[4:], **FLOAT64)


@torch.no_grad()
def test_generation_greedy_sampled_and_by_beams() -> None:
    model, tokens = hosted("hmoe").double(), some_tokens(1, 6)
    said = {"max_new_tokens": 8, "pad_token_id": 256, "eos_token_id": 256}
    greedy = model.generate(tokens, do_sample=False, **said)
    expected = tokens
    for _ in range(8):
        best = model.decoder(expected).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, best[:, None]], 1)
    assert torch.equal(greedy, expected)
    assert torch.equal(greedy, model.generate(tokens, do_sample=False, use_cache=False, **said))
    assert torch.equal(greedy, model.generate(tokens, do_sample=True, top_k=1, **said))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(tokens, do_sample=True, **said))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

    def likelihood(sequence: torch.Tensor) -> float:
        logs = model.decoder(sequence).logits.log_softmax(-1)[:, 5:-1]
        return float(logs.gather(-1, sequence[:, 6:, None]).sum())

    beams = model.generate(tokens, num_beams=4, do_sample=False, **said)
    assert torch.equal(beams, model.generate(tokens, num_beams=4, do_sample=False, use_cache=False, **said))
    assert likelihood(beams) > likelihood(greedy)


def test_loss_and_gradients_are_the_decoder_s_also_when_recomputed() -> None:
    model, tokens = hosted("hmoe").double().train(), some_tokens(2, 10)
    logits = model.decoder(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.activation_checkpointing_enable()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        # transformers takes losses in float32
        close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["hmoe", "hypermoe", "memory_plus", "dynmoe", "peer_uneven", "deepseek_v3"])
def test_saving_and_loading_keeps_every_bit(name: str, tmp_path: Path) -> None:
    """Tied generators and banks, constants that no file holds, buffers of integers, several files."""
    model, tokens = hosted(name), some_tokens(2, 7)
    model.save_pretrained(tmp_path / "once", max_shard_size="1MB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert type(again) is MoestroForCausalLM and not again.training
    for of in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        for (name, own), (_, back) in zip(of(model), of(again), strict=True):
            assert own.dtype == back.dtype and torch.equal(own, back), name
    # not to the bit: torch's products of few rows round by where in memory a matrix lies
    close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    ties = [
        {n for n, v in m.state_dict(keep_vars=True).items() if v is not dict(m.named_parameters()).get(n, v)}
        for m in (model, again)
    ]
    assert ties[0] == ties[1] and again._tied_weights_keys == model._tied_weights_keys
    again.save_pretrained(tmp_path / "twice", max_shard_size="1MB")
    stored = [tensors_of(tmp_path / name) for name in ("once", "twice")]
    assert stored[0].keys() == stored[1].keys() and len(list((tmp_path / "once").glob("*.safetensors"))) > 1
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


@torch.no_grad()
def test_tied_embeddings_are_one_tensor_after_loading(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "dense.yaml", ["model.tie_embeddings=true", "data.tokenizer={kind: bytes}"])
    model = MoestroForCausalLM(configured(recipe, 257)).eval()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embedding.weight is again.decoder.head.weight
    assert torch.equal(again(some_tokens(1, 5)).logits, model(some_tokens(1, 5)).logits)


@torch.no_grad()
def test_the_base_model_loads_alone(tmp_path: Path) -> None:
    model = hosted("moe")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MoestroModel
    hidden = base(some_tokens(1, 5)).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(some_tokens(1, 5)).logits)


def test_a_missing_tensor_is_an_error_and_not_a_random_one(tmp_path: Path) -> None:
    hosted("moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.blocks.1.ffn.router.score.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks tensors: .*blocks\.1\.ffn\.router\.score\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_in_bfloat16_routers_stay_wide(tmp_path: Path) -> None:
    model, tokens = hosted("hmoe"), some_tokens(2, 32)
    model.save_pretrained(tmp_path)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {("router" in name, p.dtype) for name, p in narrow.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    wide = model(tokens).logits
    # the median: tokens near a tie may get other experts
    assert (narrow(tokens).logits.float() - wide).abs().median() < 0.02 * wide.std()


@torch.no_grad()
def test_what_looks_at_later_tokens_generates_without_a_cache_only() -> None:
    model, tokens = hosted("expert_choice"), some_tokens(1, 6)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens, past_key_values=DynamicCache())
    assert model.generate(tokens, max_new_tokens=2, use_cache=False, pad_token_id=256).shape == (1, 8)


def test_impossible_calls_say_what_is_allowed() -> None:
    model = hosted("dense")
    with pytest.raises(ValueError, match=r"attention_mask \[1, 2\], allowed: \[1, 3\]"):
        model(some_tokens(1, 3), attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_a_run_opens_with_its_weights_and_tokenizer(run_of: Callable[..., Path]) -> None:
    run = run_of("hmoe")
    opened, tokens = open_model(run), some_tokens(2, 20)
    expected = build_model(load_recipe(run / "recipe.yaml"), 257)
    load_weights(expected, newest_checkpoint(run))
    with torch.no_grad():
        assert torch.equal(opened.model(tokens).logits, expected.eval()(tokens).logits)
    assert opened.model.config.recipe["data"]["seq_len"] == 128 and opened.model.config.vocab_size == 257
    narrow = open_model(run, dtype=torch.bfloat16).model
    assert narrow.lm_head.weight.dtype == torch.bfloat16 and narrow.dtype == torch.bfloat16
