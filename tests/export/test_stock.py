"""Models that a stock architecture computes, and refusals that name what none has."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralForCausalLM, Qwen2MoeForCausalLM

from moestro.export import open_model, stock
from moestro.export.folder import Choices, ExportError, export_run
from moestro.export.opening import configured
from moestro.recipe.load import load_recipe
from tests.conftest import ROOT
from tests.export.conftest import some_tokens

Runs = Callable[..., Path]
STOCK = Choices(layout="stock")
SHARED = "model.ffn.branches=[{kind: ffn, widths: {kind: equal, n_experts: 8, total: 512}}, {kind: shared, width: 24}]"
MIXED = ["model.layers.1={kind: dense, width: 40}", "model.ffn.router.select.renormalize=false"]
ODD = ["model.attention={n_heads: 4, n_kv_heads: 2, head_dim: 16, rope_theta: 500}", "model.norm_eps=1e-3"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "overrides", "architecture"),
    [
        ("dense", [*ODD, "model.tie_embeddings=true"], LlamaForCausalLM),
        ("moe", ODD, MixtralForCausalLM),
        ("moe", [*MIXED, *ODD], Qwen2MoeForCausalLM),
        ("moe", [SHARED], Qwen2MoeForCausalLM),
    ],
)
def test_logits_are_the_runs(
    run_of: Runs, tmp_path: Path, recipe: str, overrides: list[str], architecture: type
) -> None:
    """Rotary layout, grouped keys, norm eps, tied embeddings, gates that sum to 1 and raw ones, a shared expert."""
    run = run_of(recipe, *overrides)
    done = export_run(run, tmp_path / "out", STOCK)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is architecture and done.architecture == architecture.__name__
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = some_tokens(2, 24)
    expected = open_model(run).model(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=1e-4)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))


@torch.no_grad()
def test_in_bfloat16(run_of: Runs, tmp_path: Path) -> None:
    export_run(run_of("moe"), tmp_path / "out", Choices(layout="stock", dtype="bfloat16", shard_bytes=1_000_000))
    opened = open_model(tmp_path / "out")
    assert {p.dtype for p in opened.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("hmoe", [], "block 0: experts of widths 36 to 92"),
        ("peer", [], "block 2: ProductKeyRouter"),
        ("dynmoe", [], "block 0: CosineScore"),
        ("stratified", [], "StratifiedLayer"),
        ("smola", [], "adapters"),
        ("dynamic_routing", [], "TopP, no fixed number"),
        ("mutual_distillation", ["model.ffn.branches.0.activation=gelu"], "FFNBank with activation gelu"),
        ("dense", ["model.ffn.glu=false"], "SharedExpert|DenseFFN with activation silu, glu False"),
        ("dense", ["model.layers.1={kind: dense, width: 8}"], r"dense layers of widths \[8, 512\]"),
    ],
)
def test_what_no_stock_architecture_has_is_named(recipe: str, overrides: list[str], message: str) -> None:
    config = configured(load_recipe(ROOT / "recipes" / f"{recipe}.yaml", overrides), 257)
    with pytest.raises(ExportError, match=f"no stock architecture has .*({message}).*--format moestro"):
        stock.stock_model(config, None)


def test_a_folder_that_computes_something_else_never_appears(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "_columns", lambda w, first, last: w[first:last].T * 1.01)
    with pytest.raises(ExportError, match="logits of the stock architecture differ"):
        export_run(run_of("moe"), tmp_path / "out", STOCK)
    assert not (tmp_path / "out").exists()
