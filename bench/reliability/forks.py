"""Commands of moestro in processes that are forked from one that has everything imported, and that say what they do.

Started as `python -m bench.reliability.forks`: for every line on standard input, a JSON object {"words", "log", "mark",
"marks", "slow", "cache"}, a process is forked that runs `moestro WORDS` with one thread; its pid is printed, and its
exit status when it has ended. `marks` is {"module:name": what happens in that function}: while it runs, the file `mark`
says so. `slow` lets every fsync take longer, as disks do. Workers of a comparison are forked, too.
"""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ELSEWHERE = "elsewhere"
# what verbs import when they run; paid once, here
IMPORTS = [
    f"moestro.{name}"
    for name in ("cli", "recipe.build", "data", "train", "compare.run", "compare.table", "compare.compression")
    + ("compress.running", "compress.report", "convert.run", "convert.report", "export.folder")
]
SLOW_SYNC = 0.01


class Forks:
    """The forking process, seen from outside. One command at a time."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "bench.reliability.forks"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(command, cwd=root, env=environment, **pipes)

    def start(self, **asked: Any) -> int:
        """Begin a command; returns its pid."""
        self.process.stdin.write(json.dumps(asked) + "\n")
        return int(self.process.stdout.readline())

    def kill(self, pid: int, seconds: float) -> None:
        """Kill a command after so long, unless it has ended by then. By its handle: a number may be another's again."""
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            time.sleep(seconds)
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            os.close(handle)

    def status(self) -> int:
        """Wait for the end of the command; returns its exit status."""
        return int(self.process.stdout.readline())

    def close(self) -> None:
        """End the forking process."""
        self.process.stdin.close()
        self.process.wait()


def marked(function: Callable, what: str, stack: list[str], handle: int) -> Callable:
    """A function that says in a file that it runs; the file is as it was before once it has ended."""

    def say() -> None:
        os.pwrite(handle, stack[-1].ljust(80).encode(), 0)

    @functools.wraps(function)
    def saying(*arguments: Any, **keywords: Any) -> Any:
        stack.append(what)
        say()
        try:
            return function(*arguments, **keywords)
        finally:
            stack.pop()
            say()

    return saying


def set_marks(marks: Mapping[str, str], mark: str) -> None:
    """Let the named functions say that they run."""
    handle, stack = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), [ELSEWHERE]
    for place, what in marks.items():
        module, *names = place.replace(":", ".:").split(".:")
        owner: Any = import_module(module)
        *inside, name = names[0].split(".")
        for part in inside:
            owner = getattr(owner, part)
        setattr(owner, name, marked(getattr(owner, name), what, stack, handle))


def slow_disk(handle: int, fsync: Callable = os.fsync) -> None:
    """Force to the disk, and take longer than this disk does."""
    fsync(handle)
    time.sleep(SLOW_SYNC)


def run(asked: Mapping[str, Any]) -> int:
    """The command, in this process; returns its exit status."""
    from moestro.cli import main

    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["MOESTRO_CACHE"] = asked["cache"]
    if asked["slow"]:
        os.fsync = slow_disk
    # spawned workers would start a python each
    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forked
    set_marks(asked["marks"], asked["mark"])
    return main(asked["words"])


def child(asked: Mapping[str, Any]) -> None:
    """Run the command and end."""
    status = 70
    try:
        status = run(asked)
    except BaseException:  # noqa: B036 - told in the log; nothing of the parent may run here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for name in IMPORTS:
        import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(pid, flush=True)
        _, ended = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


if __name__ == "__main__":
    main()
