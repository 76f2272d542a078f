"""Our own models: experts of unequal widths out of slots."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moestro.export import open_model
from moestro.offload.codecs import CODECS
from moestro.offload.files import OffloadError
from moestro.offload.running import generate
from moestro.offload.scorer import Precision, Thresholds
from moestro.offload.session import Plan, Session
from moestro.recipe.build import run_training
from moestro.recipe.load import load_recipe
from tests.conftest import ROOT
from tests.tolerances import FLOAT32


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, small_data: list[str]) -> Callable[..., Path]:
    """The folder of a recipe's run of two steps."""

    def run(name: str, *overrides: str) -> Path:
        path = tmp_path_factory.mktemp("runs") / name
        steps = ["train.budget.steps=2", "train.eval_tokens=256", *overrides]
        run_training(
            load_recipe(ROOT / "recipes" / f"{name}.yaml", [*small_data, *steps]), path, show_preparation=False
        )
        return path

    return run


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))


def test_experts_of_unequal_widths(run_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_of("hmoe")
    model, tokenizer = open_model(folder)
    with torch.no_grad():
        want = model(tokens(20)).logits
    continued = model.generate(tokens(5), max_new_tokens=6, do_sample=False)[0, 5:]
    with Session(folder, Plan(1 << 40)) as session:
        sizes = [[stored.blob.size for stored in layer] for layer in session.host.experts]
        least = session.resident + 2 * max(max(layer) for layer in sizes)
    # widths 36 to 92 and such: no two experts of a layer are alike
    assert len(set(sizes[0])) == len(sizes[0]) == 8
    with Session(folder, Plan(least + 3000, depth=1), poison=True) as session:
        with session.running():
            assert torch.allclose(session.model(tokens(20)).logits, want, **FLOAT32)
        with session.recording(tmp_path / "t.jsonl"):
            assert torch.equal(generate(session, tokens(5)[0], 6).tokens, continued)
        used = session.memory.peak - max(max(layer) for layer in sizes)
        assert used <= session.capacity[Precision.HIGH] and session.loader.counts.misses_high > 8
        assert session.host.tokenizer().encode("a") == tokenizer.encode("a")
        assert not any(p.is_meta for n, p in session.model.named_parameters() if ".w_" not in n)
    plan = Plan(least + 100_000, CODECS["int8"], 0.3, Thresholds(0.3, 1.0))
    with Session(folder, plan, store=tmp_path / "low") as session:
        calibration = session.calibrate(tokens(60)[0])
    assert set(calibration.importance((0, 0))) == {"w_in"} and calibration.n_experts == len(sizes) * 8
    with Session(folder, plan, store=tmp_path / "low", calibration=calibration) as session, session.running():
        assert session.low is not None and session.low.calibrated
        mixed = session.model(tokens(1)).logits
        assert session.loader.counts.misses_low > 0
        assert torch.allclose(mixed, want[:, :1], atol=0.05) and not torch.equal(mixed, want[:, :1])


@pytest.mark.slow
def test_what_cannot_be_offloaded_is_refused(run_of: Callable[..., Path]) -> None:
    with pytest.raises(OffloadError, match="no mixture of this run"):
        Session(run_of("peer"), Plan(1 << 40))
    with Session(run_of("dynamic_routing"), Plan(1 << 40)) as session, session.running():
        with pytest.raises(OffloadError, match="a fixed number of experts"):
            session.model(tokens(4))
