"""What goes wrong with folders of mixtures without a word elsewhere, and does not here."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moestro.formats import Checkpoint, FormatError
from moestro.hf import load
from moestro.recipe.importing import import_model
from tests.hf.families import some_tokens, tiny
from tests.hf.test_pretrained_recipe import write_tokenizer

PITFALLS = {
    "names and shapes differ between memory and disk": "hf.test_import a_run_comes_back_as_the_same",
    "names of routers are others in memory": "hf.test_pretrained_recipe the_weights_are_the_folder_s",
    "experts stand in the natural order of their numbers, 10 behind 9": "hf.test_pitfalls experts_beyond_the_tenth",
    "some families store all experts of a layer as one tensor": "formats.test_checkpoint reads_fused_and_transposed",
    "or transposed, gate and up interleaved, with biases": "hf.test_experts experts_of_every_layout",
    "what is loaded and saved again has other bits": "export.test_pretrained what_comes_in_goes_out",
    "the key that counts experts differs, and qwen3 has two": "hf.test_pitfalls qwen3_s_two_keys",
    "the correction bias is narrowed with the rest": "hf.test_pitfalls the_correction_bias_stays",
    "stacked experts are no linear maps: quantisers pass them by": "compress.test_quantised",
    "gates are renormalised, or not, or where the configuration says": "hf.test_view what_a_config_changes_is_seen",
    "deepseek_v2 states a renormalisation that it does not do": "hf.test_view what_a_config_changes_is_seen",
    "choices by biased scores, gates by others, groups by best two": "hf.test_view the_definition_gives_eager_s",
    "phimoe draws experts while it trains": "hf.test_view phi_moe_s_router_trains",
    "some layers have no experts": "hf.test_view layers_are_sorted_by_what_they_are",
    "shared experts are experts of no number": "compress.test_apply_families what_is_no_routed_expert_stays",
    "implementations differ in the last bits": "hf.test_view the_fast_operation_is_close",
    "a folder that is loaded twice computes the same bits": "hf.test_load logits_and_tensors_are_those",
    "an implementation of one's own in eager's order is eager": "hf.test_experts an_intercepted_model_sees_every",
    "which implementation is in force depends on a decorator": "hf.test_load dtype_and_implementation_are_those",
    "classes swapped for others get no conversion of weights": "compress.test_apply_custom folders_of_two_families",
    "gaps between experts are closed up without a word": "hf.test_pitfalls gaps_between_experts",
    "scales and other companions of experts keep old numbers": "compress.test_apply_job scales_and_other_companions",
    "rows of routers, biases and stacked tensors must go along": "compress.test_apply_families pruned_folders_load",
    "a configuration that is written again loses keys of old programs": "compress.test_config_text only_the_value",
    "so does an import": "hf.test_pitfalls an_import_leaves_config_json_as_it_is",
    "more experts a token than there are load, and fail when they run": "hf.test_pitfalls more_experts_a_token",
    "groups of unequal sizes load where their sum divides": "compress.test_feasible plans_that_break_routing",
    "layers that predict further tokens are dropped": "hf.test_pitfalls layers_that_predict_further_tokens",
    "or keep experts that others lost": "compress.test_apply_job multi_token_prediction_is_pruned",
    "a stale index is tolerated": "formats.test_checkpoint damaged_folders_are_refused",
    "the index must say exactly what is there": "compress.test_apply_families the_index_says_exactly",
    "metadata of files must say pt": "formats.test_writer rows_and_ranges_of_other_files",
    "tokenizer, template and code must go along": "compress.test_apply_job the_source_stays_as_it_is_and_companions",
    "what is missing is drawn at random": "hf.test_load what_is_wrong_with_a_folder",
    "removing is routing to others, zeroing is not": "compress.test_applied zeroing_leaves_the_other_gates",
    "removing equals logits of minus infinity": "compress.test_applied slicing_equals_masking",
    "nothing removed must copy bytes": "compress.test_apply_families a_plan_that_changes_nothing_copies",
}


def test_every_pitfall_has_a_test():
    for pitfall, place in PITFALLS.items():
        module, _, beginning = place.partition(" ")
        names = vars(import_module(f"tests.{module}"))
        assert any(name.startswith(f"test_{beginning}") for name in names), pitfall


def saved(folder: Path, family: str, **config) -> Path:
    tiny(family, vocab_size=260).save_pretrained(folder)
    write_tokenizer(folder)
    return said(folder, **config)


def said(folder: Path, **changes) -> Path:
    """The folder with other values in config.json; None takes a key away."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def rewritten(folder: Path, change) -> Path:
    """The folder with other tensors: `change` gets and gives a dict."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def test_gaps_between_experts_are_refused_where_transformers_stacks_what_is_left(tmp_path):
    def pruned(tensors):
        left = {name: t for name, t in tensors.items() if ".experts.1." not in name}
        return {n: t[[0, 2, 3]] if n.endswith("mlp.gate.weight") else t for n, t in left.items()}

    folder = said(rewritten(saved(tmp_path, "olmoe"), pruned), num_experts=3)
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(FormatError, match=r"experts\.1\.gate_proj"):
        load(folder)


def test_qwen3_s_two_keys_must_agree_and_one_must_be_there(tmp_path):
    folder = saved(tmp_path, "qwen3_moe", num_experts=4, num_local_experts=4)
    load(folder)
    with pytest.raises(FormatError, match="contradicts itself"):
        load(said(folder, num_experts=3))
    load(said(folder, num_experts=4, num_local_experts=None))
    with pytest.raises(FormatError, match=r"does not say how many experts .*\(num_experts or num_local_experts\)"):
        load(said(folder, num_experts=None))


def test_more_experts_a_token_than_there_are_are_refused_before_anything_runs(tmp_path):
    folder = saved(tmp_path, "mixtral", num_experts_per_tok=5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(RuntimeError, match="out of range"):
        model(some_tokens())
    with pytest.raises(FormatError, match="num_experts_per_tok=5, but a layer has 4 experts"):
        load(folder)


def test_a_number_of_experts_for_every_layer_is_no_stock_model(tmp_path):
    with pytest.raises(FormatError, match=r"num_local_experts is \[4, 4\], expected a whole number"):
        load(saved(tmp_path / "a", "mixtral", num_local_experts=[4, 4]))

    def uneven(tensors):
        gate = "model.layers.1.block_sparse_moe.gate.weight"
        left = {name: t for name, t in tensors.items() if "layers.1.block_sparse_moe.experts.3." not in name}
        return {**left, gate: left[gate][:3].clone()}

    with pytest.raises(FormatError, match="layer 1 routes to 3 experts, config.json states 4"):
        load(rewritten(saved(tmp_path / "b", "mixtral"), uneven))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_are_left_out_with_a_word_and_kept_by_an_import(family, tmp_path):
    def predicting(tensors):
        extra = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
        return {**tensors, **extra, "model.layers.2.eh_proj.weight": torch.zeros(32, 64)}

    folder = rewritten(saved(tmp_path / "public", family, num_nextn_predict_layers=1), predicting)
    with pytest.warns(UserWarning, match=r"transformers drops \d+ tensors of extra layers: model\.layers\.2\."):
        model = load(folder, "eager", attention="eager")
    assert torch.equal(model(some_tokens()).logits, tiny(family, vocab_size=260)(some_tokens()).logits)
    import_model(folder, tmp_path / "run")
    copied = tmp_path / "run" / "pretrained" / "model.safetensors"
    assert copied.read_bytes() == (folder / "model.safetensors").read_bytes()


def test_an_import_leaves_config_json_as_it_is(tmp_path):
    """A configuration that transformers 5 writes again has other keys, which older programs read as defaults."""
    old = {"rope_theta": 5e5, "rope_parameters": None, "torch_dtype": "float32", "dtype": None}
    folder = saved(tmp_path / "public", "qwen3_moe", num_experts=4, num_local_experts=None, **old)
    text = (folder / "config.json").read_text()
    import_model(folder, tmp_path / "run")
    assert (tmp_path / "run" / "pretrained" / "config.json").read_text() == text
    assert load(folder).config.rope_parameters["rope_theta"] == 5e5
    assert "rope_theta" in json.loads(text) and "num_local_experts" not in json.loads(text)


def test_the_correction_bias_stays_in_float32(tmp_path):
    model = tiny("deepseek_v3", vocab_size=260).to(torch.bfloat16)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias = torch.linspace(0, 1, 8) / 3
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    bias = loaded.model.layers[1].mlp.gate.e_score_correction_bias
    assert loaded.dtype == torch.bfloat16 and bias.dtype == torch.float32
    assert torch.equal(bias, torch.linspace(0, 1, 8) / 3)


def test_experts_beyond_the_tenth_keep_their_numbers(tmp_path):
    """Names sorted as words put 10 before 2."""
    model = tiny("mixtral", num_local_experts=12, vocab_size=260)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    checkpoint, stacked = Checkpoint(tmp_path), load(tmp_path).model.layers[1].mlp.experts.gate_up_proj
    for expert in range(12):
        gate = stored[f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"]
        assert torch.equal(gate, stacked[expert, : len(gate)])
        assert torch.equal(checkpoint.expert(1, expert).gate, gate)
