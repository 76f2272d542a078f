"""What mutated command lines start from: small folders of everything that verbs read, and commands that work."""

import contextlib
import io
import itertools
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import ROOT
from moestro.cli import VERBS, main
from moestro.recipe.load import load_recipe
from moestro.recipe.resolve import read_tree
from moestro.recipe.syntax import dump_yaml

RECIPES = ROOT / "recipes"
WORDS = "the quick brown fox jumps over lazy dogs while seven wise owls watch from an old oak tree".split()
STOCK = {
    **{"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256},
    **{"num_local_experts": 4, "num_experts_per_tok": 2},
}
MEMORY = ("--memory", "64KiB")
SMALL = ["model.n_layers=2", "model.d_model=16", "model.attention.n_heads=2", "train.budget={steps: 1}"]


@dataclass(frozen=True)
class Workspace:
    """A folder with text, runs of a dense model and of HMoE, a folder of Mixtral's format, and room for output."""

    folder: Path

    @property
    def data(self) -> dict[str, Any]:
        """A `data` section that is quick to read."""
        source = {"kind": "text", "paths": str(self.folder / "text.txt"), "split": "blank-line"}
        return {"source": source, "tokenizer": {"kind": "bytes"}, "seq_len": 16, "val_fraction": 0.1}

    @property
    def quick(self) -> list[str]:
        """Words that make training quick."""
        words = [
            f"data={json.dumps(self.data)}",
            "train.batch_size=2",
            "train.eval_tokens=64",
            "train.tensorboard=false",
        ]
        return [*words, "train.eval_every=0", "train.save_every=0"]

    def recipes(self) -> list[dict]:
        """The trees of all small recipes, on this text."""
        found = []
        for path in sorted(RECIPES.glob("*.yaml")):
            tree = load_recipe(path, self.quick).tree
            if "adapt" in tree:
                tree["adapt"]["start"] = str(self.folder / "dense")
            found.append(tree)
        return found

    def comparisons(self) -> list[dict]:
        """The trees of the comparisons, on this text."""
        found = []
        for path in sorted((RECIPES / "compare").glob("*.yaml")):
            tree, _ = read_tree(path)
            for arm in tree["arms"].values():
                arm["recipe"] = str((path.parent / arm["recipe"]).resolve())
            tree["common"] = {**tree.get("common", {}), **{f"data.{name}": value for name, value in self.data.items()}}
            tree["sizes"]["tokens_per_parameter"] = [1.0]
            found.append(tree | {"budgets": [1e10]})
        return found

    def conversions(self) -> list[dict]:
        """The trees of the conversions."""
        trees = [read_tree(path)[0] for path in sorted((RECIPES / "convert").glob("*.yaml"))]
        return [tree | {"tokens": 64} for tree in trees]

    def restored(self) -> None:
        """Put everything back that a command was told to overwrite."""
        kept = self.folder.with_name("kept")
        if not kept.exists():
            shutil.copytree(self.folder, kept)
        elif _state(self.folder) != _state(kept):
            shutil.rmtree(self.folder)
            shutil.copytree(kept, self.folder)

    def write_right(self, file: Path, tree: dict) -> Path:
        """Write a recipe that is right."""
        file.write_text(dump_yaml(tree), encoding="utf-8")
        return file

    def commands(self) -> dict[str, list[tuple[str, ...]]]:
        """Command lines that work, by verb; RECIPE stands for a recipe. What they write is called `next-N`."""
        run, stock, text = (str(self.folder / name) for name in ("hmoe", "stock", "text.txt"))
        out, trace = str(self.folder / "made" / f"next-{next(COUNTER)}"), str(self.folder / "trace.jsonl")
        plan = (stock, out, "--method", "reap", "--ratio", "0.25", "--calib", text, "--calib-tokens", "64")
        found = {
            "train": [("RECIPE", "--out", out)],
            "plan": [("RECIPE",)],
            "completion": [("bash",)],
            "prepare": [("RECIPE",)],
            "compare": [("RECIPE", "--out", out)],
            "convert": [(str(self.folder / "dense"), "--out", out, "--recipe", "RECIPE")],
            "eval": [(run, "--tokens", "64"), (run, "--data", text, "--tokens", "64", "--json", "-")],
            "inspect": [(run, "--tokens", "64", "--out", f"{out}.html"), (run, "--tokens", "64", "--probe")],
            "generate": [(run, "--prompt", "the fox", "--max-new-tokens", "2"), (stock, "--prompt", "a", "--seed", "1",
                         "--temperature", "1", "--max-new-tokens", "2")],
            "serve": [(run, "--port", "0"), (stock, "--port", "0", "--name", "a")],
            "export": [(run, "--out", out), (run, "--out", out, "--format", "moestro", "--shard-size", "1MB")],
            "import": [(stock, "--out", out), (stock, "--out", out, "--link")],
            "compress": [(*plan, "--seq-len", "16"), (stock, out, "--method", "width", "--ratio", "0.5")],
            "offload": [(stock, *MEMORY, "--prompt", "a", "--tokens", "2"), ("replay", trace, *MEMORY)],
        }  # fmt: skip
        return {verb: lines for verb, lines in found.items() if verb in VERBS}


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of the files that commands read."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / "recipe.yaml")
    files = (path for path in files if path.relative_to(folder).parts[0] != "made")
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


COUNTER = itertools.count()


def made_workspace(
    folder: Path, small: Sequence[str] = SMALL, stock: Mapping[str, int] = STOCK, memory: Sequence[str] = MEMORY
) -> Workspace:
    """Fill an empty folder; of what sizes its runs and its public folder are, and with which memory that is traced."""
    work = Workspace(folder)
    (folder / "made").mkdir(parents=True)
    draw = random.Random(0)
    (folder / "text.txt").write_text("\n\n".join(" ".join(draw.choices(WORDS, k=20)) for _ in range(200)))
    for name in ("dense", "hmoe"):
        _said("train", str(RECIPES / f"{name}.yaml"), *work.quick, *small, "--out", str(folder / name))
    _write_stock(folder / "stock", stock)
    words = (*memory, "--prompt", "a", "--tokens", "2", "--trace", str(folder / "trace.jsonl"))
    _said("offload", str(folder / "stock"), *words)
    return work


def _said(*words: str) -> None:
    """Raises: RuntimeError where a command that must work does not."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    if code:
        raise RuntimeError(f"moestro {' '.join(words)}: {said.getvalue()}")


def _write_stock(folder: Path, sizes: Mapping[str, int]) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from moestro.data import ByteTokenizer

    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(folder)
    ByteTokenizer().save(folder)
