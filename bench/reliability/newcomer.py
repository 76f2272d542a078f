"""How long a newcomer waits: from a clone to the first report, and to the first run of a recipe of their own.

    python -m bench.reliability.newcomer [--source REPOSITORY] [--json PATH]

Clones the repository into an empty folder, with caches of its own (pip's, moestro's) and no environment, then does what
the README and docs/tour.md say: `make demo`, and a recipe written by hand over text files. Seconds depend on the
network and on what else the machine does.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.harness import ROOT
from bench.reliability.figures import Figure, report

# Of docs/tour.md: what writes the text, and the recipe.
TEXT, RECIPE = (
    re.compile(r"```python\n(.*?)```", re.DOTALL),
    re.compile(r'```yaml title="mine.yaml"\n(.*?)```', re.DOTALL),
)
Step = tuple[str, Callable[[Path], None]]


class Newcomer:
    """Someone with a clone and nothing else: `folder` is empty before."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.folder, self.clone = source, folder, folder / "moestro"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
            "MOESTRO_CACHE": str(folder / "cache"),
            "PIP_NO_CACHE_DIR": "1",
        }

    def steps(self) -> Iterator[Step]:
        """What they do, in order."""
        yield "clone", lambda _: self.do("git", "clone", "-q", self.source, str(self.clone), where=self.folder)
        yield "make setup", lambda clone: self.do("make", "setup")
        yield "make demo", lambda clone: self.do("make", "demo")
        yield "own recipe", lambda clone: self.own_recipe()

    def own_recipe(self) -> None:
        """The tour's text and recipe, trained."""
        text, recipe = tour(self.clone / "docs" / "tour.md")
        (self.clone / "mine.yaml").write_text(recipe, encoding="utf-8")
        self.do(".venv/bin/python", "-c", text)
        self.do(".venv/bin/moestro", "train", "mine.yaml", "--out", "runs/mine")

    def do(self, *words: str, where: Path | None = None) -> None:
        """Run a command in the clone; its output goes to standard error, ours to standard output.

        Raises: CalledProcessError where it fails.
        """
        subprocess.run(words, cwd=where or self.clone, env=self.environment, stdout=sys.stderr, check=True)


def tour(page: Path) -> tuple[str, str]:
    """(Python that writes text files, a recipe over them) of the tour.

    Raises: ValueError where it has none such.
    """
    content = page.read_text(encoding="utf-8")
    text, recipe = TEXT.search(content), RECIPE.search(content)
    if text is None or recipe is None:
        raise ValueError(f"{page} has no block that writes text, or no recipe")
    return text[1], recipe[1]


def timed(newcomer: Newcomer) -> dict[str, float]:
    """{step: seconds since the beginning when it was done}"""
    begun, done = time.perf_counter(), {}
    for name, do in newcomer.steps():
        do(newcomer.clone)
        done[name] = round(time.perf_counter() - begun, 1)
    return done


def figures(done: dict[str, float], clone: Path) -> list[Figure]:
    """The waits, and whether what they were for is there."""
    page, run = clone / "runs" / "first_look" / "report.html", clone / "runs" / "mine" / "done.json"
    return [
        Figure("clone to environment", "waited", done["make setup"], "s"),
        Figure("clone to first report", "waited", done["make demo"], "s", "the report is there", page.is_file()),
        Figure("clone to own recipe", "waited", done["own recipe"], "s", "the run is finished", run.is_file()),
        Figure("own recipe alone", "waited", round(done["own recipe"] - done["make demo"], 1), "s"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Do it, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default=str(ROOT), help="what is cloned (default: this repository)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    options = parser.parse_args(argv, argparse.Namespace(seed=0, threads=os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        newcomer = Newcomer(options.source, Path(folder))
        found = figures(timed(newcomer), newcomer.clone)
    report("bench/reliability/newcomer.py", found, options)


if __name__ == "__main__":
    main()
