"""Files cut short, with one bit changed, under another name, or from another folder of the same kind: how many of these
are found when the folder is read, with a message that says what and where.

A case changes one file of a folder and opens the folder. It is *found* where that ends in an error of this package or
of the system which names the file or the folder; it is *without effect* where everything that is read is as before
(another way to write the same number in JSON, or a file that only says how others were made). Anything else passes
unseen: it may not happen to folders whose files have hashes, and is counted for the others.

    python -m bench.reliability.corruption [--bits 60] [--json PATH]
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from bench.reliability.figures import Figure, report
from bench.reliability.readers import Read, readers

# what a reader may raise: errors of this package are of these kinds
TOLD = (ValueError, RuntimeError, OSError, SafetensorError)
FOUND, EFFECTLESS, UNSEEN, UNCLEAR = "found", "without effect", "unseen", "unclear"


def damages(read: Read, bits: int, dice: random.Random) -> Iterator[tuple[str, Path, bytes | None]]:
    """(kind of damage, file, its new content or None where it is gone): as many bits as asked for, spread over the
    files, and every file cut at three places, renamed, and taken from the other folder."""
    for number in range(bits):
        file = read.files[number % len(read.files)]
        content = bytearray((read.folder / file).read_bytes())
        if content:
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            yield "a bit changed", file, bytes(content)
    for file in read.files:
        content = (read.folder / file).read_bytes()
        for length in sorted({0, len(content) // 2, max(0, len(content) - 1)}):
            yield "cut short", file, content[:length]
        yield "renamed", file, None
        if (read.other / file).is_file() and (other := (read.other / file).read_bytes()) != content:
            yield "of another folder", file, other


def outcome(read: Read, file: Path, content: bytes | None, reference: str) -> tuple[str, str]:
    """What becomes of one case, and what was said; the file is as before afterwards."""
    path = read.folder / file
    before = path.read_bytes()
    elsewhere = path.with_name(f"{path.name}.old")
    try:
        if content is None:
            path.rename(elsewhere)
        else:
            path.write_bytes(content)
        try:
            return (EFFECTLESS if read.opened(read.folder) == reference else UNSEEN), ""
        except TOLD as error:
            said = str(error)
        except Exception as error:  # what is none of these kinds would be a traceback for a user
            return UNCLEAR, f"{type(error).__name__}: {error}"
        named = any(name in said for name in (path.name, read.folder.name, str(read.folder)))
        return (FOUND if named else UNCLEAR), said
    finally:
        elsewhere.unlink(missing_ok=True)
        path.write_bytes(before)


def counted(read: Read, bits: int, dice: random.Random) -> list[Figure]:
    """All cases of a folder; what is unseen or unclear is printed."""
    reference = read.opened(read.folder)
    outcomes: dict[str, Counter[str]] = {}
    for damage, file, content in damages(read, bits, dice):
        found, said = outcome(read, file, content, reference)
        outcomes.setdefault(damage, Counter())[found] += 1
        if found in (UNSEEN, UNCLEAR):
            print(f"{read.name}: {file} {damage}: {found} {said[:300]}", file=sys.stderr)
    figures = []
    for damage, counts in outcomes.items():
        total, gone = counts.total(), counts[EFFECTLESS]
        wanted = f"{total}" if not gone else f"{total} less {gone} without effect"
        holds = counts[FOUND] + gone == total if read.sealed else None
        figures.append(Figure(read.name, f"{damage}: found", counts[FOUND], "", wanted, holds))
    return figures


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=60, help="changed in each kind of folder")
    parser.add_argument("--only", help="this kind of folder alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures as JSON")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words, argparse.Namespace(threads=1))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for read in readers(Path(folder)):
            if options.only in (None, read.name):
                figures += counted(read, options.bits, random.Random(options.seed))
    report("bench/reliability/corruption.py", figures, options)


if __name__ == "__main__":
    main()
