"""Blocks that tokens pass by (mixture-of-depths) against the reference: outputs, gradients, padding, FLOPs."""

import pytest
import torch

from moestro.experts import FFNBank
from moestro.layers import DenseFFN, MoELayer
from moestro.model import Attention, Block, Cache, Depths, PassedBlock, Transformer
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import LinearScore, ScoredRouter, TopK
from tests.conftest import ROOT
from tests.reference import choices as reference
from tests.tolerances import FLOAT64

D, S, SHARE = 8, 11, 0.3


def passed(ffn: torch.nn.Module | None = None, share: float = SHARE) -> PassedBlock:
    torch.manual_seed(0)
    return PassedBlock(D, Attention(D, 2), ffn or DenseFFN(D, 12), share=share).double()


def tokens(b: int = 3) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(b, S, D, dtype=torch.float64, requires_grad=True)


def expected(block: PassedBlock, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    def whole(chosen: torch.Tensor, positions: list[int]) -> torch.Tensor:
        return Block.forward(block, chosen[None], torch.tensor([positions]))[0][0]

    rows = zip(x, lengths, strict=True)
    return torch.stack([reference.mixture_of_depths(row, block.score.weight[0], SHARE, whole, n) for row, n in rows])


@pytest.mark.parametrize("lengths", [None, [S, 7, 1]])
def test_equals_the_reference(lengths: list[int] | None) -> None:
    block, x = passed(), tokens()
    keep = None if lengths is None else torch.arange(S) < torch.tensor(lengths)[:, None]
    y, traces = block(x, torch.arange(S)[None], None, keep)
    want = expected(block, x, lengths or [S] * 3)
    torch.testing.assert_close(y, want, **FLOAT64)
    assert traces == ()
    leaves = [x, *block.parameters()]
    mine, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in (y, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


def test_all_tokens_with_weight_one_are_a_plain_block() -> None:
    block, x = passed(share=1.0), tokens().detach()
    x[..., 0] = 1.0
    with torch.no_grad():
        block.score.weight.copy_(torch.eye(D, dtype=torch.float64)[:1])
    torch.testing.assert_close(block(x, torch.arange(S)[None])[0], Block.forward(block, x, torch.arange(S)[None])[0])


def test_documents_stay_apart() -> None:
    block, x = passed(share=1.0), tokens(1)
    document = torch.tensor([[0] * 5 + [1] * 6])
    mask = ((document[:, :, None] == document[:, None]) & torch.ones(S, S, dtype=torch.bool).tril())[:, None]
    y, _ = block(x, torch.arange(S)[None], mask)
    second = block(x[:, 5:], torch.arange(5, S)[None])[0]
    torch.testing.assert_close(y[:, 5:], second, **FLOAT64)


def test_traces_are_of_the_models_tokens() -> None:
    ffn = MoELayer(ScoredRouter(LinearScore(D, 4), TopK(2)), [FFNBank(D, [6] * 4)])
    model = Transformer(16, D, [passed(ffn)], allow_non_causal=True).double()
    keep = torch.arange(S) < torch.tensor([[S], [6]])
    output = model(torch.randint(16, (2, S)), keep=keep)
    (trace,) = output.traces
    used = trace.experts_per_token()
    assert used.shape == (S + 6,) and sorted(set(used.tolist())) == [0, 2] and int((used > 0).sum()) == 4 + 2
    assert torch.isfinite(output.logits[keep]).all()


def test_counts_what_is_computed() -> None:
    plain, own = Block(D, Attention(D, 2), DenseFFN(D, 12)), passed()
    chosen = own.n_chosen(S)
    assert chosen == 4 and own.flops(2, S).useful == plain.flops(2, chosen).useful + 2 * 2 * S * D
    total = float(own.flops(1, S).useful)
    assert own.expected_token_flops(S) * S == pytest.approx(total)
    inner = sum(p.numel() for p in plain.parameters())
    assert own.idle_parameters() == pytest.approx((1 - SHARE) * inner)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no cache is possible"):
        passed()(tokens(), torch.arange(S)[None], cache=Cache())
    with pytest.raises(ValueError, match="blocks.0: PassedBlock looks at other tokens"):
        Transformer(16, D, [passed()])
    with pytest.raises(ValueError, match="share=0, allowed: above 0"):
        Depths(0)
    with pytest.raises(ValueError, match="every=0, allowed: at least 1"):
        Depths(every=0)


@pytest.mark.parametrize(
    ("name", "blocks"), [("mixture_of_depths", (1, 3)), ("paper/mixture-of-depths", (1, 3, 5, 7, 9, 11))]
)
def test_recipes_pass_by_every_second_block(name: str, blocks: tuple[int, ...]) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    model = build_model(load_recipe(path), 16, "meta")
    assert tuple(i for i, block in enumerate(model.blocks) if isinstance(block, PassedBlock)) == blocks
    assert model.expected_token_flops(64) < build_model(
        load_recipe(path, ["model.depths=null"]), 16, "meta"
    ).expected_token_flops(64)
    with pytest.raises(RecipeError, match="looks at other tokens"):
        build_model(load_recipe(path, ["model.allow_non_causal=false"]), 16, "meta")
    with pytest.raises(RecipeError, match="depths"):
        build_model(load_recipe(path, ["model.depths.share=2"]), 16, "meta")
