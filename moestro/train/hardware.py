"""What a machine can do: peak arithmetic of accelerators, for the share of it that training uses (MFU); memory."""

import os
from pathlib import Path

import torch

# Vendors' data sheets, dense bfloat16 tensor FLOP/s (sheets that print the figure with 2:4 sparsity are halved).
# The first name contained in the device's name counts, so the more particular one stands first.
PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
# Where Linux says how much memory a container may use (cgroup v2, v1).
CONTROL_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that `device` can do at most in `precision`; None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the accelerator called `name`; None where the table does not have it."""
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that this process may use on `device`: all of a GPU's; of the machine's, what its control group
    allows; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    limits = [_limit(path) for path in CONTROL_GROUPS]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(limit for limit in limits if limit)])


def _limit(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdecimal() else None
