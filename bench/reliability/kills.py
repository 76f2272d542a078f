"""SIGKILL at random moments of whatever writes, and what is left of it when the same command has been run again.

Every victim is run twice undisturbed; both runs must leave the same files, but for what a clock wrote, and the time
they took says when to kill. Then episodes: a fresh folder, the command again and again, killed at moments drawn evenly
over its time, until a draw lets it end. After every kill nothing under its own name may be half-written; after every
episode all files are those of the undisturbed run, to the bit. Processes are forked from one that has everything
imported, so that moments fall into the work and not into the start of python; every other one has a slow disk, so that
more of them fall into saves.

    python -m bench.reliability.kills [--kills 200] [--only NAME] [--json PATH]
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from bench.harness import ROOT
from bench.reliability.contents import contents, half_written
from bench.reliability.figures import Figure, report
from bench.reliability.forks import ELSEWHERE, Forks
from bench.reliability.victims import TRAINING, Victim, victims

# an attempt goes on to its end with this probability
SPARED = 0.25


class Killing:
    """The kills of one victim in its folder `work`, counted by what it was doing."""

    def __init__(self, victim: Victim, work: Path, cache: Path, forks: Forks, dice: random.Random) -> None:
        self.victim, self.forks, self.dice = victim, forks, dice
        self.root, self.log, self.mark = work / "files", work / "log", work / "mark"
        self.cache = self.root / "cache" if victim.own_cache else cache
        self.phases: Counter[str] = Counter()
        self.episodes = 0
        self.broken: list[str] = []
        work.mkdir()

    @property
    def out(self) -> Path:
        """The folder that the command fills."""
        return self.root / "out"

    def start(self, slow: bool = False) -> int:
        """Begin the command; returns its pid."""
        files = {"log": str(self.log), "mark": str(self.mark), "cache": str(self.cache)}
        marks = dict(self.victim.marks)
        return self.forks.start(words=self.victim.words(self.out), marks=marks, slow=slow, **files)

    def undisturbed(self) -> tuple[dict[str, str], float]:
        """What the command leaves in a fresh folder, and the seconds that it takes."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        began = time.monotonic()
        self.start()
        if status := self.forks.status():
            sys.exit(f"{self.victim.name} ended with {status}:\n{self.log.read_text()[-2000:]}")
        return contents(self.root), time.monotonic() - began

    def run(self, kills: int) -> None:
        """Kill it so many times."""
        reference, _ = self.undisturbed()
        again, seconds = self.undisturbed()
        self.compare(reference, again, "a second undisturbed run")
        while self.phases.total() < kills:
            shutil.rmtree(self.root)
            self.root.mkdir()
            self.episode(kills, seconds)
            self.compare(reference, contents(self.root), f"episode {self.episodes}")
            self.episodes += 1

    def episode(self, kills: int, seconds: float) -> None:
        """The command until it ends, killed on the way."""
        while not (self.victim.once and self.out.exists()):
            last = self.phases.total() >= kills or self.dice.random() < SPARED
            pid = self.start(slow=self.phases.total() % 2 == 1)
            if not last:
                self.forks.kill(pid, self.dice.uniform(0, seconds))
            status = self.forks.status()
            if status == -signal.SIGKILL:
                self.phases[self.doing()] += 1
                self.broken += [f"after kill {self.phases.total()}: {what}" for what in half_written(self.root)]
            elif status:
                self.broken.append(f"it ended with {status}: {self.log.read_text()[-500:]}")
                return
            else:
                return

    def doing(self) -> str:
        """What it was doing when it was killed; of training also whether there was anything to go on from."""
        phase = self.mark.read_text().strip() or ELSEWHERE
        if phase not in TRAINING.values():
            return phase
        return phase if any(self.root.rglob("checkpoints/step-*")) else f"{phase}, before the first save"

    def compare(self, wanted: dict[str, str], found: dict[str, str], what: str) -> None:
        """Note where files differ."""
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        self.broken += [f"{what}: {name} differs" for name in differing]

    def figures(self) -> list[Figure]:
        """What came of it."""
        name, kills = self.victim.name, self.phases.total()
        for line in self.broken:
            print(f"{name}: {line}", file=sys.stderr)
        phases = [Figure(name, f"kills {phase}", count) for phase, count in sorted(self.phases.items())]
        return [
            Figure(name, "kills", kills),
            *phases,
            Figure(name, "times it then ended and was compared", self.episodes, "", "at least 1", self.episodes > 0),
            Figure(name, "lost, different or half-written", len(self.broken), "", "0", not self.broken),
        ]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", help="the victim of this name alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words, argparse.Namespace(threads=1))
    with tempfile.TemporaryDirectory() as folder:
        report("bench/reliability/kills.py", killed(options, Path(folder)), options)


def shared(kills: int, chosen: Sequence[Victim]) -> list[int]:
    """Kills for each, by their shares: one at least, and as many together as were asked for at least."""
    ends = [0.0, *accumulate(victim.share for victim in chosen)]
    places = [round(kills * end / ends[-1]) for end in ends]
    return [max(1, end - start) for start, end in pairwise(places)]


def killed(options: argparse.Namespace, work: Path) -> list[Figure]:
    """All victims killed, and what was counted."""
    forks, dice, found, total = Forks(ROOT), random.Random(options.seed), [], 0

    def made(words: list[str]) -> None:
        files = {"log": str(work / "made.log"), "mark": str(work / "mark"), "cache": str(work / "cache")}
        forks.start(words=words, marks={}, slow=False, **files)
        if forks.status():
            sys.exit((work / "made.log").read_text()[-2000:])

    chosen = [v for v in victims(work, made, options.seed) if options.only in (None, v.name)]
    for number, (victim, share) in enumerate(zip(chosen, shared(options.kills, chosen), strict=True)):
        killing = Killing(victim, work / str(number), work / "cache", forks, dice)
        killing.run(share)
        found += killing.figures()
        total += killing.phases.total()
        print(f"{victim.name}: {killing.phases.total()} kills, {killing.episodes} ended", file=sys.stderr, flush=True)
    forks.close()
    good = all(figure.holds is not False for figure in found)
    return [*found, Figure("all", "kills", total, "", f"at least {options.kills}", total >= options.kills and good)]


if __name__ == "__main__":
    main()
