"""Tiny comparisons on tiny text, for the tests of this folder."""

from pathlib import Path

RECIPE = """
model:
  d_model: 16
  n_layers: 2
  attention: {{n_heads: 2}}
  ffn: {ffn}
data:
  source: {{kind: text, paths: {text}}}
  tokenizer: {{kind: bytes}}
  seq_len: 16
  val_fraction: 0.5
optim: {{lr: 2e-3, schedule: {{kind: constant, warmup: 0}}}}
train: {{batch_size: 2, budget: {{steps: 3}}, tensorboard: false}}
"""
DENSE = "{kind: dense, width: 40}"
MOE = (
    "{kind: moe, router: {kind: scored, score: {kind: linear}, select: {kind: top_k, top_k: 2}}, "
    "branches: [{kind: ffn, widths: {kind: arithmetic, n_experts: 4, total: 32, multiple_of: 4}}]}"
)
COMPARISON = """
title: tiny
reference: dense
arms:
  dense: {recipe: dense.yaml, proportional: {model.ffn.width: [2.5, 8]}}
  moe: {recipe: moe.yaml, solve: model.ffn.branches.0.widths.total, multiple_of: 4}
budgets: [3e7]
sizes: {tokens_per_parameter: [0.04], d_model_multiple_of: 8, proportional: {model.attention.n_heads: [0.125, 1]}}
seeds: [0]
evaluations: 2
"""


def write_comparison(folder: Path, text: str = COMPARISON) -> Path:
    """A comparison of two arms with its recipes and its corpus; returns its path."""
    corpus = folder / "text"
    corpus.mkdir(exist_ok=True)
    for number in range(8):
        words = " ".join(f"word{(number * i) % 17}" for i in range(120))
        (corpus / f"{number}.txt").write_text(f"Document {number}\n{words}\n", encoding="utf-8")
    for name, ffn in (("dense", DENSE), ("moe", MOE)):
        (folder / f"{name}.yaml").write_text(RECIPE.format(ffn=ffn, text=corpus), encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path
