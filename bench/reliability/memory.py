"""Peak memory of verbs beside what is stated for them, on a tiny and a medium model, each in a process of its own.

    python -m bench.reliability.memory [--json PATH]

Stated: of `train` what `moestro.train.estimate` says, by which recipes are refused; of verbs that read a model
LIBRARIES, COPIES times its float32 weights, and the logits of what they evaluate at once; of `prepare` and `import`,
which stream, LIBRARIES and STREAM whatever there is to read. Wanted is a peak that is at most what is stated.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.harness import ROOT
from bench.reliability.figures import Figure, report
from bench.reliability.workspace import RECIPES, Workspace, made_workspace
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.train.estimate import estimate_memory

MIB = 2**20
# interpreter, torch and, where a verb needs it, transformers; text and tokens in hand while a corpus is read
LIBRARIES, WITH_TRANSFORMERS, STREAM = 500 * MIB, 900 * MIB, 250 * MIB
# float32 weights at once: as read and in the model; export and conversion hold a second model
COPIES = {"eval": 2, "inspect": 2, "generate": 2, "export": 3, "convert": 3}
VOCABULARY, BATCH, LENGTH = 257, 8, 64
SIZES = {"tiny": (32, 2, 64), "medium": (512, 8, 4096)}


class Case(NamedTuple):
    """A command and the bytes that it may take at most."""

    name: str
    words: list[str]
    stated: float


def cases(work: Workspace, size: str) -> Iterator[Case]:
    """Every verb on a run of one size, which the first of them trains."""
    d_model, layers, width = SIZES[size]
    settings = [
        *work.quick, f"model.d_model={d_model}", f"model.n_layers={layers}", "model.attention.n_heads=4",
        f"model.ffn.width={width}", f"train.batch_size={BATCH}", f"data.seq_len={LENGTH}", "train.budget={steps: 3}",
    ]  # fmt: skip
    recipe = load_recipe(RECIPES / "dense.yaml", settings)
    model = build_model(recipe, VOCABULARY, device="meta")
    weights = 4.0 * sum(parameter.numel() for parameter in model.parameters())
    logits = 4.0 * 4 * BATCH * LENGTH * VOCABULARY
    run, out = str(work.folder / size), str(work.folder / f"{size}-out")
    training = estimate_memory(model, VOCABULARY, LENGTH, build_training(recipe)[0]).total
    yield Case(f"train, {size}", ["train", str(RECIPES / "dense.yaml"), *settings, "--out", run], training)
    verbs = {
        "eval": [run], "inspect": [run, "--out", f"{out}.html"],
        "generate": [run, "--prompt", "a", "--max-new-tokens", "8"],
        "export": [run, "--out", out],
        "convert": [run, "--out", f"{out}-moe", "method={kind: upcycle, n_experts: 1, top_k: 1}", "tokens=64"],
    }  # fmt: skip
    for verb, words in verbs.items():
        libraries = WITH_TRANSFORMERS if verb in ("generate", "export") else LIBRARIES
        yield Case(f"{verb}, {size}", [verb, *words], libraries + COPIES[verb] * weights + logits)


def streams(work: Workspace) -> Iterator[Case]:
    """Verbs that read what may be larger than memory."""
    large = work.folder / "large.txt"
    with large.open("w") as file:
        for number in range(100_000):
            file.write(f"paragraph {number} of a corpus that is larger than what is held of it. " * 50 + "\n\n")
    words = [*work.quick, f"data.source.paths={large}", "data.tokenizer={kind: bytes}"]
    for name, paths in (("80 KB", []), (f"{large.stat().st_size / 1e6:.0f} MB", words[-2:])):
        made = ["prepare", str(RECIPES / "dense.yaml"), *work.quick, *paths]
        yield Case(f"prepare, {name} of text", made, LIBRARIES + STREAM)
    stock, out = str(work.folder / "stock"), str(work.folder / "imported")
    yield Case("import", ["import", stock, "--out", out], WITH_TRANSFORMERS + STREAM)


def peak(words: list[str]) -> int:
    """Peak resident bytes of `moestro` with these words.

    Raises: RuntimeError where it fails.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "moestro", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said = process.stderr.read() if process.stderr else ""
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"moestro {' '.join(words)}: {said}")
    return 1024 * used.ru_maxrss


def main() -> None:
    """Measure all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"MOESTRO_CACHE": f"{name}/cache", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
        work = made_workspace(Path(name) / "work")
        for case in [*streams(work), *(each for size in SIZES for each in cases(work, size))]:
            found = peak(case.words) / MIB
            stated = case.stated / MIB
            figures.append(Figure(case.name, "peak memory", found, "MiB", f"at most {stated:,.0f}", found <= stated))
    report("bench/reliability/memory.py", figures, options)


if __name__ == "__main__":
    main()
