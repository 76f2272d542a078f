"""Products with matrices in few bits on compiled kernels: against the codec's own decoding, in float64."""

import pytest
import torch
import torch.nn.functional as F

from moestro.offload.codecs import Grouped
from moestro.ops import native
from moestro.ops.native.packed import packed_linear, packs

pytestmark = pytest.mark.skipif(native.library().handle is None, reason=f"native kernels {native.status()}")


@pytest.mark.parametrize("variant", native.variants())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, 128), (8, 16), (4, 64), (4, 32)])
@pytest.mark.parametrize(("n", "o", "i"), [(1, 5, 256), (3, 7, 100), (4, 1, 64), (9, 3, 130), (0, 2, 64), (2, 4, 1)])
def test_equals_the_product_with_the_decoded_matrix(n, o, i, bits, group, dtype, variant):
    generator = torch.Generator().manual_seed(i)
    codec = Grouped("test", bits, group)
    matrix, x = torch.randn(o, i, generator=generator), torch.randn(n, i, generator=generator).to(dtype)
    fields = codec.encode(matrix)
    want = F.linear(x.double(), codec.decode(fields, (o, i), torch.float64))
    with native.variant(variant):
        have = packed_linear(x, fields["codes"], fields["scale"], fields["shift"], bits)
        each = [packed_linear(row[None], fields["codes"], fields["scale"], fields["shift"], bits) for row in x]
    assert have.dtype == dtype and have.shape == (n, o)
    size = F.linear(x.double().abs(), codec.decode(fields, (o, i), torch.float64).abs())
    # shifts and codes of one group cancel
    slack = 2**-20 if dtype == torch.float32 else 2**-8
    assert ((have.double() - want).abs() <= slack * (size + 8 * x.double().abs().sum(-1, keepdim=True))).all()
    assert all(torch.equal(row, have[place : place + 1]) for place, row in enumerate(each))


def test_what_does_not_go_together_is_refused():
    codes, scale = torch.zeros(3, 2, 32, dtype=torch.uint8), torch.ones(3, 2)
    assert packs(4, 32) and not packs(2, 32) and not packs(4, 24)
    for x, kept, factors, bits, said in (
        (torch.zeros(1, 128), codes, (scale, scale), 2, "not read by the kernels"),
        (torch.zeros(1, 128), codes[..., :8], (scale, scale), 4, "not read by the kernels"),
        (torch.zeros(1, 64), codes, (scale, scale), 4, "64 columns, allowed: those of 2 groups"),
        (torch.zeros(1, 129), codes, (scale, scale), 4, "129 columns"),
        (torch.zeros(1, 128), codes, (scale.double(), scale.double()), 4, "float32 or bfloat16"),
    ):
        with pytest.raises(ValueError, match=said):
            packed_linear(x, kept, *factors, bits)
