"""What is stated of the memory of every verb, part by part: what a measured peak may be at most.

A verb takes what its imports take (measured beside it), the parts below, and WORKING for the rest. W is the bytes of
the weights, which are float32 here:

| verb | parts |
|---|---|
| prepare | DOCUMENT_COPIES * (BATCH_CHARACTERS + bytes of the longest document) + TOKEN_BYTES * CHARACTERS_AT_ONCE |
| plan | none: the model lies on the device meta |
| train | tensors of `estimate_memory` with what allocators lose (FRAGMENTS), and a fifth: tests hold it to that |
| compare | of each worker as of train, for the largest run, and 2 W for measuring it |
| eval, inspect | 2 W: the file that is mapped, the model; activations and logits of `estimate_memory` |
| generate, serve | 2 W; keys and values: SEQUENCES * context * 2 d for every block |
| export, import | W at most: files are mapped, tensors pass through one by one |
| compress | 3 W: the source that is mapped, the model that is calibrated, what is written |
| convert | 5 W: the same, and the layers' own weights twice: taken apart, and dealt to experts |
| offload | --memory, and as much again while copies in low precision are made |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moestro.data.files import DOCUMENT_COPIES
from moestro.data.shards import BATCH_CHARACTERS
from moestro.data.tokenizers import CHARACTERS_AT_ONCE, TOKEN_BYTES
from moestro.train.estimate import FRAGMENTS, MemoryEstimate

MIB = 2**20
# Of any verb: code and tables that are read when they are needed, threads' stacks, small tensors, text of a few MB.
WORKING = 64 * MIB
# Sequences whose keys and values a server holds: --active of them take turns.
SEQUENCES = {"generate": 1, "serve": 8}
# Within a fifth of small runs: tests/train/test_memory.py.
EXACT = 1.2


@dataclass(frozen=True)
class Sizes:
    """Bytes that a command is about: weights, the longest document, keys and values of one sequence, --memory; and what
    training is estimated to take."""

    weights: int = 0
    document: int = 0
    cache: int = 0
    memory: int = 0
    training: MemoryEstimate | None = None

    @property
    def forward(self) -> float:
        """What a forward pass needs beside weights, at most what is kept for a backward pass."""
        return self.training.activations + self.training.logits if self.training else 0.0

    @property
    def trained(self) -> float:
        """What training needs, without the process itself."""
        return EXACT * (1 + FRAGMENTS) * self.training.tensors if self.training else 0.0

    @property
    def text(self) -> float:
        """What text and tokens take while they are written."""
        return DOCUMENT_COPIES * (BATCH_CHARACTERS + self.document) + TOKEN_BYTES * CHARACTERS_AT_ONCE


Parts = Mapping[str, float]
STATED: Mapping[str, Callable[[Sizes], Parts]] = {
    "prepare": lambda of: {"text": of.text},
    "plan": lambda of: {},
    "train": lambda of: {"training": of.trained},
    "compare": lambda of: {"training": of.trained, "weights": 2 * of.weights},
    "eval": lambda of: {"weights": 2 * of.weights, "forward": of.forward},
    "inspect": lambda of: {"weights": 2 * of.weights, "forward": of.forward},
    "generate": lambda of: {"weights": 2 * of.weights, "cache": SEQUENCES["generate"] * of.cache},
    "serve": lambda of: {"weights": 2 * of.weights, "cache": SEQUENCES["serve"] * of.cache},
    "export": lambda of: {"weights": of.weights},
    "import": lambda of: {"weights": of.weights},
    "convert": lambda of: {"weights": 5 * of.weights},
    "compress": lambda of: {"weights": 3 * of.weights},
    "offload": lambda of: {"memory": 2 * of.memory},
}


def stated(verb: str, imports: int, sizes: Sizes) -> tuple[float, str]:
    """(bytes that a verb takes at most, their sum in words, MiB)"""
    parts = {"imports": imports, **STATED[verb](sizes), "working": WORKING}
    total = sum(parts.values())
    words = " + ".join(f"{name} {size / MIB:,.0f}" for name, size in parts.items())
    return total, f"at most {total / MIB:,.0f}: {words}"
