"""The commands that are killed: tiny, on text and models that are made here."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness import ROOT
from bench.small_mixtral import drawn

RECIPES = ROOT / "recipes"
TINY = ["model.n_layers=2", "model.d_model=32", "model.attention.n_heads=2", "train.tensorboard=false"]
MIXTURE = ["model.ffn.branches.0.widths.total=64", "model.ffn.branches.0.widths.n_experts=4"]
TRAINING = {
    "moestro.train.loop:backward": "in the passes of a step",
    "moestro.train.loop:finish_step": "in the optimizer and the rules",
    "moestro.train.loop:evaluate": "in an evaluation",
    "moestro.train.state:write_checkpoint": "in a save",
    "moestro.train.state:keep_checkpoints": "removing old checkpoints",
    "moestro.train.loop:first_state": "starting or resuming",
    "moestro.train.state:TrainState.restore": "starting or resuming",
}
PREPARING = {
    "moestro.data.tokenizers:BPETokenizer.fitted": "training the tokenizer",
    "moestro.data.dataset:write_shards": "writing token shards",
}
COMPARING = {
    "moestro.compare.job:Job.measure": "measuring a run",
    "moestro.compare.run:collect": "writing results",
    "moestro.compare.run:write_report": "writing the report",
    "moestro.compare.run:match": "solving sizes",
}
COMPRESSING = {
    "moestro.compress.running:_planned": "making the plan",
    "moestro.compress.calibration:save": "saving statistics",
    "moestro.compress.running:applied_to": "applying the plan",
    "moestro.compress.report:reported": "reporting",
    "moestro.compress.report:write_report": "reporting",
}
CONVERTING = {
    "moestro.convert.layers:convert_layer": "converting a layer",
    "moestro.convert.run:write_run": "writing the run",
    "moestro.convert.run:losses": "measuring",
}
EXPORTING = {
    "moestro.train.folder_job:FolderJob.write": "writing a file of weights",
    "moestro.export.own:OwnContents.companions": "writing everything else",
    "moestro.train.folder_job:FolderJob.publish": "giving the folder its name",
}


@dataclass(frozen=True)
class Victim:
    """A command whose last word but some is the folder `out` it fills; `share` of all kills are its own. Its caches are
    its own, too, where it is about them. `once`: with its folder there, it is over, and says so when started again."""

    name: str
    words: Callable[[Path], list[str]]
    share: float
    marks: Mapping[str, str] = field(default_factory=dict)
    own_cache: bool = False
    once: bool = False


def text_in(folder: Path, seed: int) -> Path:
    """Half a thousand documents of made-up words."""
    dice = random.Random(seed)
    words = ["".join(dice.choices("abcdefghijklmno", k=dice.randint(2, 8))) for _ in range(300)]
    lines = [" ".join(dice.choices(words, k=60)) for _ in range(500)]
    path = folder / "text.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def settings_of(text: Path, tokenizer: str = "{kind: bytes}") -> list[str]:
    """Data for a recipe."""
    return [
        f"data.source={{kind: text, paths: {text}, split: blank-line}}",
        *(f"data.tokenizer={tokenizer}", "data.seq_len=32", "data.val_fraction=0.1"),
        *("train.batch_size=4", "train.eval_tokens=512"),
    ]


COMPARISON = """
title: killed
reference: dense
arms:
  dense: {{recipe: {recipes}/dense.yaml, proportional: {{model.ffn.width: [2.5, 8]}}}}
  moe: {{recipe: {recipes}/moe.yaml, solve: model.ffn.branches.0.widths.total, multiple_of: 4}}
common:
  model.n_layers: 2
  train.tensorboard: false
  data.tokenizer: {{kind: bytes}}
  data.seq_len: 32
  data.source: {{kind: text, paths: {text}, split: blank-line}}
  train.batch_size: 2
budgets: [2e8]
sizes: {{tokens_per_parameter: [0.3], d_model_multiple_of: 8, proportional: {{model.attention.n_heads: [0.125, 1]}}}}
seeds: [0]
evaluations: 3
final_tokens: 512
"""


def victims(work: Path, made: Callable[[list[str]], None], seed: int) -> list[Victim]:
    """All of them; `made` runs a command that one of them needs to have been run."""
    text = text_in(work, seed)
    drawn(work / "mixtral", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}, seed)
    short = [*TINY, *settings_of(text), "train.budget={steps: 8}"]
    made(["train", f"{RECIPES}/hmoe.yaml", *short, *MIXTURE, "--out", f"{work}/hmoe"])
    made(["train", f"{RECIPES}/dense.yaml", *short, "model.ffn.width=48", "--out", f"{work}/dense"])
    (work / "comparison.yaml").write_text(COMPARISON.format(recipes=RECIPES, text=text), encoding="utf-8")
    return [*training_ones(work, text), *folder_ones(work, text)]


def training_ones(work: Path, text: Path) -> list[Victim]:
    """Those that train, or prepare for it."""
    steps = ["train.budget={steps: 60}", "train.save_every=4", "train.eval_every=12"]
    train = ["train", f"{RECIPES}/hmoe.yaml", *TINY, *MIXTURE, *settings_of(text), *steps, "--out"]
    prepare = ["prepare", f"{RECIPES}/hmoe.yaml", *settings_of(text, "{kind: bpe, vocab_size: 500}")]
    compare = ["compare", f"{work}/comparison.yaml", "--workers", "1", "--out"]
    return [
        Victim("train", lambda out: [*train, str(out)], 0.35, TRAINING),
        Victim("prepare", lambda out: prepare, 0.1, PREPARING, own_cache=True),
        Victim("compare", lambda out: [*compare, str(out)], 0.15, TRAINING | COMPARING),
    ]


def folder_ones(work: Path, text: Path) -> list[Victim]:
    """Those that make a folder of another."""
    less = ["--ratio", "0.25", "--method"]
    reap = ["reap", "--calib", str(text), "--calib-tokens", "16384", "--seq-len", "64"]
    convert = ["--recipe", f"{RECIPES}/convert/factorllm.yaml", "tokens=2048"]
    return [
        Victim(
            "compress a run (calibrated)",
            lambda out: ["compress", f"{work}/hmoe", str(out), *less, *reap],
            0.15,
            COMPRESSING,
        ),
        Victim(
            "compress a Mixtral folder",
            lambda out: ["compress", f"{work}/mixtral", str(out), *less, "width"],
            0.1,
            COMPRESSING | EXPORTING,
        ),
        Victim(
            "convert",
            lambda out: ["convert", f"{work}/dense", "--out", str(out), *convert],
            0.05,
            CONVERTING,
            once=True,
        ),
        Victim(
            "export",
            lambda out: ["export", f"{work}/hmoe", "--out", str(out), "--shard-size", "30KB"],
            0.1,
            EXPORTING,
        ),
    ]
