"""Tile sizes found by measuring: kept on disk, found again for layers of the same kind, never measured unasked."""

import json

import pytest
import torch

from tests.ops.triton_cases import why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
SHAPE = 131_072, 64, 2048, 1024, torch.bfloat16


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """The module as on a GPU, with a cache of its own."""
    from moestro.ops import triton_ffn_plan, triton_ffn_tuning

    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path))
    for module in (triton_ffn_plan, triton_ffn_tuning):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(triton_ffn_tuning, "_name", lambda device: "a GPU")
    triton_ffn_tuning._known.cache_clear()
    yield triton_ffn_tuning
    triton_ffn_tuning._known.cache_clear()


def used(tuning, *shape):
    return tuning.blocks_for(*(shape or SHAPE), torch.device("cpu"))


def test_the_best_is_kept_and_found_again(tuning, tmp_path):
    default = used(tuning)
    among = tuning.candidates(default)
    assert among[0] == default and len(set(among)) == len(among) >= 5
    tried = []

    def timed(run):
        tried.append(used(tuning))
        run()
        return 1.0 if tried[-1] == among[3] else 2.0

    calls = []
    assert tuning.tune(tuning.kind(*SHAPE, "a GPU"), lambda: calls.append(1), among, timed) == among[3]
    assert tried == among and len(calls) == len(among)
    # later processes read the file; layers of this kind run with it, others do not
    tuning._known.cache_clear()
    assert used(tuning) == among[3]
    assert used(tuning, 130_000, 64, 2048, 600, torch.bfloat16) == among[3]
    for other in ((131_072, 64, 2048, 1024, torch.float16), (8192, 64, 2048, 1024, torch.bfloat16)):
        assert used(tuning, *other) == tuning.choose_blocks(*other)
    assert [path.name for path in tmp_path.iterdir()] == ["triton_ffn.json"]


def test_a_second_kind_does_not_forget_the_first(tuning):
    first, second = tuning.kind(*SHAPE, "a GPU"), tuning.kind(64, 64, 2048, 1024, torch.bfloat16, "a GPU")
    among = tuning.candidates(used(tuning))
    tuning.tune(first, lambda: None, among[1:2], lambda run: 1.0)
    tuning.tune(second, lambda: None, among[2:3], lambda run: 1.0)
    assert used(tuning) == among[1] and used(tuning, 64, *SHAPE[1:]) == among[2]


def test_sizes_without_room_are_passed_over(tuning):
    from triton.runtime.errors import OutOfResources

    among = tuning.candidates(used(tuning))[:3]

    def timed(run):
        if used(tuning) != among[1]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    assert tuning.tune(tuning.kind(*SHAPE, "a GPU"), lambda: None, among, timed) == among[1]
    with pytest.raises(RuntimeError, match="none of 1 tile sizes runs on a GPU"):
        tuning.tune(tuning.kind(*SHAPE, "a GPU"), lambda: None, among[:1], timed)


def test_a_file_that_is_none_of_ours_is_named(tuning, tmp_path):
    for content in ("no json", json.dumps([{"kind": {}, "blocks": {}}])):
        (tmp_path / "triton_ffn.json").write_text(content)
        tuning._known.cache_clear()
        with pytest.raises(ValueError, match=r"triton_ffn.json does not hold tile sizes .*; delete it"):
            used(tuning)


def test_without_a_file_the_rule_decides(tuning):
    assert used(tuning) == tuning.choose_blocks(*SHAPE)


def test_the_interpreter_reads_no_file(tuning, tmp_path, monkeypatch):
    (tmp_path / "triton_ffn.json").write_text("no json")
    monkeypatch.setattr(tuning, "interpreted", lambda: True)
    assert used(tuning) == tuning.choose_blocks(*SHAPE)
