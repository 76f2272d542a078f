"""Which expert lives on which device, where each is to hold as many parameters and experts as any other."""

from collections.abc import Sequence


def placement(widths: Sequence[int], n_devices: int, together: int = 1) -> list[list[int]]:
    """The experts of every device, ascending: equally many on each, with equal sums of widths.

    Blocks of `together` consecutive experts stay on one device. MoDSE's pairs (`widths: pairs`, together=2) and MoHGE's
    groups whose counts are multiples of `n_devices` always come out; other lists are tried widest block first, each
    block going to the device with the smallest sum that has room (ties to the lower device).

    Raises: ValueError where the experts do not divide into equal numbers, or the sums are not equal.
    """
    n_blocks = len(widths) // together if together > 0 else 0
    if n_devices < 1 or not n_blocks or len(widths) % together or n_blocks % n_devices:
        raise ValueError(
            f"{len(widths)} experts in blocks of together={together} do not divide among n_devices={n_devices}"
        )
    sums = [sum(widths[together * block : together * (block + 1)]) for block in range(n_blocks)]
    blocks: list[list[int]] = [[] for _ in range(n_devices)]
    held = [0] * n_devices
    for block in sorted(range(n_blocks), key=lambda block: (-sums[block], block)):
        open_devices = [device for device in range(n_devices) if len(blocks[device]) < n_blocks // n_devices]
        device = min(open_devices, key=lambda device: (held[device], device))
        blocks[device].append(block)
        held[device] += sums[block]
    if len(set(held)) > 1:
        raise ValueError(f"widths={list(widths)}: no equal placement found on n_devices={n_devices}, best sums {held}")
    return [[together * block + i for block in sorted(mine) for i in range(together)] for mine in blocks]
