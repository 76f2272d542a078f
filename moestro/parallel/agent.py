"""`python -m moestro.parallel.agent` is torchrun, of which no connection waits for a host that is cut off for longer
than half a minute.

torchrun's agents meet in a store, whose client reads without a limit. Where the network is cut, Linux gives such a
connection up after a quarter of an hour (`net.ipv4.tcp_retries2`); where it was silent just then, never. Connections
of this process are given up earlier: `TCP_USER_TIMEOUT` for what was sent and not received, keep-alive for silence. An
agent that has lost its store ends with an error, which Slurm and Kubernetes see.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

LIMIT_S = 30
LOOK_S = 1.0
OWN_FILES = Path("/proc/self/fd")


def connections() -> Iterator[socket.socket]:
    """This process's TCP sockets, each as a copy to be closed; none where the system does not list them."""
    for name in os.listdir(OWN_FILES) if OWN_FILES.is_dir() else ():
        # it may have been closed since
        with suppress(OSError):
            if not os.readlink(OWN_FILES / name).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                    yield found


def limit_waiting(seconds: int) -> int:
    """Let every TCP connection of this process that has no limit fail after about so many seconds without an answer;
    returns how many there were. Linux only: elsewhere none."""
    found = 0
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return found
    for connection in connections():
        if connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT):
            continue
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 3))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 6))
        found += 1
    return found


def keep_limiting(seconds: int = LIMIT_S) -> Event:
    """Do so again and again, in a thread that ends with the process or when the event is set: connections come and
    go."""
    over = Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            limit_waiting(seconds)

    Thread(target=watch, daemon=True, name="limits of connections").start()
    return over


def main(words: list[str] | None = None) -> None:
    """torchrun, with its options."""
    from torch.distributed.run import main as torchrun

    keep_limiting()
    torchrun(sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    main()
