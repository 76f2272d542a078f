"""What the machines are that a plan is for: memory, arithmetic, links. Numbers are of the vendors' data sheets.

GPUs: memory and dense tensor FLOP/s (sheets print them with 2:4 sparsity: halved here) of the SXM modules; float32
without TF32, which is what torch uses by default. NVLink: sheets print both directions together, 900 GB/s for H100 and
H200, 600 for A100, 1800 for B200: half of it goes one way. Between hosts every GPU of a DGX has a network card of its
own: 200 Gbit/s (A100), 400 Gbit/s (H100, H200, B200), one way. An HGX B200 shows 180 of its 192 GB.

Latencies are what a small message costs, library included, and `launch` what a kernel does: assumptions, as is the
share of the peak that a step reaches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from moestro.recipe.syntax import RecipeError, read_yaml, unknown
from moestro.train.hardware import PEAK_BF16, memory_of

GB = 1e9
GBIT = 1e9 / 8


@dataclass(frozen=True)
class Machine:
    """One accelerator and its links: bytes, bytes a second (one way) and FLOP/s. `link` joins the `per_host` of one
    host, `network` hosts, each accelerator with its own share; `latency` and `network_latency` are seconds a message,
    `launch` seconds a kernel. `efficiency` is the share of `bf16` or `fp32` FLOP/s that the products of a training step
    reach; `overlap` that of computation behind which messages can hide: 0 where a rank's own core sends them;
    `sharded_unit` the seconds that a block or router of its own costs FSDP in a forward and backward pass besides its
    messages: 0 where the host runs ahead of the device."""

    name: str
    memory: float
    memory_bandwidth: float
    bf16: float
    fp32: float
    per_host: int = 8
    link: float = 450 * GB
    network: float = 400 * GBIT
    latency: float = 5e-6
    network_latency: float = 20e-6
    launch: float = 5e-6
    efficiency: float = 0.4
    overlap: float = 1.0
    sharded_unit: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "overlap", "sharded_unit") and not value > 0:
                raise ValueError(f"machine {field.name}={value!r}: must be above 0")
        if self.efficiency > 1:
            raise ValueError(f"machine efficiency={self.efficiency}: at most 1")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"machine overlap={self.overlap}: allowed are 0 to 1")
        if not self.sharded_unit >= 0:
            raise ValueError(f"machine sharded_unit={self.sharded_unit}: must not be negative")

    def flops(self, precision: str) -> float:
        """FLOP/s that a step's products are expected to reach."""
        return self.efficiency * (self.bf16 if precision == "bf16" else self.fp32)


MACHINES = {
    "h200": Machine("H200", 141 * GB, 4.8e12, PEAK_BF16["H200"], 67e12),
    "h100": Machine("H100", 80 * GB, 3.35e12, PEAK_BF16["H100"], 67e12),
    "a100": Machine("A100", 80 * GB, 2.039e12, PEAK_BF16["A100"], 19.5e12, link=300 * GB, network=200 * GBIT),
    "b200": Machine("B200", 180 * GB, 8e12, PEAK_BF16["B200"], 80e12, link=900 * GB),
}


def machine_named(name: str) -> Machine:
    """One of `MACHINES`, `cpu` (this machine, shared by its processes), or a YAML file: `like: h200`, then what
    differs, or all fields.

    Raises: RecipeError for a name that is neither, and for fields that there are not.
    """
    if name in MACHINES:
        return MACHINES[name]
    if name == "cpu":
        return this_cpu()
    if not name.endswith((".yaml", ".yml")):
        raise RecipeError(unknown("machine", name, [*MACHINES, "cpu", "a YAML file"]))
    return from_tree(read_yaml(Path(name)), name)


def from_tree(tree: Mapping[str, Any], where: str) -> Machine:
    """A machine as YAML describes it."""
    given = {"name": Path(where).stem, **tree}
    base = given.pop("like", None)
    if base is not None and base not in MACHINES:
        raise RecipeError(f"{unknown('machine', base, MACHINES)} ({where}: like)")
    known = {field.name for field in fields(Machine)}
    if strange := sorted(given.keys() - known):
        raise RecipeError(f"{unknown('key', strange[0], known)} ({where})")
    wrong = [key for key, value in given.items() if key != "name" and not isinstance(value, int | float)]
    if wrong:
        raise RecipeError(f"{wrong[0]}={given[wrong[0]]!r}, allowed: a number ({where})")
    try:
        return Machine(**given) if base is None else replace(MACHINES[base], **given)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{error} ({where})") from error


def this_cpu() -> Machine:
    """This machine's processor as one accelerator. Its memory is known; its speed is taken to be 50 GFLOP/s a core, and
    20 GB/s: orders of magnitude, not measurements."""
    memory = memory_of(torch.device("cpu"))
    if memory is None:
        raise RecipeError("machine cpu: the system does not say how much memory there is; give a YAML file")
    speed = 50e9 * torch.get_num_threads()
    return Machine(
        "CPU", memory, 20 * GB, speed, speed, per_host=1, link=10 * GB, network=GB, efficiency=0.5, overlap=0
    )


def this_machine() -> Machine:
    """The kind of GPU that this machine has, with its own memory; its processor where it has none.

    Raises: RecipeError for a GPU that is not among `MACHINES`.
    """
    if not torch.cuda.is_available():
        return this_cpu()
    name = torch.cuda.get_device_name()
    kind = next((machine for machine in MACHINES.values() if machine.name in name), None)
    if kind is None:
        raise RecipeError(f"{name} is not among the known machines ({', '.join(MACHINES)}): describe it in a YAML file")
    return replace(kind, memory=float(memory_of(torch.device("cuda")) or kind.memory))
