"""Tables and their optimizer state in mapped files: the same training to the bit, in less memory than they take."""

import subprocess
import sys

import pytest
import yaml

from moestro.ops.tables import tables_in
from moestro.recipe.build import run_training
from moestro.recipe.load import load_recipe
from moestro.train import OptimSettings, train
from tests.conftest import ROOT
from tests.train.test_resume import Killed, Mortal, require_equal_runs
from tests.train.test_row_training import model_with_rows
from tests.train.tiny import Counting, tiny_settings


def settings(folder=None):
    optim = OptimSettings(lr=0.01, fused_rows=True)
    return tiny_settings(6, save_every=2, keep_last=1, optim=optim, table_precision="bf16", table_folder=folder)


def trained(run_dir, folder, data) -> None:
    with tables_in(folder):
        train(model_with_rows(), data, settings(folder), [], [], run_dir)


def test_training_in_files_is_training_in_memory_to_the_bit(tmp_path):
    """Killed in files, continued in memory, and the other way round."""
    trained(tmp_path / "memory", None, Counting())
    for first, second in ((None, None), ("a", "b"), ("a", None), (None, "b")):
        run_dir = tmp_path / f"{first}-{second}"
        with pytest.raises(Killed):
            trained(run_dir, first and tmp_path / first, Mortal(3))
        trained(run_dir, second and tmp_path / second, Counting())
        require_equal_runs(run_dir, tmp_path / "memory", 6)
    assert list((tmp_path / "a").iterdir()) == list((tmp_path / "b").iterdir()) == []


def test_a_recipe_names_the_folder_and_how_tables_train(tmp_path, small_data):
    """Table settings as in a recipe: their own learning rate, precision, folder, fused updates."""
    overrides = [
        *small_data,
        *("model.d_model=32", "model.n_layers=3", "model.attention.n_heads=2", "data.seq_len=32", "train.batch_size=4"),
        "model.layers={2: {kind: moe, router: {kind: product_key, heads: 2, top_k: 4, d_key: 16}, "
        "branches: [{kind: singleton, n_experts: 1024, sparse_gradients: true}]}}",
        "optim.groups=[{pattern: '(up|down)$', lr_scale: 4, weight_decay: 0}]",
        *("optim.fused_rows=true", "train.table_precision=bf16", "train.table_folder=tables"),
        *("train.budget={steps: 2}", "train.eval_tokens=64"),
    ]
    recipe = load_recipe(ROOT / "recipes" / "peer.yaml", overrides)
    result = run_training(recipe, tmp_path / "run", show_preparation=False)
    assert result["step"] == 2 and list((tmp_path / "run" / "tables").iterdir()) == []
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["train"]["table_folder"] == "tables" and written["optim"]["fused_rows"] is True


LARGER_THAN_MEMORY = """
import resource, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from moestro.layers import MoELayer
from moestro.ops.tables import tables_in
from moestro.routers import ProductKeyRouter
from moestro.experts import SingletonBank
from moestro.train import OptimSettings
from moestro.train.optim import build_optimizer
from moestro.formats.writer import write_tensors
from moestro.train.tensors import optimizer_tensors

torch.set_num_threads(1)
n, d = 2**18, 64  # 64 MiB a table, 6 of them
def layer():
    router = ProductKeyRouter(d, n, heads=2, top_k=4, d_key=16, query_norm="rms")
    return MoELayer(router, [SingletonBank(d, n, sparse_gradients=True)])
MoELayer(ProductKeyRouter(d, 64, heads=2, top_k=4, d_key=16), [SingletonBank(d, 64)])(torch.randn(4, d))
private = lambda: 1024 * sum(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (private() + 2**27, resource.RLIM_INFINITY))
with tables_in(Path(sys.argv[1])) if len(sys.argv) > 1 else nullcontext():
    model = layer()
    optimizer = build_optimizer(model, OptimSettings(fused_rows=True))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(64, d))[0].square().sum().backward()
        optimizer.step()
    if len(sys.argv) > 1:
        write_tensors(Path(sys.argv[1]) / "checkpoint", optimizer_tensors(model, optimizer))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on private memory")
def test_tables_larger_than_memory_train_in_files(tmp_path):
    """In a process that may take 128 MiB more of private memory: 384 MiB of tables and moments, and a checkpoint."""
    in_memory, in_files = (
        subprocess.run([sys.executable, "-c", LARGER_THAN_MEMORY, *where], capture_output=True, text=True, cwd=ROOT)
        for where in ([], [str(tmp_path)])
    )
    # oneDNN, too, fails without memory, in its own words
    assert in_memory.returncode != 0
    assert any(words in in_memory.stderr for words in ("memory", "could not create a primitive"))
    assert in_files.returncode == 0, in_files.stderr
    assert (tmp_path / "checkpoint").stat().st_size > 2**27
