"""One pass of text through a model: what its experts did with it, collected layer by layer."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moestro.compress.observed import Observed
from moestro.compress.plan import Calibration
from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.formats.writer import write_tensors
from moestro.layers.moe import MoELayer
from moestro.routers import ProductKeyRouter
from moestro.routing import Trace
from moestro.train.durable import publish_folder

# Tokens below which what is said of an expert is said of too little.
SPARSE = 100


@dataclass(frozen=True)
class Ask:
    """What to collect. `sample` tokens, the same in every layer and drawn by `seed`, are kept as they enter the layers:
    damage and similarity are measured on them. `everywhere` runs all experts on all tokens, for the mean outputs that
    clustering compares; `moments` sums x x' of the inputs of every expert's matrices, 8 (d^2 + w^2) bytes an expert."""

    sample: int = 1024
    everywhere: bool = False
    moments: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sample < 0:
            raise ValueError(f"sample={self.sample} tokens, allowed: 0 or more")


@dataclass
class Collected:
    """What was collected: `layers` by the name of the mixture layer; SHA-256 of the routers' weights, by which the
    model is known again; the text's batches, tokens and hash."""

    ask: Ask
    layers: dict[str, Observed]
    routers: str = ""
    batches: int = 0
    tokens: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def source(self, text: str) -> Calibration:
        """The text as plans name it: SHA-256 of the token ids (int64, batch by batch), their number, words.

        Raises: ValueError where no token was read.
        """
        return Calibration(self.digest.hexdigest(), self.tokens, text)

    def warnings(self, least: int = SPARSE) -> list[str]:
        """A line for every layer with experts that fewer than `least` tokens met."""
        lines = []
        for name, seen in self.layers.items():
            few = seen.unseen(least)
            if few:
                rows = ", ".join(f"{expert} ({int(seen.rows[expert])})" for expert in few)
                lines.append(f"{name}: {len(few)} of {seen.n_experts} experts met fewer than {least} tokens: {rows}")
        return lines


def calibrate(
    model: nn.Module, batches: Iterable[Batch], ask: Ask, keep: Path | None = None, save_every: int = 16
) -> Collected:
    """Everything asked for, of every mixture layer of a decoder, over all batches. The model is not changed.

    With `keep`, a folder, the state is written there every `save_every` batches and at the end; started again with the
    same model, text and questions, it continues behind the last batch written, with the same result to the bit.

    Raises: ValueError where the model has no mixture layers, one has product keys or routes parts of tokens or mixtures
    of them, the batches are none, or `keep` holds the state of another text, model or question."""
    layers: dict[str, MoELayer] = model.moe_layers()  # type: ignore[operator]
    if not layers:
        raise ValueError("the model has no mixture layers to calibrate")
    if keys := [name for name, layer in layers.items() if isinstance(layer.router, ProductKeyRouter)]:
        raise ValueError(f"{keys[0]} has experts by product keys, which no text ranks; allowed: method width")
    seen_by = {name: Observed(layer.router.n_experts) for name, layer in layers.items()}
    collected = Collected(ask, seen_by, routers_of(layers))
    done = restore(collected, keep) if keep is not None else None
    seen = 0
    with evaluating(model):
        for number, batch in enumerate(batches):
            seen += 1
            collected.digest.update(batch.tokens[batch.keep].to(torch.int64).cpu().numpy().tobytes())
            if done is not None and number < done["batches"]:
                if seen == done["batches"] and collected.digest.hexdigest() != done["sha256"]:
                    raise ValueError(f"{keep} holds statistics of another text: remove it to start anew")
                continue
            _add(collected, layers, score(model, batch, "fp32")[0].traces, number)
            if keep is not None and collected.batches % save_every == 0:
                save(collected, keep)
    if seen < max(1, collected.batches):
        raise ValueError(f"the text has {seen} batches, allowed: at least 1, and the {collected.batches} of {keep}")
    if keep is not None:
        save(collected, keep)
    return collected


def sampled_inputs(model: nn.Module, batches: Iterable[Batch], name: str, ask: Ask) -> Tensor:
    """The inputs [n d] of one mixture layer, of the tokens that `calibrate` samples, in the model as it is now: with
    experts of earlier layers left out, those that these leave.

    Raises: ValueError where no tokens are asked for.
    """
    layer: MoELayer = model.moe_layers()[name]  # type: ignore[operator]
    seen = Observed(layer.router.n_experts)
    with evaluating(model):
        for number, batch in enumerate(batches):
            (x,) = (t.x for t in score(model, batch, "fp32")[0].traces if t.layer is layer)
            seen.sample(x, ask.sample, ask.seed, number)
    if seen.inputs is None or not len(seen.inputs):
        raise ValueError(f"{name}: no tokens were sampled (sample={ask.sample})")
    return seen.inputs


def _add(collected: Collected, layers: dict[str, MoELayer], traces: tuple[Trace, ...], number: int) -> None:
    """One batch's traces."""
    ask, names = collected.ask, {id(layer): name for name, layer in layers.items()}
    n_tokens = {len(trace.x) for trace in traces}
    if len(n_tokens) != 1 or len(traces) != len(layers) or any(trace.origin is not None for trace in traces):
        raise ValueError("a layer does not route the model's tokens one by one: experts have none of their own")
    for trace in traces:
        seen, layer = collected.layers[names[id(trace.layer)]], layers[names[id(trace.layer)]]
        seen.observe(layer, trace.x, trace.routing, ask.everywhere)
        if ask.moments:
            seen.observe_moments(layer, trace.x, trace.routing)
        if ask.sample:
            seen.sample(trace.x, ask.sample, ask.seed, number)
    collected.batches += 1
    collected.tokens += n_tokens.pop()


def save(collected: Collected, folder: Path) -> None:
    """The state into a folder, in place of the one there, in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tensors = {f"{name}:{key}": value for name, seen in collected.layers.items() for key, value in seen.state().items()}
    write_tensors(temporary / "sums.safetensors", {key: value.contiguous() for key, value in tensors.items()})
    facts = {"ask": vars(collected.ask), "batches": collected.batches, "tokens": collected.tokens}
    facts |= {"sha256": collected.digest.hexdigest(), "routers": collected.routers}
    (temporary / "facts.json").write_text(json.dumps(facts))
    publish_folder(temporary, folder)


def restore(collected: Collected, folder: Path) -> dict[str, Any] | None:
    """Put the state of a folder into `collected`; what it says of the text, None where there is no folder."""
    if not (folder / "facts.json").exists():
        return None
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    if facts["ask"] != vars(collected.ask) or facts["routers"] != collected.routers:
        raise ValueError(f"{folder} holds statistics of another model, or other ones: remove it to start anew")
    state: dict[str, dict[str, Tensor]] = {name: {} for name in collected.layers}
    for key, value in load_file(folder / "sums.safetensors").items():
        name, what = key.rsplit(":", 1)
        state[name][what] = value
    for name, values in state.items():
        collected.layers[name].load_state(values)
    collected.batches, collected.tokens = facts["batches"], facts["tokens"]
    return facts


def routers_of(layers: dict[str, MoELayer]) -> str:
    """SHA-256 of names, parameters and buffers of the layers' routers."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        for key, value in layer.router.state_dict().items():
            digest.update(f"{name}.{key}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
