"""Pairs (MoDSE), groups (MoHGE), and other widths in every layer, which every figure reads layer by layer."""

import pytest
import torch

from moestro.compare.usage import expert_shares
from moestro.evaluate import routing_report
from moestro.experts import FFNBank
from moestro.experts.widths import groups, pairs
from moestro.model import Transformer
from moestro.model.active import idle_parameters
from moestro.objectives import ParameterPenalty
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from tests.conftest import ROOT
from tests.train.tiny import Counting

RECIPE = ROOT / "recipes" / "hmoe.yaml"


def test_pairs_are_the_papers_and_all_alike() -> None:
    """MoDSE's 300M x 8 and 700M x 8."""
    assert pairs(30_720) == [6912, 768, 6144, 1536, 4608, 3072, 3840, 3840]
    assert pairs(40_960) == [9216, 1024, 8192, 2048, 6144, 4096, 5120, 5120]


@pytest.mark.parametrize(("total", "multiple_of"), [(512, 4), (1000, 1), (1000, 50), (96, 8), (120, 20)])
def test_every_pair_sums_to_twice_the_mean(total: int, multiple_of: int) -> None:
    widths = pairs(total, (0.13, 0.5), multiple_of)
    assert [wide + narrow for wide, narrow in zip(widths[::2], widths[1::2], strict=True)] == [total // 2] * 2
    assert all(width % multiple_of == 0 and width >= 0 for width in widths)
    assert widths[0] >= widths[1]


def test_groups_are_equal_inside() -> None:
    assert groups([(2, 64), (1, 0), (3, 128)]) == [64, 64, 0, 128, 128, 128]
    assert groups([(4, 1), (2, 2), (2, 4)], total=512) == [32, 32, 32, 32, 64, 64, 128, 128]
    uneven = groups([(3, 1), (2, 2.5)], total=100, multiple_of=4)
    assert sum(uneven) == 100 and all(width % 4 == 0 for width in uneven)
    assert max(uneven[:3]) - min(uneven[:3]) <= 4 and max(uneven[3:]) - min(uneven[3:]) <= 4


def test_impossible_pairs_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"narrow=\[0.6\], allowed: at least one share, all above 0 and at most 0.5"):
        pairs(8, (0.6,))
    with pytest.raises(ValueError, match=r"narrow=\[\], allowed"):
        pairs(8, ())
    with pytest.raises(ValueError, match=r"total=100 does not split into 4 equal pairs of multiples of multiple_of=4"):
        pairs(100, multiple_of=4)
    with pytest.raises(ValueError, match=r"groups=\[\[0, 5\]\], allowed: at least one, each of 1 expert or more"):
        groups([(0, 5)])
    for wrong in (2.5, -1, 6):
        with pytest.raises(ValueError, match=r"without total=, allowed: whole multiples of multiple_of=4"):
            groups([(1, wrong)], multiple_of=4)


def test_recipes_know_them() -> None:
    for widths, expected in (
        ("{kind: pairs, total: 512, multiple_of: 4}", [116, 12, 104, 24, 76, 52, 64, 64]),
        ("{kind: groups, groups: [[4, 16], [4, 112]]}", [16] * 4 + [112] * 4),
        ("{kind: groups, groups: [[4, 1], [2, 2.0], [2, 4]], total: 512}", [32] * 4 + [64] * 2 + [128] * 2),
    ):
        recipe = load_recipe(RECIPE, [f"model.ffn.branches=[{{kind: ffn, widths: {widths}}}]"])
        for layer in build_model(recipe, 16, "meta").moe_layers().values():
            assert isinstance(layer.bank, FFNBank)
            assert list(layer.bank.widths) == expected
    wrong = load_recipe(RECIPE, ["model.ffn.branches=[{kind: ffn, widths: {kind: pairs, total: 10}}]"])
    with pytest.raises(RecipeError, match=r"total=10 does not split into 4 equal pairs .*\(command line: "):
        build_model(wrong, 16, "meta")


WIDTHS = {"blocks.0.ffn": [3, 9, 6], "blocks.1.ffn": [20, 4], "blocks.2.ffn": [1, 0, 2, 5, 8]}


def ffn(widths: list[int]) -> str:
    router = "{kind: scored, score: {kind: linear}, select: {kind: top_k, top_k: 2}}"
    return f"{{kind: moe, router: {router}, branches: [{{kind: ffn, widths: {widths}}}]}}"


@pytest.fixture
def uneven() -> Transformer:
    """Three layers with other widths, and other numbers of experts, each."""
    first, *others = (ffn(widths) for widths in WIDTHS.values())
    layers = ", ".join(f"{i}: {other}" for i, other in enumerate(others, 1))
    overrides = ["model.d_model=8", "model.n_layers=3", "model.attention.n_heads=2"]
    return build_model(load_recipe(RECIPE, [*overrides, f"model.ffn={first}", f"model.layers={{{layers}}}"]), 11)


def test_every_figure_reads_widths_layer_by_layer(uneven: Transformer) -> None:
    assert {name: layer.expert_widths().tolist() for name, layer in uneven.moe_layers().items()} == WIDTHS  # type: ignore[union-attr]
    batch = next(iter(Counting().val_batches(4)))
    traces = uneven(batch.tokens).traces
    assert [trace.routing.n_experts for trace in traces] == [3, 2, 5]
    for trace, widths in zip(traces, WIDTHS.values(), strict=True):
        used = trace.routing.dense() != 0
        each = torch.tensor(widths, dtype=torch.float64)
        torch.testing.assert_close(trace.active_width(), used.double() @ each)
        fraction, probability = used.double().mean(0), trace.routing.logits.double().softmax(-1).mean(0)
        penalty = len(widths) * (fraction * each / each.mean() * probability).sum()
        torch.testing.assert_close(ParameterPenalty()(trace).double(), penalty, rtol=1e-5, atol=0)
        rows = float((used.double() @ each).sum())
        useful = float(trace.layer.flops(trace.routing).useful)
        assert useful == 2 * used.numel() * 8 + 6 * 8 * rows
        idle = 3 * 8 * (sum(widths) - rows / len(used))
        assert idle_parameters([trace]) == pytest.approx(idle)
    second = uneven.moe_layers()["blocks.1.ffn"]
    assert second.expected_token_flops() == 2 * 2 * 8 + 2 * 6 * 8 * 12


def test_reports_read_widths_layer_by_layer(uneven: Transformer) -> None:
    report = routing_report(uneven, Counting().val_batches(4))
    assert {name: layer["widths"] for name, layer in report.items()} == WIDTHS
    for layer in report.values():
        shares = expert_shares(layer["widths"], layer["load"])
        work = sum(w * n for w, n in zip(layer["widths"], layer["load"], strict=True))
        assert layer["active_width"]["mean"] == pytest.approx(work / layer["tokens"])
        assert sum(share["of_work"] for share in shares) == pytest.approx(1.0)


def layer_widths(*overrides: str) -> list[list[int]]:
    model = build_model(load_recipe(RECIPE, ["model.n_layers=3", *overrides]), 16, "meta")
    return [layer.expert_widths().tolist() for layer in model.moe_layers().values()]  # type: ignore[union-attr]


def test_the_command_line_sets_widths_layer_by_layer() -> None:
    """What is not said of a layer is as in the other layers; a layer given a kind is all its own."""
    plain = list(range(36, 93, 8))
    key = "model.layers.1.branches.0.widths"
    assert layer_widths(f"{key}=[4, 0, 9]") == [plain, [4, 0, 9], plain]
    assert layer_widths(f"{key}.kind=equal", f"{key}.n_experts=2", f"{key}.total=8") == [plain, [4, 4], plain]
    assert layer_widths(f"{key}.total=1024") == [plain, [2 * width for width in plain], plain]
    two = [f"{key}=[4, 4]", "model.layers.2.branches.0.widths=[1, 2, 3]", "model.layers.2.router.select.top_k=1"]
    assert layer_widths(*two) == [plain, [4, 4], [1, 2, 3]]
    recipe = load_recipe(RECIPE, two)
    assert recipe.tree["model"]["ffn"] == load_recipe(RECIPE).tree["model"]["ffn"]
    assert [recipe.tree["model"]["layers"][i]["router"]["select"]["top_k"] for i in (1, 2)] == [2, 1]
    for order in (1, -1):
        dense = ["model.layers.1.kind=dense", "model.layers.1.width=8"][::order]
        assert layer_widths(*dense) == [plain, plain]
    with pytest.raises(RecipeError, match=r"top_k=2 > 1 experts \(.*hmoe.yaml: model.ffn.router.select.top_k\)"):
        layer_widths("model.layers.0.branches.0.widths=[4]")


@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_set_in_part_is_like_the_others_as_they_are_in_the_end(order: int) -> None:
    settings = ["model.layers.1.branches.0.widths=[4, 5]", "model.ffn.router.select={kind: top_p, threshold: 0.3}"]
    layers = build_model(load_recipe(RECIPE, settings[::order]), 16, "meta").moe_layers().values()
    assert [layer.router.select.threshold for layer in layers] == [0.3] * 4  # type: ignore[union-attr]


def test_a_layer_set_in_part_is_the_one_written_out() -> None:
    recipe = load_recipe(RECIPE, ["model.layers.0.branches.0.widths=[4, 5]"])
    again = load_recipe(RECIPE, [f"model.layers={{0: {ffn([4, 5])}}}"])
    assert recipe == again


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"layer 7, allowed: 0 to 3 \(n_layers=4\)"):
        load_recipe(RECIPE, ["model.layers={7: {kind: dense, width: 8}}"])
