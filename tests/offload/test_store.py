"""LOW copies on disk: built whole, resumed, verified; what happens when files change or are taken away."""

import json
from pathlib import Path

import pytest
import torch

from moestro.formats import Checkpoint
from moestro.offload import store as store_module
from moestro.offload.blobs import Experts
from moestro.offload.calibration import Calibration
from moestro.offload.codecs import CODECS
from moestro.offload.files import Files, OffloadError
from moestro.offload.folders import experts_in
from moestro.offload.scorer import Thresholds
from moestro.offload.session import Plan, Session
from moestro.offload.store import open_store, read_expert, verify_store
from tests.formats.folders import mixtral_config, mixtral_tensors, write_folder
from tests.hf.families import some_tokens
from tests.offload.models import memory_for, tiny_folder


@pytest.fixture
def high(tmp_path: Path) -> Experts:
    return experts_in(Checkpoint(write_folder(tmp_path / "model", mixtral_tensors(), mixtral_config(), n_shards=3)))


def test_experts_are_found_by_tensor_not_by_shard(high: Experts) -> None:
    want, files = mixtral_tensors(), Files()
    assert [len(layer) for layer in high] == [4, 4]
    for layer, experts in enumerate(high):
        for expert, stored in enumerate(experts):
            stem = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            found = stored.blob.read(read_expert(files, stored))
            assert torch.equal(found["gate_up_proj"], torch.cat([want[f"{stem}.w1.weight"], want[f"{stem}.w3.weight"]]))
            assert torch.equal(found["down_proj"], want[f"{stem}.w2.weight"])
    assert len({extent.file for stored in high[0] for extent in stored.extents}) > 1


def low_copies(low: Experts) -> list:
    files = Files()
    return [{n: t.clone() for n, t in s.blob.read(read_expert(files, s)).items()} for layer in low for s in layer]


def test_a_store_is_built_once_and_read_again(high: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    first = open_store(tmp_path / "low", high, CODECS["int4"], progress=told.append)
    assert told == ["int4 copies of layer 1 of 2", "int4 copies of layer 2 of 2"]
    monkeypatch.setattr(store_module, "_build", None)
    again = open_store(tmp_path / "low", high, CODECS["int4"])
    for a, b in zip(low_copies(first.experts), low_copies(again.experts), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert again.errors == first.errors and 0 < max(map(max, first.errors)) < 0.3
    verify_store(tmp_path / "low")


def test_building_goes_on_where_it_stopped(high: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, build = tmp_path / "low", store_module._build
    whole = low_copies(open_store(tmp_path / "other", high, CODECS["int2"]).experts)

    def killed(folder, layer, *rest):
        if layer == 1:
            (folder / ".writing-layer-001.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt
        build(folder, layer, *rest)

    monkeypatch.setattr(store_module, "_build", killed)
    with pytest.raises(KeyboardInterrupt):
        open_store(folder, high, CODECS["int2"])
    before = (folder / "layer-000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(store_module, "_build", build)
    found = low_copies(open_store(folder, high, CODECS["int2"]).experts)
    assert (folder / "layer-000.safetensors").stat().st_mtime_ns == before and not list(folder.glob(".writing-*"))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, whole, strict=True) for name in a)


def test_a_full_disk_leaves_nothing_half_written(
    high: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path, tensors, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "write_file", full)
        with pytest.raises(OffloadError, match="cannot be written .No space left on device.; run again"):
            open_store(tmp_path / "low", high, CODECS["int4"])
    assert [path.name for path in (tmp_path / "low").iterdir()] == ["store.json"]
    assert len(open_store(tmp_path / "low", high, CODECS["int4"]).experts) == 2


def test_copies_of_other_experts_are_refused(high: Experts, tmp_path: Path) -> None:
    open_store(tmp_path / "low", high, CODECS["int4"])
    with pytest.raises(OffloadError, match="codec 'int4', expected 'int2'"):
        open_store(tmp_path / "low", high, CODECS["int2"])
    others = write_folder(tmp_path / "others", mixtral_tensors(seed=1), mixtral_config(), n_shards=3)
    with pytest.raises(OffloadError, match="source"):
        open_store(tmp_path / "low", experts_in(Checkpoint(others)), CODECS["int4"])
    with pytest.raises(OffloadError, match="not empty and no store"):
        open_store(others, high, CODECS["int4"])
    (tmp_path / "low" / "store.json").write_text("{")
    with pytest.raises(OffloadError, match="damaged"):
        open_store(tmp_path / "low", high, CODECS["int4"])


def calibration() -> Calibration:
    found = Calibration()
    draw = torch.Generator().manual_seed(0)
    for layer in range(2):
        for expert in range(4):
            scale = torch.tensor([10.0, 0.1, 0.1, 0.1])
            found.add((layer, expert), torch.randn(9, 4, generator=draw) * scale, torch.randn(9, 6, generator=draw))
    return found


def test_a_calibration_builds_anew(high: Experts, tmp_path: Path) -> None:
    plain = open_store(tmp_path / "low", high, CODECS["int2"])
    calibrated = open_store(tmp_path / "low", high, CODECS["int2"], calibration())
    assert calibrated.calibrated and not plain.calibrated
    assert calibrated.errors != plain.errors
    assert open_store(tmp_path / "low", high, CODECS["int2"]).calibrated


def test_calibrated_copies_are_finished_with_their_calibration(high: Experts, tmp_path: Path) -> None:
    """Those of a later layer would not be calibrated, and the store would say that all are."""
    folder = tmp_path / "low"
    whole = open_store(folder, high, CODECS["int2"], calibration())
    for missing in ("layer-001.json", "layer-001.safetensors"):
        (folder / missing).unlink()
        with pytest.raises(OffloadError, match="calibrated and lacks copies of layer 2: give --calibrate"):
            open_store(folder, high, CODECS["int2"])
        first = (folder / "layer-000.json").stat().st_mtime_ns
        assert open_store(folder, high, CODECS["int2"], calibration()).errors == whole.errors
        assert (folder / "layer-000.json").stat().st_mtime_ns == first


@pytest.mark.parametrize(("name", "text"), [("store.json", "[]"), ("layer-001.json", "{"), ("layer-001.json", "{}")])
def test_what_describes_copies_is_checked(name: str, text: str, high: Experts, tmp_path: Path) -> None:
    open_store(tmp_path / "low", high, CODECS["int4"])
    (tmp_path / "low" / name).write_text(text)
    with pytest.raises(OffloadError, match=f"{name} is damaged"):
        open_store(tmp_path / "low", high, CODECS["int4"])


def test_large_errors_are_named(high: Experts, tmp_path: Path) -> None:
    warning = open_store(tmp_path / "low", high, CODECS["int2"]).warning()
    assert warning is None or "not calibrated" in warning
    large = store_module.Store(high, [[0.1, 0.5], [0.3, 0.05]], True)
    assert large.warning().startswith("2 of 4 experts are off by more than 20% in LOW, the worst by 50%")
    assert store_module.Store(high, [[0.1]], False).warning() is None


def damage(path: Path) -> None:
    """Another byte near the end, with the same size and time."""
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    import os

    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_damaged_copies_are_never_computed_with(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    plan = Plan(memory_for(folder, 3), CODECS["int4"], 0.4, Thresholds(0.0, 1.0))
    with Session(folder, plan, store=tmp_path / "low") as session, session.running():
        session.model(some_tokens())
    for path in (tmp_path / "low").glob("*.safetensors"):
        damage(path)
    with pytest.raises(OffloadError, match="missing or damaged"):
        verify_store(tmp_path / "low")
    with Session(folder, plan, store=tmp_path / "low") as session, session.running():
        with pytest.raises(OffloadError, match="expert .* are damaged; delete the store"):
            for i in range(50):
                session.model(some_tokens()[:, i % 12 : i % 12 + 1])


@pytest.mark.parametrize("fault", ["cut", "written", "deleted"])
def test_files_that_change_while_running(fault: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    file = folder / "model.safetensors"
    tokens = some_tokens()
    with Session(folder, Plan(memory_for(folder, 1)), poison=True) as session, session.running():
        want = session.model(tokens).logits
        if fault == "deleted":
            # what is open stays readable: nothing is lost
            file.unlink()
            assert torch.equal(session.model(tokens).logits, want)
            return
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if fault == "cut" else content)
        with pytest.raises(OffloadError, match="model.safetensors changed while the model was running"):
            session.model(tokens)
        # nothing half-copied is taken for an expert afterwards
        assert not session.loader.cache.pinned
        with pytest.raises(OffloadError, match="changed"):
            session.model(tokens)


def test_an_incomplete_store_says_so(high: Experts, tmp_path: Path) -> None:
    open_store(tmp_path / "low", high, CODECS["int4"])
    path = tmp_path / "low" / "layer-001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="truncated or overwritten"):
        open_store(tmp_path / "low", high, CODECS["int4"])
    facts = json.loads((tmp_path / "low" / "layer-000.json").read_text())
    assert set(facts) == {"sha256", "checksums", "errors"} and len(facts["checksums"]) == 4
