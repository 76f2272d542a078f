"""Plans of recipes: what every rank holds, what is fastest, what does not fit and why."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moestro.parallel import ParallelSettings
from moestro.plan import MACHINES, Spread, StepTime, search, workload
from moestro.plan.imbalance import EVEN
from moestro.plan.report import days, to_paste
from moestro.plan.search import divisors, fits, mesh, shardings_of
from moestro.plan.workload import Workload
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError, parse_yaml
from moestro.train.estimate import estimate_memory

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
H200 = MACHINES["h200"]
EIGHT = replace(H200, memory=8e9)


def planned(name: str, *changes: str) -> Workload:
    return workload(load_recipe(RECIPES / f"{name}.yaml", changes))


def spread(work: Workload, world: int, accumulate: int = 1, recompute: bool = False, **settings: object) -> Spread:
    return Spread(work, H200, world, ParallelSettings(**settings), accumulate, recompute, EVEN)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "accumulate"), [("hmoe", 1), ("hmoe", 4), ("dense", 4), ("peer_million", 1)])
def test_one_process_holds_what_its_estimate_says(name: str, accumulate: int):
    recipe = load_recipe(RECIPES / f"{name}.yaml", [f"train.accumulate={accumulate}"])
    work = workload(recipe)
    model, settings = build_model(recipe, work.vocab_size, "meta"), build_training(recipe)[0]
    alone = estimate_memory(model, work.vocab_size, work.seq_len, settings)
    parts = spread(work, 1, accumulate).memory
    assert sum(parts.values()) - parts["allowance"] == pytest.approx(alone.tensors, rel=0.03)


def test_every_parameter_is_counted_once():
    for name in ("hmoe", "deepseek_v3", "memory_plus", "peer_million", "multi_head"):
        work = planned(name)
        model = build_model(load_recipe(RECIPES / f"{name}.yaml"), work.vocab_size, "meta")
        tables = sum(each.count * each.n_rows * each.width for each in work.tables)
        assert work.dense + work.experts + tables == sum(p.numel() for p in model.parameters()), name


def test_shards_and_experts_divide_what_a_rank_holds():
    work = planned("paper/hmoe-3b-interpreted")
    state = [spread(work, world).state_bytes() for world in (1, 2, 8)]
    assert state == [pytest.approx(12 * (work.dense + work.experts) / world) for world in (1, 2, 8)]
    alone = spread(work, 8, experts=4)
    assert alone.state_bytes() == pytest.approx(12 * (work.dense / 8 + work.experts / 4))
    copies = spread(work, 8, sharding="hybrid", replicas=4)
    assert copies.state_bytes() == pytest.approx(state[1]) and copies.shards == 2


def test_messages_are_those_of_the_settings():
    work = planned("paper/hmoe-3b-interpreted")
    assert StepTime(spread(work, 1)).sent == {}
    full, hybrid = spread(work, 8), spread(work, 8, sharding="hybrid", replicas=2)
    assert {*StepTime(full).sent} == {"gathered weights", "reduced gradients"}
    assert {*StepTime(hybrid).sent} == {*StepTime(full).sent, "gradients of copies"}
    total = work.dense + work.experts
    assert StepTime(full).sent["reduced gradients"] == pytest.approx(4 * total * 7 / 8)
    twice, once = (StepTime(spread(work, 8, reshard=keep)).sent["gathered weights"] for keep in (True, False))
    assert once == pytest.approx(2 * total * 7 / 8) and twice / once == pytest.approx(2, rel=0.1)
    exchanged = StepTime(spread(work, 8, experts=8)).sent
    assert exchanged["exchange of rows"] > 0 and "experts' gradients" in exchanged


def test_tables_travel_as_rows_or_columns_and_never_whole():
    work = planned("peer_million")
    for tables in ("rows", "columns"):
        sent = StepTime(spread(work, 4, tables=tables)).sent
        assert 0 < sent["rows of tables"] < work.table_bytes / 100
        assert sent["query statistics"] > 0
    assert spread(work, 4).memory["tables"] < spread(work, 1).memory["tables"] / 3.5


def test_the_fastest_that_fits_comes_first():
    found = search(planned("paper/hmoe-0.4b", "train.accumulate=16"), EIGHT, 8)
    times = [StepTime(each).total for each in found.fitting]
    assert times == sorted(times) and all(fits(each) for each in found.fitting)
    assert not any(fits(each) for each in found.too_large) and found.too_large
    assert len({mesh(each) for each in found.best(5)}) == 5
    assert found.asked is not None and not fits(found.asked)


def test_what_is_too_large_for_one_rank_fits_many():
    work = planned("paper/hmoe-3b-interpreted")
    assert not search(work, EIGHT, 2).fitting
    assert search(work, replace(H200, memory=24e9), 64).fitting


def test_a_slow_network_keeps_rows_and_weights_on_the_host():
    work = planned("paper/hmoe-3b-interpreted")
    slow = search(work, replace(H200, network=1e8), 16).best(1)[0]
    assert slow.copies > 1 and slow.shards <= H200.per_host and slow.experts == 1


def test_experts_that_share_weights_stay_together():
    found = search(planned("mpoe"), H200, 4)
    assert "cannot be spread" in found.refused["experts"]
    assert {each.experts for each in found.fitting} == {1}


@pytest.mark.parametrize(("world", "way_out"), [(32, (32, 16)), (7, (21, 4)), (10**9, (10**9, 16))])
def test_ranks_that_cannot_share_a_step_equally_are_refused(world: int, way_out: tuple[int, int]):
    found = search(planned("hmoe"), H200, world)
    assert not found.fitting and not found.too_large and "batch_size=16 sequences" in found.refused["ranks"]
    assert "train.batch_size={}, which changes what is learned, or --gpus {}".format(*way_out) in found.refused["ranks"]


def test_what_is_proposed_can_be_trained():
    """Every rank has as many sequences in every micro-batch (`train.loop.check_shares`)."""
    work = planned("hmoe", "train.batch_size=24")
    found = search(work, H200, 4)
    assert {each.accumulate for each in found.fitting} == {1, 2, 3, 6}
    assert all(each.micro_batch * each.accumulate * 4 == 24 for each in found.fitting)
    uneven = search(planned("hmoe", "train.batch_size=24", "train.accumulate=4"), H200, 4)
    assert uneven.asked is None and "accumulate=4 micro-batches cannot be shared" in uneven.refused["recipe"]


def test_settings_of_the_recipe_that_do_not_divide_the_ranks_are_named():
    found = search(planned("hmoe", "parallel={experts: 3}"), H200, 4)
    assert found.asked is None and "experts=3" in found.refused["recipe"]


def test_what_is_to_be_pasted_is_a_recipe(tmp_path: Path):
    found = search(planned("hmoe"), H200, 4).best(1)[0]
    (tmp_path / "planned.yaml").write_text(f"extends: {RECIPES / 'base' / 'tiny.yaml'}\n{to_paste(found)}")
    again = build_training(load_recipe(tmp_path / "planned.yaml"))[0]
    assert again.parallel == found.settings
    assert (again.accumulate, again.recompute) == (found.accumulate, found.recompute)
    assert set(parse_yaml(to_paste(spread(planned("hmoe"), 1)), "here")) == {"train"}


def test_a_budget_takes_the_steps_it_pays_for():
    for budget in ("{steps: 100}", f"{{tokens: {100 * 16 * 128}}}"):
        each = spread(planned("hmoe", f"train.budget={budget}"), 1)
        assert days(each) == pytest.approx(100 * StepTime(each).total / 86_400)


def test_weights_that_do_not_learn_cost_no_gradient_of_theirs():
    work = planned("smola")
    assert work.frozen > 0 and 2 * work.token_flops < work.training_flops < 3 * work.token_flops
    assert planned("hmoe").training_flops == pytest.approx(3 * planned("hmoe").token_flops)
    updates = replace(H200, memory_bandwidth=1.0)
    some, every = (
        StepTime(Spread(one, updates, 1, ParallelSettings(), 1, False, EVEN)).optimizer
        for one in (work, replace(work, frozen=0))
    )
    assert some == pytest.approx(every * (1 - work.frozen / (work.dense + work.experts)))


def test_a_vocabulary_that_only_files_know_is_asked_for():
    with pytest.raises(RecipeError, match="--vocab"):
        planned("hmoe", "data.tokenizer={kind: file, path: somewhere.json}")


def test_divisions_of_ranks():
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(16) == [1, 2, 4, 8, 16] and divisors(1) == [1]
    assert list(shardings_of(1)) == [("full", 1)]
    assert list(shardings_of(4)) == [("full", 1), ("hybrid", 2), ("none", 1)]


def test_figures_are_json():
    from moestro.plan.report import as_figures

    work = planned("hmoe")
    assert json.loads(json.dumps(as_figures(work, "H200", 4, search(work, H200, 4))))["ranks"] == 4
