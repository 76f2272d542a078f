"""What accelerators can do: peak arithmetic, for the share of it that training uses (MFU); memory of devices."""

import torch

from moestro.ops.machine_memory import free_machine_memory, machine_memory

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


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that `device` can do at most in `precision`; None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the accelerator called `name`; None where the table does not have it."""
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that this process may use on `device`: all of a GPU's, or the machine's; None where it is not
    known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory() if device.type == "cpu" else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on `device`: what a GPU, or the machine, has free; None where it is not
    known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_machine_memory() if device.type == "cpu" else None
