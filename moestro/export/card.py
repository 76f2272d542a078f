"""The model card: what a model is, what it learned from, how good it is, and how it is used."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro import __version__
from moestro.recipe.load import Recipe
from moestro.recipe.syntax import dump_yaml

USE_OWN = """```python
# with the package: `pip install "moestro[hf]"`
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

Without the package, `from_pretrained(FOLDER, trust_remote_code=True)` runs the code in this folder, which computes
every operation by its definition: the same numbers, more slowly.
"""
USE_STOCK = """`AutoModelForCausalLM.from_pretrained(FOLDER)`, and whatever else reads this architecture. Logits were
compared with the run's when this folder was written.
"""
USE_PRETRAINED = """`AutoModelForCausalLM.from_pretrained(FOLDER)`, and whatever else reads this architecture.
"""
# The card of the model that a run began with.
ORIGINAL_CARD = "README.original.md"


@dataclass(frozen=True)
class Facts:
    """What a card says besides the recipe: the run's name, its checkpoint's step and state, parameters, final figures
    where training is over, the licence of the weights where one was chosen, `layout` and dtype of the folder."""

    run: str
    step: int
    finished: bool
    n_parameters: int
    result: Mapping[str, Any]
    licence: str | None
    layout: str
    dtype: str
    causal: bool


@dataclass(frozen=True)
class Base:
    """The pretrained model that a run began with: its folder's name, its family, whether it was trained on, and the
    licence that its own card states."""

    name: str
    family: str
    trained: bool
    licence: str | None


def card(recipe: Recipe, facts: Facts, base: Base | None = None) -> str:
    """README.md of a folder, with the header that model hubs read."""
    paper = recipe.paper
    title = f"{facts.run}: {paper.title}" if paper.title else facts.run
    licence = facts.licence or (base.licence if base else None)
    known: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moestro", base.family if base else "mixture-of-experts"],
    }
    known |= {"license": licence} if licence else {}
    use = USE_OWN if facts.layout == "moestro" else USE_STOCK if base is None else USE_PRETRAINED
    sections = [
        f"# {title}",
        _origin(facts, base),
        _paper(recipe),
        f"## Use\n\n{use}" + ("" if facts.causal else _NOT_CAUSAL),
        f"## Figures\n\n{_figures(facts, base)}",
        f"## Data\n\n{_data(recipe, base)}",
        f"## Licence\n\n{_licence(facts, base)}",
        ""
        if base and not base.trained
        else f"## Recipe\n\n```yaml\n{dump_yaml(portable(recipe.resolved)).strip()}\n```",
    ]
    return f"---\n{dump_yaml(known)}---\n\n" + "\n\n".join(section.strip() for section in sections if section) + "\n"


def _origin(facts: Facts, base: Base | None) -> str:
    if base and not base.trained:
        return (
            f"{base.name}, a model of the family {base.family}, not trained further; written by moestro {__version__}."
        )
    end = "." if facts.finished else ", in the middle of training."
    begun = f" from the pretrained {base.name} ({base.family})" if base else ""
    return (
        f"A language model trained{begun} and exported by moestro {__version__}, checkpoint of step {facts.step:,}{end}"
    )


def _data(recipe: Recipe, base: Base | None) -> str:
    data = recipe.resolved["data"]
    before = f"What {base.name} learned from: {ORIGINAL_CARD}, where there is one." if base else ""
    if base and not base.trained:
        return before
    return (
        f"Source `{_words(data['source'])}`, tokenizer `{_words(data['tokenizer'])}`, sequences of "
        f"{data['seq_len']} tokens. Texts were encoded as they are, nothing put around them. {before}"
    )


_NOT_CAUSAL = """
Tokens of this model depend on later ones, and in a batch on each other where its experts choose: likelihoods and texts
are those of whole sequences, and nothing is cached.
"""


def portable(tree: Any) -> Any:
    """A recipe without the folders of one machine: of every absolute path the last name."""
    if isinstance(tree, Mapping):
        return {key: portable(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [portable(value) for value in tree]
    return Path(tree).name if isinstance(tree, str) and Path(tree).is_absolute() else tree


def _paper(recipe: Recipe) -> str:
    paper = recipe.paper
    if not paper.title:
        return ""
    where = f", [arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    differs = "".join(f"\n- {item}" for item in paper.differs)
    return f"System: *{paper.title}*{where}." + (f" What differs from the paper:\n{differs}" if differs else "")


def _figures(facts: Facts, base: Base | None) -> str:
    result = facts.result
    rows = {"parameters": f"{facts.n_parameters:,}", "stored as": facts.dtype}
    if "params_active" in result:
        rows["parameters a token uses"] = f"{result['params_active']:,.0f}"
    for key, name in {"tokens": "tokens trained on", "flops": "FLOPs of training"}.items():
        rows |= {name: f"{result[key]:,.4g}" if key == "flops" else f"{result[key]:,}"} if key in result else {}
    for key, name in {"bpb": "bits per byte, held out", "loss": "nats a token, held out"}.items():
        rows |= {name: f"{result['eval'][key]:.4f}"} if result.get("eval") else {}
    said = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    begun = base is None or base.trained
    lacks = "\nTraining was not over, so there are no final figures.\n" if begun and not result else ""
    return "| | |\n|---|---|\n" + said + lacks


def _words(part: Mapping[str, Any]) -> str:
    """A part of the recipe in one line."""
    said = {key: value for key, value in portable(part).items() if key != "kind" and value is not None}
    return ", ".join([str(part["kind"]), *(f"{key}={value}" for key, value in said.items())])


def _licence(facts: Facts, base: Base | None) -> str:
    weights = (
        f"Weights: {facts.licence}." if facts.licence else "Weights: whoever trained them has not chosen a licence yet."
    )
    if base:
        theirs = f"under {base.licence}, by its own card" if base.licence else "whose own licence holds for them"
        weights = f"{weights if facts.licence else ''} The weights come from {base.name}, {theirs}.".strip()
    code = "Code in this folder is part of moestro, under the Apache License, Version 2.0."
    return f"{weights} {code}" if facts.layout == "moestro" else weights
