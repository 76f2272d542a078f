"""`moestro import`: a run folder of a public checkpoint, whole or not at all, its source untouched."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

import moestro
from moestro.cli import main
from moestro.data import load_tokenizer
from moestro.formats import FormatError
from moestro.hf import load
from moestro.recipe import importing
from moestro.recipe.build import build_model
from moestro.recipe.importing import import_model
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.train.folder import RunFolderError
from tests.hf.families import DENSE, MOE, tiny
from tests.hf.test_pretrained_recipe import write_tokenizer


def public(path: Path, family: str = "olmoe", **given) -> Path:
    tiny(family, vocab_size=260).save_pretrained(path, **given)
    write_tokenizer(path)
    (path / "LICENSE").write_text("free")
    (path / "modeling.py").write_text("raise SystemExit")
    return path


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize("family", [*MOE, *DENSE])
def test_a_run_comes_back_as_the_same_tensors(family, tmp_path):
    source = public(tmp_path / "public", family)
    before = contents(source)
    made = import_model(source, tmp_path / "run")
    assert contents(source) == before and made.model_type == family
    copied = tmp_path / "run" / "pretrained"
    assert {path.name for path in copied.iterdir()} == {name for name in before if name != "modeling.py"}
    assert all(path.read_bytes() == before[path.name][0] for path in copied.iterdir())
    model = build_model(load_recipe(made.recipe), 257)
    with model.stock() as stock:
        stock.save_pretrained(tmp_path / "again")
    want, have = load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert want.keys() == have.keys() and all(torch.equal(want[name], have[name]) for name in want)
    assert made.parameters == sum(tensor.numel() for tensor in want.values())


def test_the_command_makes_a_run_that_is_evaluated_inspected_moved_and_trained(tmp_path, text_file, capsys):
    source, run = public(tmp_path / "public"), tmp_path / "run"
    assert main(["import", str(source), "--out", str(run)]) == 0
    assert "olmoe" in capsys.readouterr().out
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    shutil.rmtree(source)
    text = ["--data", str(text_file), "--tokens", "256"]
    assert main(["eval", str(moved), *text, "--json", str(tmp_path / "eval.json")]) == 0
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["step"] == 0 and figures["checkpoint"] == "pretrained" and figures["bpb"] > 0
    assert main(["inspect", str(moved), *text, "--json", str(tmp_path / "inspect.json")]) == 0
    assert main(["inspect", str(moved), *text, "--generalization"]) == 2
    assert "its training has not begun, and the bound is about samples" in capsys.readouterr().err
    settings = [f"data.source={{kind: text, paths: {text_file}, split: blank-line}}", "data.seq_len=16"]
    settings += [f"data.tokenizer.path={moved / 'tokenizer'}", "train.budget={steps: 2}", "train.batch_size=2"]
    settings += ["train.eval_tokens=64", "train.tensorboard=false", "optim.lr=1e-2"]
    assert main(["train", str(moved / "recipe.yaml"), "--out", str(tmp_path / "trained"), *settings]) == 0
    assert main(["eval", str(tmp_path / "trained"), *text, "--json", str(tmp_path / "after.json")]) == 0
    after = json.loads((tmp_path / "after.json").read_text())
    assert after["step"] == 2 and after["loss"] != figures["loss"]


def test_an_interrupted_import_goes_on_and_copies_nothing_twice(tmp_path, monkeypatch):
    source, run = public(tmp_path / "public", max_shard_size="20KB"), tmp_path / "run"
    real, read = importing.file_pieces, []

    def stops(path, start, stop):
        read.append(path.name)
        if len(read) == 4:
            yield b"half"
            raise KeyboardInterrupt
        yield from real(path, start, stop)

    monkeypatch.setattr(importing, "file_pieces", stops)
    with pytest.raises(KeyboardInterrupt):
        import_model(source, run)
    assert not (run / "recipe.yaml").exists() and len(read) == 4
    there = {path.name for path in (run / "pretrained").iterdir() if not path.name.startswith(".")}
    assert there == set(read[:3])
    import_model(source, run)
    # what was whole is not read again, what was not is
    assert not set(read[4:]) & there and read[4] == read[3]
    assert {*read} == {*os.listdir(source)} - {"modeling.py"}
    assert all(path.read_bytes() == (source / path.name).read_bytes() for path in (run / "pretrained").iterdir())
    with pytest.raises(RunFolderError, match="holds a run already"):
        import_model(source, run)


def test_a_file_that_changes_while_it_is_copied_is_refused(tmp_path, monkeypatch):
    source, real = public(tmp_path / "public"), importing.file_pieces

    def changes(path, start, stop):
        yield from real(path, start, stop)
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(0, 0))

    monkeypatch.setattr(importing, "file_pieces", changes)
    with pytest.raises(FormatError, match="changed while it was copied"):
        import_model(source, tmp_path / "run")


def test_with_link_nothing_is_copied(tmp_path):
    source = public(tmp_path / "public")
    import_model(source, tmp_path / "run", link=True)
    assert not (tmp_path / "run" / "pretrained").exists()
    assert load_recipe(tmp_path / "run" / "recipe.yaml").model.folder == source


def test_what_cannot_be_imported_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    with pytest.raises(FormatError, match="nowhere is not a folder"):
        import_model(tmp_path / "nowhere", tmp_path / "run")
    bare = tmp_path / "bare"
    tiny("llama", vocab_size=260).save_pretrained(bare)
    with pytest.raises(FileNotFoundError, match=r"bare holds no tokenizer: none of tokenizer\.json"):
        import_model(bare, tmp_path / "run")
    source = public(tmp_path / "public")
    with pytest.raises(RunFolderError, match="which is only read"):
        import_model(source, source / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(RunFolderError, match="holds other files"):
        import_model(source, tmp_path / "full")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="its disk has 10 left"):
        import_model(source, tmp_path / "small")
    assert not (tmp_path / "run").exists() and not (tmp_path / "small" / "recipe.yaml").exists()
    # another folder's tokenizer will do, where the model knows all its tokens
    monkeypatch.undo()
    tiny("llama").save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model in .* 128"):
        import_model(tmp_path / "narrow", tmp_path / "run", tokenizer=source)
    assert not (tmp_path / "run").exists()
    import_model(bare, tmp_path / "run", tokenizer=source, link=True)


SAYINGS = [
    ("olmoe", {"hidden_size": 48}, r"is \[.*\], by config\.json \["),
    ("olmoe", {"num_attention_heads": 2}, r"self_attn.* by config\.json"),
    ("olmoe", {"vocab_size": 300}, r"\[260, 32\], by config\.json \[300, 32\]"),
    ("llama", {"num_hidden_layers": 3}, r"has no tensor model\.layers\.2\..*, of which config\.json speaks"),
    ("llama", {"num_hidden_layers": 1}, r"has more layers than config\.json says: model\.layers\.1\."),
    ("gpt2", {"n_layer": 1}, r"has more layers than config\.json says: transformer\.h\.1\."),
    ("olmoe", {"hidden_size": "wide"}, r"transformers cannot use it \(.*hidden_size"),
    ("olmoe", {"hidden_act": "zigzag"}, r"transformers cannot use it \(KeyError: 'zigzag'"),
]


@pytest.mark.parametrize(("family", "said", "message"), SAYINGS)
def test_a_configuration_of_another_model_is_found_before_anything_is_copied(family, said, message, tmp_path, capsys):
    source = public(tmp_path / "public", family)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **said}))
    assert main(["import", str(source), "--out", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    with pytest.raises(FormatError):
        load(source)


def test_windows_are_no_longer_than_a_table_of_positions(tmp_path):
    made = import_model(public(tmp_path / "public", "gpt2"), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"seq_len=65, but the model in .* has 64 positions \(.*data\.seq_len\)"):
        build_model(load_recipe(made.recipe, ["data.seq_len=65"]), 257)


def test_a_folder_that_changed_since_it_was_begun_is_another(tmp_path, monkeypatch):
    source = public(tmp_path / "public")
    monkeypatch.setattr(importing, "copy_files", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        import_model(source, tmp_path / "run")
    monkeypatch.undo()
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    with pytest.raises(RunFolderError, match="the import of another folder, or of this one before it changed"):
        import_model(source, tmp_path / "run")


def test_a_sentencepiece_model_becomes_our_tokenizer(tmp_path, text_file):
    source = tmp_path / "public"
    tiny("llama", vocab_size=400).save_pretrained(source)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text_file),
        model_prefix=str(source / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (source / "tokenizer.vocab").unlink()
    said = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps({**said, "legacy": False}))
    import_model(source, tmp_path / "run")
    ours = load_tokenizer(tmp_path / "run" / "tokenizer")
    text = "the quick  brown fox\n\tjumps — över 13 dogs"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    assert ours.encode(text) == theirs.encode(text) and ours.decode(ours.encode(text)) == text
    assert ours.eos == "</s>" and load(source).config.vocab_size >= ours.vocab_size


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(moestro, "hf")
    monkeypatch.setitem(sys.modules, "moestro.hf", None)
    with pytest.raises(ImportError, match=r'public checkpoints need transformers: pip install "moestro\[hf\]"'):
        import_model(tmp_path / "public", tmp_path / "run")
