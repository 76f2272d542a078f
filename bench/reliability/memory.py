"""Peak memory of every verb beside what is stated for it, each in a process of its own.

    python -m bench.reliability.memory [--json PATH] [VERB ...]

What is stated, part by part: bench/reliability/memory_model.py. What imports take is measured, by a process that
imports the same modules and does nothing. Wanted is a peak (VmHWM: resident, files that are mapped included; of a verb
with workers the largest process') that is at most what is stated.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.harness import ROOT
from bench.reliability.figures import Figure, report
from bench.reliability.leaks import address, ask
from bench.reliability.memory_model import MIB, STATED, Sizes, stated
from bench.reliability.victims import COMPARISON, RECIPES
from bench.reliability.workspace import STOCK, Workspace, made_workspace
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.train.estimate import MemoryEstimate, estimate_memory

# Weights, activations and text that are large beside what else a process holds.
WIDE = ["model.n_layers=8", "model.d_model=1024", "model.attention.n_heads=4", "train.budget={steps: 2}"]
WIDER = {"hidden_size": 256, "intermediate_size": 4096, "num_local_experts": 8}
LONG = ["data.seq_len=64", "train.batch_size=4", "data.val_fraction=0.1"]
OFFLOADED, FAST = ("--memory", "32MiB"), 32 * MIB
DOCUMENT = 8_000_000
TOKENIZER = "data.tokenizer={kind: bpe, vocab_size: 300, train_bytes: 20000}"
# A million parameters and more that meet so little text that the runs are over in a moment.
COMPARED = {"2e8": "2e11", "[0.3]": "[0.001]"}
REQUESTS = 10

# Does what the words after the first say, and writes its peak and, in order, what it imported into the first.
DOING = """
import json, resource, sys
from pathlib import Path
from moestro.cli import main
code = 1
try:
    code = main(sys.argv[2:])
finally:
    status = Path('/proc/self/status').read_text()
    own = int(status.partition('VmHWM:')[2].split()[0])
    peak = 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    Path(sys.argv[1]).write_text(json.dumps({'peak': peak, 'modules': list(sys.modules)}))
sys.exit(code)
"""
# Imports what another process did, and writes its own peak in the same place.
IMPORTING = """
import importlib, json, sys
from pathlib import Path
for name in json.loads(Path(sys.argv[1]).read_text())['modules']:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # made by a module, not imported from a file
status = Path('/proc/self/status').read_text()
Path(sys.argv[1]).write_text(json.dumps({'peak': 1024 * int(status.partition('VmHWM:')[2].split()[0])}))
"""


class Case(NamedTuple):
    """A command, and the bytes of what it is about, or the folder of its runs where they say it."""

    verb: str
    words: list[str]
    sizes: Sizes = Sizes()
    made: Path | None = None


def weights_in(folder: Path) -> int:
    """Bytes of a folder's weights, which are float32 here."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if "optim" not in path.name)


def estimated(recipe: Path, settings: list[str], vocab_size: int = 257) -> MemoryEstimate:
    """What training a recipe is estimated to take."""
    loaded = load_recipe(recipe, settings)
    model = build_model(loaded, vocab_size, "meta")
    return estimate_memory(model, vocab_size, loaded.data.value("seq_len"), build_training(loaded)[0])


def long_text(folder: Path) -> Path:
    """Short documents, and one of DOCUMENT bytes."""
    text = folder / "long.txt"
    line = "seven wise owls watch from an old oak tree\n"
    short = "\n".join(f"paragraph {number} of a small corpus\n" for number in range(2_000))
    text.write_text(f"{short}\n{line * (DOCUMENT // len(line))}", encoding="utf-8")
    return text


def cases(work: Workspace) -> Iterator[Case]:
    """A command of every verb, on runs and a folder of Mixtral's format."""
    run, hmoe, out = work.folder / "hmoe", RECIPES / "hmoe.yaml", str(work.folder / "made")
    train = [*work.quick, *WIDE, *LONG]
    text = f"data.source={{kind: text, paths: {long_text(work.folder)}, split: blank-line}}"
    yield Case("prepare", [str(hmoe), text, TOKENIZER, f"data.cache_dir={out}/cache"], Sizes(document=DOCUMENT))
    yield Case("plan", [str(hmoe), *train])
    training = Sizes(training=estimated(hmoe, train))
    yield Case("train", [str(hmoe), *train, "--out", f"{out}/run"], training)
    comparison = work.folder / "comparison.yaml"
    comparison.write_text(compared(work.folder / "text.txt"), encoding="utf-8")
    words = [str(comparison), "--workers", "1", "--out", f"{out}/compared"]
    yield Case("compare", words, made=Path(out) / "compared")
    yield from cases_of_runs(work, Sizes(weights_in(run), training=estimated(run / "recipe.yaml", [])))
    yield from cases_of_folders(work)


def compared(text: Path) -> str:
    """A comparison whose models are large beside the text that they meet."""
    recipe = COMPARISON.format(recipes=RECIPES, text=text)
    for old, new in COMPARED.items():
        recipe = recipe.replace(old, new)
    return recipe


def cases_of_runs(work: Workspace, sizes: Sizes) -> Iterator[Case]:
    """Of those that read a run."""
    run, out = str(work.folder / "hmoe"), str(work.folder / "made")
    tree = load_recipe(work.folder / "hmoe" / "recipe.yaml", []).resolved
    cache = tree["model"]["n_layers"] * 2 * 4 * tree["model"]["d_model"] * tree["data"]["seq_len"]
    held = Sizes(sizes.weights, cache=cache)
    yield Case("eval", [run, "--tokens", "256"], sizes)
    yield Case("inspect", [run, "--tokens", "256", "--out", f"{out}/page.html"], sizes)
    yield Case("generate", [run, "--prompt", "the fox", "--max-new-tokens", "4"], held)
    yield Case("serve", [run, "--port", "0", "--name", "hmoe"], held)
    yield Case("export", [run, "--out", f"{out}/exported"], Sizes(sizes.weights))
    dense = work.folder / "dense"
    convert = [str(dense), "--recipe", str(RECIPES / "convert" / "factorllm.yaml"), "tokens=64"]
    yield Case("convert", [*convert, "--out", f"{out}/converted"], Sizes(weights_in(dense)))


def cases_of_folders(work: Workspace) -> Iterator[Case]:
    """Of those that read a folder of a public format."""
    stock, out, text = str(work.folder / "stock"), str(work.folder / "made"), str(work.folder / "text.txt")
    sizes = Sizes(weights_in(work.folder / "stock"))
    yield Case("import", [stock, "--out", f"{out}/imported"], sizes)
    less = ["--method", "reap", "--ratio", "0.25", "--calib", text, "--calib-tokens", "256", "--seq-len", "16"]
    yield Case("compress", [stock, f"{out}/compressed", *less], sizes)
    yield Case("offload", [stock, *OFFLOADED, "--prompt", "a", "--tokens", "2"], Sizes(memory=FAST))


def peak(code: str, facts: Path, words: list[str]) -> int:
    """Peak resident bytes of a process that runs `code` with the file of its facts and these words.

    Raises: RuntimeError where it fails.
    """
    command = [sys.executable, "-c", code, str(facts), *words]
    with (
        facts.with_suffix(".said").open("w+") as said,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        if words[:1] == ["serve"]:
            _ask_and_stop(process)
        process.communicate()
        said.seek(0)
        if process.returncode and words[:1] != ["serve"]:
            raise RuntimeError(f"moestro {' '.join(words)}: {said.read()}")
    return json.loads(facts.read_text())["peak"]


def _ask_and_stop(process: subprocess.Popen[str]) -> None:
    """Ask a server some times, and interrupt it.

    Raises: RuntimeError where there is none.
    """
    try:
        url = address(process)
        for number in range(REQUESTS):
            ask(url, number)
    finally:
        process.send_signal(signal.SIGINT)


def measured(case: Case, folder: Path) -> Iterator[Figure]:
    """What a verb takes, what its imports alone do, and what is stated."""
    facts = folder / f"{case.verb}.json"
    found = peak(DOING, facts, [case.verb, *case.words])
    imports = peak(IMPORTING, facts, [])
    sizes = case.sizes
    if case.made is not None:
        runs = [estimated(path, []) for path in case.made.rglob("recipe.yaml")]
        largest = max(runs, key=lambda estimate: estimate.tensors)
        sizes = Sizes(int(largest.parameters), training=largest)
    most, said = stated(case.verb, imports, sizes)
    yield Figure(case.verb, "peak", round(found / MIB, 1), "MiB", said, found <= most)
    yield Figure(case.verb, "peak, of what is stated", round(found / most, 2))


def main(words: list[str] | None = None) -> None:
    """Measure all of them, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verbs", nargs="*", metavar="VERB", help=f"of {', '.join(STATED)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(words)
    if unknown := set(options.verbs) - set(STATED):
        parser.error(f"{', '.join(sorted(unknown))}: no verb with a stated memory; allowed: {', '.join(STATED)}")
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"MOESTRO_CACHE": f"{name}/cache", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
        work = made_workspace(Path(name) / "work", [*WIDE, *LONG], {**STOCK, **WIDER}, OFFLOADED)
        wanted = [case for case in cases(work) if case.verb in (options.verbs or STATED)]
        figures = [figure for case in wanted for figure in measured(case, Path(name))]
    report("bench/reliability/memory.py", figures, options)


if __name__ == "__main__":
    main()
