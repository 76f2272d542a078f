"""Tiny commands of every kind that writes, and what they need."""

from pathlib import Path

from moestro.cli import main
from tests.conftest import ROOT

RECIPES = ROOT / "recipes"
SMALL = ["model.n_layers=1", "model.d_model=16", "model.attention.n_heads=2", "train.tensorboard=false"]
COMPARISON = """
title: tiny
reference: dense
arms:
  dense: {{recipe: {recipes}/dense.yaml, proportional: {{model.ffn.width: [2.5, 8]}}}}
common: {{model.n_layers: 1, train.tensorboard: false, train.batch_size: 2, data.seq_len: 16,
  data.tokenizer: {{kind: bytes}}, data.source: {{kind: text, paths: {text}, split: blank-line}}}}
budgets: [5e6]
sizes: {{tokens_per_parameter: [0.02], d_model_multiple_of: 8, proportional: {{model.attention.n_heads: [0.125, 1]}}}}
seeds: [0]
evaluations: 1
final_tokens: 64
"""


class Commands:
    """The words of each command, given the folder to fill; `work` holds what they read."""

    def __init__(self, work: Path) -> None:
        self.work = work
        text = work / "text.txt"
        text.write_text("\n\n".join(f"{n} and {n * n} are {'even' if n % 2 else 'odd'}" for n in range(900)))
        data = [f"data.source={{kind: text, paths: {text}, split: blank-line}}", "data.tokenizer={kind: bytes}"]
        self.data = [*data, "data.seq_len=16", "train.batch_size=2", "train.eval_tokens=64"]
        (work / "tiny.yaml").write_text(COMPARISON.format(recipes=RECIPES, text=text))
        widths = "model.ffn.branches.0.widths={kind: equal, n_experts: 4, total: 32}"
        for name, more in (("moe", [widths]), ("dense", ["model.ffn.width=32"])):
            words = [*SMALL, *self.data, *more, "train.budget={steps: 2}", "--out", str(work / name)]
            if main(["train", str(RECIPES / f"{name}.yaml"), *words]):
                raise RuntimeError(f"{name} was not trained")

    def __call__(self, verb: str, out: Path) -> list[str]:
        work, recipe = self.work, str(RECIPES / "dense.yaml")
        train = [*SMALL, *self.data, "model.ffn.width=32", "train.budget={steps: 4}", "train.save_every=1"]
        return {
            "train": ["train", recipe, *train, "--out", str(out)],
            "prepare": ["prepare", recipe, *self.data, f"data.cache_dir={out}"],
            "compare": ["compare", str(work / "tiny.yaml"), "--out", str(out), "--workers", "1"],
            "compress": ["compress", str(work / "moe"), str(out), "--method", "width", "--ratio", "0.25"],
            "convert": [
                *("convert", str(work / "dense"), "--out", str(out), "tokens=64"),
                *("--recipe", str(RECIPES / "convert" / "upcycle.yaml")),
            ],
            "export": ["export", str(work / "moe"), "--out", str(out)],
        }[verb]


VERBS = ("train", "prepare", "compare", "compress", "convert", "export")
