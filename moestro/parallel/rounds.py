"""What ranks tell each other in a store that outlives them, apart from what ranks before them have told there.

An agent of torchrun starts its ranks anew after one is lost, and keeps the store. PyTorch forms a group under the same
keys each time: a rank that looks before the other has come reads where that one listened in its former life, and is
refused, or waits for an answer until its time is over. Nothing that torchrun tells its ranks names the round: hosts
count restarts each for itself.
"""

import time
from datetime import timedelta
from uuid import uuid4

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

LATEST = "moestro/round"
PAUSE_S = 0.05


def own_round(store: Store, rank: int, world: int, timeout: timedelta) -> Store:
    """The part of a store that only the `world` ranks see that are here now; each must call it.

    Rank 0 draws a name. The others cannot know whether the name that they find is a former one, so they answer it with
    a word that they have drawn, and only a rank 0 that lives repeats that word.

    Raises: RuntimeError where not all come within `timeout`.
    """
    name = named(store, world, timeout) if rank == 0 else heard(store, rank, timeout)
    return PrefixStore(name, store)


def named(store: Store, world: int, timeout: timedelta) -> str:
    """A new name, once every other rank has answered it."""
    name = f"{LATEST}/{uuid4().hex}"
    store.set(LATEST, name)
    answers = [f"{name}/answer/{rank}" for rank in range(1, world)]
    store.wait(answers, timeout)
    for answer in answers:
        store.set(f"{name}/heard/{store.get(answer).decode()}", "yes")
    return name


def heard(store: Store, rank: int, timeout: timedelta) -> str:
    """The name that the living rank 0 gave."""
    word, answered, end = uuid4().hex, "", time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        name = store.get(LATEST).decode()
        if name != answered:
            store.set(f"{name}/answer/{rank}", word)
            answered = name
        if store.check([f"{name}/heard/{word}"]):
            return name
        time.sleep(PAUSE_S)
    raise RuntimeError(f"rank 0 and all others did not meet within {timeout.total_seconds():g} s")
