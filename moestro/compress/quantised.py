"""Matrices of experts in 8 or 4 bits, as `compressed-tensors` stores them: readable by transformers, also for families
that hold experts in one tensor, and by vLLM. Packing and formats are that library's; calibration (GPTQ) is here."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moestro.compress.plan import Quantisation
from moestro.formats.shards import Shards

# bits, kind of number and format of every scheme
SCHEMES: dict[str, tuple[int, str, str]] = {
    "int8": (8, "int", "pack-quantized"),
    "int4": (4, "int", "pack-quantized"),
    "fp8": (8, "float", "float-quantized"),
}
# Columns whose errors are spread over the rest together.
BLOCK = 128


def quantised(
    matrix: Float[Tensor, "o i"], how: Quantisation, moments: Float[Tensor, "i i"] | None = None
) -> dict[str, Tensor]:
    """The tensors that stand for a matrix, under what replaces "weight" in its name.

    Scales are symmetric, one a row or one for `group_size` inputs of a row: the largest number over half the range. A
    `calibrated` plan rounds by GPTQ with `moments`, the mean x x' of the inputs.

    Raises: ValueError where groups do not divide the inputs, or moments and plan do not go together.
    """
    library = _library()
    scheme = library.scheme(how)
    groups = matrix.shape[1] if how.group_size == 0 else how.group_size
    if matrix.shape[1] % groups:
        raise ValueError(
            f"group_size={how.group_size}, allowed for {matrix.shape[1]} inputs: 0, or one of its divisors"
        )
    if how.calibrated != (moments is not None):
        raise ValueError(f"calibrated={how.calibrated} and moments {'given' if moments is not None else 'missing'}")
    if moments is not None:
        rounded, scale = gptq(matrix, moments, lambda part: library.scales(part, scheme), _levels(how), groups)
    else:
        rounded = matrix
        parts = matrix.split(groups, dim=1)
        scale = torch.cat([library.scales(part, scheme) for part in parts], dim=1)
    return library.compress({"weight": rounded, "weight_scale": scale.to(matrix.dtype)}, scheme)


def restored(tensors: dict[str, Tensor], how: Quantisation) -> Float[Tensor, "o i"]:
    """The matrix that these tensors stand for."""
    library = _library()
    return library.decompress(tensors, library.scheme(how))


def quantisation_config(how: Quantisation) -> dict[str, Any]:
    """The `quantization_config` of a config.json whose experts' matrices, and nothing else, are stored so."""
    bits, kind, stored = SCHEMES[how.scheme]
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "group" if how.group_size else "channel",
        "group_size": how.group_size or None,
        "dynamic": False,
    }
    group = {"targets": [r"re:.*experts\.\d+\..*"], "weights": weights, "input_activations": None, "format": stored}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def gptq(
    matrix: Float[Tensor, "o i"],
    moments: Float[Tensor, "i i"],
    scales: Callable[[Tensor], Tensor],
    levels: tuple[int, int],
    group: int,
) -> tuple[Float[Tensor, "o i"], Float[Tensor, "o g"]]:
    """Rounds column after column, each column's error spread over those to come so that outputs change least (Frantar
    2022, GPTQ, arXiv:2210.17323, Alg. 1); a group's scales are found when its first column is reached.

    `moments` get 1 % of their mean diagonal added; inputs that are always 0 cost nothing and are rounded plainly.
    Returns the rounded matrix, in the dtype of `matrix`, and scales [o, groups].
    """
    w, wide = matrix.detach().double().clone(), moments.double().clone()
    dead = wide.diagonal() == 0
    wide[dead, dead] = 1
    wide += 0.01 * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    inverse = torch.linalg.cholesky(torch.linalg.inv(wide), upper=True)
    found, rounded = [], torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        errors = torch.zeros_like(w[:, start:stop])
        for column in range(start, stop):
            if column % group == 0:
                # errors of this block that have not reached the group's later columns yet
                ahead = w[:, column : column + group].clone()
                if column + group > stop:
                    ahead[:, stop - column :] -= errors @ inverse[start:stop, stop : column + group]
                found.append(scales(ahead.to(matrix.dtype)).double())
            rounded[:, column] = (w[:, column] / found[-1][:, 0]).round().clamp(*levels) * found[-1][:, 0]
            error = (w[:, column] - rounded[:, column]) / inverse[column, column]
            w[:, column:stop] -= error[:, None] * inverse[column, column:stop]
            errors[:, column - start] = error
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return rounded.to(matrix.dtype), torch.cat(found, dim=1).to(matrix.dtype)


def _levels(how: Quantisation) -> tuple[int, int]:
    bits, _, _ = SCHEMES[how.scheme]
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


class _Library:
    """What is used of compressed-tensors."""

    def __init__(self) -> None:
        try:
            import compressed_tensors
            from compressed_tensors.compressors import BaseCompressor
            from compressed_tensors.quantization import QuantizationScheme
            from compressed_tensors.quantization.utils import calculate_qparams
        except ImportError as error:
            raise ImportError('quantised experts need compressed-tensors: pip install "moestro[compress]"') from error
        self.version: str = compressed_tensors.__version__
        self._compressor, self._scheme, self._qparams = BaseCompressor, QuantizationScheme, calculate_qparams

    def scheme(self, how: Quantisation) -> Any:
        return self._scheme.model_validate(quantisation_config(how)["config_groups"]["group_0"])

    def scales(self, part: Tensor, scheme: Any) -> Tensor:
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        return self._qparams(low, high, scheme.weights)[0]

    def compress(self, tensors: dict[str, Tensor], scheme: Any) -> dict[str, Tensor]:
        made = self._compressor.get_value_from_registry(scheme.format).compress({**tensors}, scheme)
        return {name: tensor for name, tensor in made.items() if tensor is not None}

    def decompress(self, tensors: dict[str, Tensor], scheme: Any) -> Tensor:
        made: Any = self._compressor.get_value_from_registry(scheme.format).decompress({**tensors}, scheme)
        return made["weight"]


def _library() -> _Library:
    return _Library()


def quantised_share(folder: Path) -> float:
    """Of all numbers that a folder's tensors stand for, the share that is stored in 8 bits or fewer: what a quantiser
    that skips experts in silence does not reach. Scales and shapes are not counted.

    Raises: FormatError for a folder that is no checkpoint.
    """
    shards, few, many = Shards(folder), 0, 0
    for name in shards:
        count = math.prod(shards[name].shape)
        if name.endswith(("weight_scale", "weight_shape")):
            continue
        if name.endswith("weight_packed"):
            few += math.prod(shards.read(name.replace("weight_packed", "weight_shape")).tolist())
        elif shards[name].dtype.startswith("F8"):
            few += count
        else:
            many += count
    return few / max(1, few + many)
