"""Few bits: what is stored is read, errors are what they should be, calibration helps where it says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.offload.blobs import ALIGNMENT, laid_out
from moestro.offload.calibration import Calibration
from moestro.offload.codecs import CODECS, Codec, Grouped, Plain, codec_named, relative_error
from moestro.offload.packed import MANY, Packed
from moestro.offload.scorer import Thresholds
from moestro.offload.session import Plan, Session
from moestro.ops import native
from tests.offload.models import tiny_folder


def there_and_back(codec: Codec, matrix: Tensor, importance: Tensor | None = None) -> Tensor:
    fields = codec.encode(matrix, importance)
    assert {name: (f.dtype, tuple(f.shape)) for name, f in fields.items()} == codec.fields(matrix.shape, matrix.dtype)
    return codec.decode(fields, tuple(matrix.shape), matrix.dtype)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [16, 40, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_nearest(bits: int, columns: int, dtype: torch.dtype) -> None:
    """Rounding to nearest over the range: every number is off by at most half a step and the rounding of its scale."""
    matrix, codec = drawn(5, columns, dtype=dtype), Grouped("", bits, 16, searched=False)
    back = there_and_back(codec, matrix).float()
    for row in range(5):
        for start in range(0, columns, 16):
            part = matrix[row, start : start + 16].float()
            step = (part.max() - part.min()) / (2**bits - 1)
            off = (back[row, start : start + 16] - part).abs().max()
            rounding = 1e-6 if bits == 8 and dtype == torch.float32 else 0.012
            assert off <= step / 2 + rounding * (part.abs().max() + 2**bits * step)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_searching_is_never_worse_than_rounding(bits: int) -> None:
    matrix, weight = drawn(24, 100).pow(3), drawn(100, seed=1).square() + 0.01
    plain = there_and_back(Grouped("", bits, 20, searched=False), matrix)
    for importance in (None, weight):
        found = there_and_back(Grouped("", bits, 20), matrix, importance)
        h = (torch.ones(100) if importance is None else importance) * 1.0
        # in every group of every row
        errors = [((x - matrix).square() * h).view(24, 5, 20).sum(-1) for x in (found, plain)]
        assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-9).all()
    less = relative_error(matrix, there_and_back(Grouped("", bits, 20), matrix)) / relative_error(matrix, plain)
    assert less < {2: 0.9, 4: 0.95, 8: 1.0}[bits]


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_calibration_makes_outputs_nearer(name: str) -> None:
    """Inputs of unequal size: the error of the product, on inputs not seen, falls by weighting columns by them."""
    order = torch.randperm(128, generator=torch.Generator().manual_seed(2))
    matrix, size = drawn(32, 128), torch.logspace(-1.5, 1, 128)[order]
    seen, unseen = drawn(200, 128, seed=3) * size, drawn(200, 128, seed=4) * size
    want = unseen @ matrix.T
    errors = {}
    for kind, codec, importance in (
        ("rounded", Grouped(name, CODECS[name].bits, CODECS[name].group, searched=False), None),
        ("searched", CODECS[name], None),
        ("calibrated", CODECS[name], seen.square().mean(0)),
    ):
        errors[kind] = float((unseen @ there_and_back(codec, matrix, importance).T - want).norm() / want.norm())
    assert errors["calibrated"] < 0.9 * min(errors["searched"], errors["rounded"])


def test_what_is_flat_or_fits_is_exact() -> None:
    flat = torch.full((3, 64), -0.75)
    for name, codec in CODECS.items():
        assert torch.equal(there_and_back(codec, flat), flat), name
    levels = torch.arange(16.0).repeat(2, 4)
    assert torch.equal(there_and_back(CODECS["int4"], levels), levels)
    assert torch.equal(there_and_back(Plain(), flat.double()), flat.double())


def test_fewer_bits_more_error() -> None:
    matrix = drawn(64, 256)
    errors = [
        relative_error(matrix, there_and_back(CODECS[name], matrix))
        for name in ("same", "bf16", "int8", "int4", "int2")
    ]
    assert errors[0] == 0 and errors == sorted(errors) and errors[2] < 0.01 and errors[3] < 0.12 and errors[4] < 0.45


def test_layout_of_a_blob() -> None:
    shapes = {"gate_up_proj": (12, 20), "gate_up_proj_bias": (12,), "down_proj": (20, 6), "down_proj_bias": (20,)}
    tensors = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for name in CODECS:
        blob = laid_out(shapes, torch.float32, CODECS[name])
        buffer = torch.zeros(blob.size, dtype=torch.uint8)
        blob.write(buffer, tensors)
        found = blob.read(buffer)
        assert all(field.offset % ALIGNMENT == 0 for part in blob.parts for field in part.fields)
        for part in shapes:
            assert found[part].shape == tensors[part].shape
            # biases are kept as they are
            assert torch.allclose(found[part], tensors[part], atol=0 if "bias" in part or name == "same" else 1.5)
    names = ("same", "int8", "int4", "int2")
    sizes = [laid_out({"w": (256, 256)}, torch.bfloat16, CODECS[name]).size for name in names]
    assert [size / sizes[0] for size in sizes] == pytest.approx([1, 0.53125, 0.28125, 0.25], abs=1e-6)


def test_what_is_no_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="int3.*allowed: same"):
        codec_named("int3")
    with pytest.raises(ValueError, match="bits=3"):
        Grouped("", 3)
    with pytest.raises(ValueError, match="group=9"):
        Grouped("", 4, 9)


def test_calibration_mixes_rare_experts_with_their_layer() -> None:
    found = Calibration()
    rows = {0: drawn(40, 6) * 2, 1: drawn(2, 6, seed=1)}
    for expert, x in rows.items():
        found.add((0, expert), x[:1], x[:1, :3])
        found.add((0, expert), x[1:], x[1:, :3])
    mean = (rows[0].square().sum(0) + rows[1].square().sum(0)) / 42
    own = rows[1].square().mean(0)
    assert torch.allclose(found.importance((0, 1))["gate_up_proj"], (2 * own + 4 * mean) / 6)
    hidden = own[:3]
    assert torch.allclose(found.importance((0, 1))["down_proj"], (2 * hidden + 4 * hidden.mean()) / 6)
    # an expert that no token visited: what its layer sees; a layer that none did: nothing
    rare = found.importance((0, 7))
    assert torch.allclose(rare["gate_up_proj"], mean) and set(rare) == {"gate_up_proj"}
    assert found.importance((1, 0)) == {}
    assert found.fewest([(0, 0), (0, 1)]) == 2 and found.fewest([(0, 7)]) == 0


@pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe", "gpt_oss"])
def test_matrices_in_few_bits_are_multiplied_as_they_are_stored(tmp_path, family, monkeypatch):
    """Where the family multiplies by linear maps, codes are read as they are: the logits of decoded matrices."""
    folder = tiny_folder(tmp_path / "src", family)
    plan = Plan(1 << 40, CODECS["int8"], 0.4, Thresholds(0.0, 1.0))
    products, product = [], Packed.product
    monkeypatch.setattr(Packed, "product", lambda self, x: products.append(len(x)) or product(self, x))
    for length in (1, 3):
        ids = torch.arange(length)[None]
        with Session(folder, plan, store=tmp_path / "low") as session, session.running():
            have = session.model(ids).logits
            assert session.counts.asked_low > 0
            assert bool(products) == (family != "gpt_oss")
            session.engine.standing = False
            products.clear()
            torch.testing.assert_close(have, session.model(ids).logits, rtol=1e-4, atol=1e-4)
            assert not products


@pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")
def test_what_stands_for_a_matrix_is_decoded_where_that_is_needed() -> None:
    codec, matrix = CODECS["int4"], drawn(24, 64)
    fields = codec.encode(matrix)
    decoded = codec.decode(fields, (24, 64), torch.float32)
    stands: Any = Packed(fields, 4, lambda: decoded)
    assert stands[None] is stands[0] is stands[torch.tensor(0)] is stands
    with pytest.raises(IndexError, match="expert 1 of one"):
        stands[1]
    bias = drawn(24)
    for rows in (1, MANY, MANY + 1):
        x = drawn(rows, 64)
        want = torch.nn.functional.linear(x, decoded, bias)
        torch.testing.assert_close(torch.nn.functional.linear(x, stands, bias), want, rtol=1e-5, atol=1e-4)
    x = drawn(3, 64).double()
    assert torch.equal(torch.nn.functional.linear(x, stands.decode().double()), x @ decoded.double().T)
    assert torch.equal(torch.matmul(drawn(3, 24), stands), drawn(3, 24) @ decoded)
