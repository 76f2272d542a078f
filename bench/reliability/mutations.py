"""Mutated recipes and command lines of every verb: none may end in a traceback, and every refusal must name the key,
show the value, and say what is allowed.

    python -m bench.reliability.mutations [--cases 1000] [--seed 0] [--verb train] [--show poor] [--json PATH]

Everything runs in this process through the command line's own `main`, on tiny models; training, a comparison's runs and
the server are stopped where they would begin. `--show` prints the cases of one result, as they may be run again.
"""

import argparse
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.reliability.cases import Case, Draw
from bench.reliability.command_cases import command_case
from bench.reliability.figures import Figure, report
from bench.reliability.recipe_cases import override_case, recipe_case
from bench.reliability.verdict import Verdict, judged
from bench.reliability.workspace import Workspace, made_workspace

WRONG = ("poor", "unnoticed", "traceback", "hang", "outside")
RESULTS = ("accepted", "refused", *WRONG)
# characters of a message that --show prints
SHOWN = 700


def cases(work: Workspace, n: int, seed: int, verbs: Sequence[str] = ()) -> Iterator[Case]:
    """`n` mutated command lines, verb after verb; half of those of verbs with a recipe mutate the recipe."""
    trees = {
        **dict.fromkeys(("train", "prepare", "plan"), work.recipes()),
        "compare": work.comparisons(),
        "convert": work.conversions(),
    }
    known = list(work.commands())
    chosen = [verb for verb in known if not verbs or verb in verbs]
    # recipes have the most to get wrong
    turns = [verb for verb in chosen for _ in range(6 if verb == "train" else 2 if verb in trees else 1)]
    file = work.folder / "recipe.yaml"
    for number in range(n):
        draw, verb = Draw(f"{seed} {number}"), turns[number % len(turns)]
        base = draw.choice(work.commands()[verb])
        how = draw.random() if verb in trees else 1.0
        if how < 0.6:
            yield recipe_case(draw, verb, base, draw.choice(trees[verb]), file)
        elif how < 0.8:
            yield override_case(draw, verb, base, draw.choice(trees[verb]), file)
        else:
            right = str(work.write_right(file, draw.choice(trees[verb]))) if verb in trees else ""
            yield command_case(draw, verb, tuple(right if word == "RECIPE" else word for word in base))


def run(n: int, seed: int, verbs: Sequence[str] = ()) -> list[Verdict]:
    """Judge `n` cases in a folder of their own."""
    before = dict(os.environ)
    # a mutated command may name a relative path: what it writes stays in the folder
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {
            "MOESTRO_CACHE": f"{name}/cache",
            "HF_HOME": f"{name}/hub",
            "TMPDIR": name,
            "HF_HUB_OFFLINE": "1",
        }
        here = Path.cwd()
        try:
            work = made_workspace(Path(name) / "work")
            work.restored()
            _emptied(work.folder / "made")
            verdicts = []
            for case in cases(work, n, seed, verbs):
                verdicts.append(judged(case, Path(name)))
                work.restored()
                _emptied(work.folder / "made")
            return verdicts
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)


def _emptied(folder: Path) -> None:
    """Make the folder, without anything in it, the one that relative paths start from."""
    os.chdir(folder.parent.parent)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)


def counted(verdicts: Sequence[Verdict], key: str) -> dict[str, Counter[str]]:
    """Results by verb or by kind of mutation."""
    found: dict[str, Counter[str]] = {}
    for each in verdicts:
        found.setdefault(getattr(each.case, key), Counter())[each.result] += 1
    return dict(sorted(found.items()))


def figures(verdicts: Sequence[Verdict]) -> list[Figure]:
    """What is wrong, of all cases and of each verb, none of which may be; what was accepted and refused."""
    made = []
    total = {"all verbs": Counter(each.result for each in verdicts)}
    for name, count in {**total, **counted(verdicts, "verb")}.items():
        wrong = sum(count[result] for result in WRONG)
        made.append(Figure(name, "mutated", sum(count.values()), "cases"))
        made.append(Figure(name, "still right: accepted", count["accepted"], "cases"))
        made.append(Figure(name, "refused with the key, the value and what is allowed", count["refused"], "cases"))
        made.append(Figure(name, ", ".join(WRONG), wrong, "cases", "0", not wrong))
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Exit code 1 where a case ended in one of `WRONG`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verb", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--show", action="append", default=[], choices=RESULTS, help="print these cases")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    verdicts = run(options.cases, options.seed, options.verb)
    for each in verdicts:
        if each.result in options.show:
            print(f"{each.result}: {each.case.kind}: moestro {each.case.verb} {' '.join(each.case.words)[:400]!r}")
            print(
                f"    {each.why} | names {each.case.names[:3]} values {each.case.values[:2]}\n    {each.said[-SHOWN:]}"
            )
    for key in ("verb", "kind"):
        for name, count in counted(verdicts, key).items():
            print(f"{name:<28}", *(f"{result} {count[result]:>4}" for result in RESULTS))
    report("bench/reliability/mutations.py", figures(verdicts), options)


if __name__ == "__main__":
    main()
