"""Public checkpoints in, runs on, stock folders out: the same names, the same tensors, or those that were trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moestro.cli import main
from moestro.compress import PlanError
from moestro.compress.source import open_source
from moestro.export import open_model
from moestro.export.folder import Choices, ExportError, export_run
from moestro.export.pretrained import on_disk
from moestro.formats import Checkpoint
from moestro.recipe.build import run_training
from moestro.recipe.importing import import_model
from moestro.recipe.load import load_recipe
from tests.hf.families import DENSE, MOE, some_tokens, tiny
from tests.hf.test_pretrained_recipe import write_tokenizer

STOCK = Choices(layout="stock")
CARD = "---\nlicense: llama3\n---\n\n# A model\n"
QUICK = ("mixtral", "granitemoe", "gpt2")


def public(path: Path, family: str, dtype: torch.dtype = torch.float32, **given) -> Path:
    tiny(family, vocab_size=260, dtype=dtype).save_pretrained(path, **given)
    write_tokenizer(path)
    (path / "README.md").write_text(CARD)
    return path


def trained(source: Path, run: Path, text: Path, *changes: str) -> Path:
    """A run of two steps that goes on from `source`."""
    made = import_model(source, run.with_name("imported"))
    data = [f"data.source={{kind: text, paths: {text}, split: blank-line}}", "data.seq_len=16", "train.batch_size=2"]
    steps = ["train.budget.steps=2", "train.eval_tokens=64", "optim.lr=0.01"]
    with torch.enable_grad():
        run_training(load_recipe(made.recipe, [*data, *steps, *changes]), run, show_preparation=False)
    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in (*MOE, *DENSE)]
)
def test_what_comes_in_goes_out(family: str, tmp_path: Path, text_file: Path) -> None:
    source = public(tmp_path / "public", family)
    import_model(source, tmp_path / "run")
    done = export_run(tmp_path / "run", tmp_path / "out", STOCK)
    assert done.architecture == type(tiny(family)).__name__ and same(tensors(source), tensors(tmp_path / "out"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    run = trained(source, tmp_path / "trained", text_file)
    on = export_run(run, tmp_path / "on", STOCK)
    assert on.n_parameters == done.n_parameters == sum(p.numel() for p in tiny(family, vocab_size=260).parameters())
    before, after = tensors(source), tensors(tmp_path / "on")
    assert before.keys() == after.keys() and {n: t.shape for n, t in before.items()} == {
        n: t.shape for n, t in after.items()
    }
    assert not any(
        torch.equal(before[n], after[n]) for n in before if n.endswith(("embed_tokens.weight", "wte.weight"))
    )
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "on", output_loading_info=True)
    assert not any(keys for name, keys in info.items() if name != "conversion_errors")
    assert torch.equal(loaded.eval()(some_tokens()).logits, open_model(run).model(some_tokens()).logits)


def test_narrow_sharded_and_what_the_card_says(tmp_path: Path, text_file: Path) -> None:
    source = public(tmp_path / "llama-tiny", "deepseek_v3", torch.bfloat16)
    run = trained(source, tmp_path / "run", text_file, "model.dtype=float32")
    export_run(tmp_path / "imported", tmp_path / "same", STOCK)
    assert same(tensors(source), tensors(tmp_path / "same"))
    card = (tmp_path / "same" / "README.md").read_text()
    assert "llama-tiny, a model of the family deepseek_v3, not trained further" in card and "license: llama3" in card
    assert "Recipe" not in card and "stdlib" not in card
    assert (tmp_path / "same" / "README.original.md").read_text() == CARD
    export_run(run, tmp_path / "wide", STOCK)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    export_run(run, tmp_path / "narrow", Choices(layout="stock", dtype="bfloat16", shard_bytes=20_000))
    stored, wide = tensors(tmp_path / "narrow"), tensors(tmp_path / "wide")
    assert len(list((tmp_path / "narrow").glob("*.safetensors"))) > 2
    assert {(n.endswith("correction_bias"), t.dtype) for n, t in stored.items()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }
    assert all(torch.equal(t, wide[n].to(t.dtype)) for n, t in stored.items())
    card = (tmp_path / "narrow" / "README.md").read_text()
    assert "trained from the pretrained llama-tiny" in card and "under llama3, by its own card" in card
    assert open_model(tmp_path / "narrow").model.dtype == torch.bfloat16


def test_nothing_is_written_into_the_folder_that_a_run_reads(tmp_path: Path) -> None:
    source = public(tmp_path / "public", "mixtral")
    before = sorted(path.name for path in source.iterdir())
    import_model(source, tmp_path / "run", link=True)
    with pytest.raises(ExportError, match="inside lies in .*public, which is only read"):
        export_run(tmp_path / "run", source / "inside", STOCK)
    assert sorted(path.name for path in source.iterdir()) == before
    # its experts are compressed where a folder holds them
    with pytest.raises(PlanError, match="export the run .* and compress that folder"):
        open_source(tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("layers: {}", "layers: {1: {kind: dense, width: 16}}"))
    with pytest.raises(PlanError, match="block 0: .* export the run"):
        _ = open_source(tmp_path / "run").moe_layers


def test_layers_that_predict_further_tokens_are_kept(tmp_path: Path) -> None:
    source = public(tmp_path / "public", "deepseek_v3")
    more = {"model.layers.2.eh_proj.weight": torch.randn(4, 4)}
    save_file({**tensors(source), **more}, source / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning):
        import_model(source, tmp_path / "run")
        export_run(tmp_path / "run", tmp_path / "out", STOCK)
        open_model(tmp_path / "run")
    assert same(tensors(source), tensors(tmp_path / "out")) and same(more, {n: tensors(source)[n] for n in more})


def test_another_tokenizer_is_the_run_s(tmp_path: Path) -> None:
    source = public(tmp_path / "public", "olmoe")
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (source / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    import_model(source, tmp_path / "run", tmp_path)
    export_run(tmp_path / "run", tmp_path / "out", STOCK)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the quick")["input_ids"]


def test_what_no_stock_architecture_has_is_said(tmp_path: Path, text_file: Path, capsys) -> None:
    source = public(tmp_path / "public", "olmoe")
    ffn = "model.layers={1: {kind: dense, width: 16}}"
    run = trained(source, tmp_path / "run", text_file, ffn)
    with pytest.raises(ExportError, match="layer 1 is no longer the OlmoeSparseMoeBlock"):
        export_run(run, tmp_path / "out", STOCK)
    # stock goes without saying, and ours is no layout of a pretrained model
    for said, message in ([], "is no longer the OlmoeSparseMoeBlock"), (["--format", "moestro"], "--format stock"):
        assert main(["export", str(run), "--out", str(tmp_path / "out"), *said]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_tensor_without_a_name_in_the_folder_is_an_error(tmp_path: Path) -> None:
    model, other = tiny("olmoe", vocab_size=260), public(tmp_path / "public", "mixtral")
    with pytest.raises(ExportError, match="has no tensor model.layers.*experts"):
        on_disk(model, Checkpoint(other))
    with pytest.raises(ExportError, match=r"weight is \(260, 32\), the model's \(128, 32\)"):
        on_disk(tiny("mixtral"), Checkpoint(other))
