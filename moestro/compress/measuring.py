"""What a folder's model does on held-out text, how fast, and in how much memory: each in a process of its own, so that
peaks are its own."""

import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.compress.applying import MODELING
from moestro.compress.methods import Request
from moestro.compress.source import RunSource, open_source
from moestro.compress.text import PERPLEXITY, held_out_of
from moestro.data import Batch
from moestro.evaluate.perplexity import perplexity
from moestro.train.environment import describe_machine

# Tokens of the prompt, and tokens generated one by one after it; rounds of which the median counts.
PROMPT, NEW, ROUNDS = 128, 16, 3


@dataclass(frozen=True)
class Question:
    """What is measured: `tokens` of held-out `text` in windows of `seq_len` that do not overlap, and speed on `device`.
    `text` may be None for runs, which have their own. `tasks` of lm-eval (`moestro.harness`), the first `limit` rows of
    each, are read from files in the folder `data`."""

    text: str | None
    tokens: int = 65_536
    seq_len: int = 512
    device: str = "cpu"
    tasks: tuple[str, ...] = ()
    data: Path | None = None
    limit: int | None = None


def measured(folder: Path, question: Question, tokenizer: Path | None = None) -> dict[str, Any]:
    """Loss and perplexity, prefill and decoding speed, peak memory of the model in a folder; JSON values. `tokenizer`
    is the folder whose tokenizer reads the text, the same one where None.

    Raises: what opening and reading raise, in that process.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, folder, question, tokenizer or folder).result()


def held_out(folder: Path, question: Question) -> list[Batch]:
    """The text's batches, by the folder's tokenizer.

    Raises: PlanError, ValueError where there are none.
    """
    request = Request(folder, PERPLEXITY, 0.0, text=question.text, tokens=question.tokens, seq_len=question.seq_len)
    return held_out_of(request)


def _measure(folder: Path, question: Question, tokenizer: Path) -> dict[str, Any]:
    batches = held_out(tokenizer, question)
    model, how = loaded_folder(folder, question.device)
    with torch.no_grad():
        found = {**loss_of(model, batches, question.device), **speed(model, batches[0].tokens, question.device)}
    if question.tasks:
        found["tasks"] = task_scores(model, tokenizer, question)
    cuda = torch.cuda.max_memory_allocated() if question.device.startswith("cuda") else None
    return {
        **found,
        "seq_len": batches[0].tokens.shape[1],
        "stride": batches[0].tokens.shape[1],
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": cuda,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "experts_implementation": getattr(model.config, "_experts_implementation", None),
        "machine": describe_machine(torch.device(question.device)),
        "load_check": how,
    }


def loaded_folder(folder: Path, device: str) -> tuple[Any, str]:
    """The model of a folder, and how it was loaded."""
    source = open_source(folder)
    if isinstance(source, RunSource):
        from moestro.export import open_model

        return open_model(folder, device).model, "a run of moestro"
    from moestro.hf import load

    if (folder / MODELING).is_file() or "quantization_config" in source.config:
        from moestro.hf.load import strictly

        trusted = (folder / MODELING).is_file()
        said = "with the folder's own code" if trusted else "quantised"
        return strictly(folder, device, trusted), f"transformers, {said}: no tensor missing, left over or mismatched"
    return load(folder, device=device), "plain transformers: no tensor missing, left over or mismatched"


def loss_of(model: Any, batches: Sequence[Batch], device: str) -> dict[str, Any]:
    """Mean nats a target token over windows, each read by itself, and what was counted."""
    nats, tokens, n_bytes = 0.0, 0, 0
    for batch in batches:
        logits = model(batch.tokens.to(device)).logits.float()
        targets = batch.targets.to(device)
        nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        tokens += int(batch.keep.sum())
        n_bytes += int(batch.n_bytes.sum())
    loss = nats / tokens
    bpb = nats / n_bytes / math.log(2)
    return {"loss": loss, "perplexity": perplexity(loss), "bpb": bpb, "tokens": tokens, "bytes": n_bytes}


def task_scores(model: Any, tokenizer: Path, question: Question) -> dict[str, Any]:
    """What `harness.evaluate_tasks` finds, the text read by the tokenizer of that folder.

    Raises: as that.
    """
    # which needs lm-eval
    from moestro.harness import ScoredModel, evaluate_tasks

    if (tokenizer / "recipe.yaml").is_file():
        from moestro.export.tokenizers import fast_tokenizer

        reader = fast_tokenizer(tokenizer / "tokenizer", RunSource(tokenizer).recipe.data.value("seq_len"))
    else:
        from moestro.hf.expertless import tokenizer_in

        reader = tokenizer_in(tokenizer)
    return evaluate_tasks(ScoredModel(model, reader), question.tasks, question.data or Path(), question.limit)


def speed(model: Any, tokens: Tensor, device: str) -> dict[str, float]:
    """Tokens a second of one sequence: its prompt at once, then one by one with a cache, no longer than a window where
    it has room for both. Medians."""
    prompt = tokens[:1, : max(1, min(PROMPT, tokens.shape[1] - NEW))].to(device)
    new = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False}
    prefill = _median(lambda: model(prompt), device)
    whole = _median(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **new), device)
    return {
        "prompt_tokens": prompt.shape[1],
        "prefill_tokens_per_s": prompt.shape[1] / prefill,
        "decode_tokens_per_s": NEW / max(whole - prefill, 1e-9),
    }


def _median(work: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    # the first round warms up
    return statistics.median(times[1:])
