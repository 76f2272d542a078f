"""Batches: a pure function of (step, batch size, seed), every token a target once, every byte counted once."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.data import IGNORE, Batch, ByteTokenizer, Dataset, JsonlSource, TokenData
from moestro.data.batches import epoch_order

SEQ_LEN = 24


def build(stories: Path, cache: Path) -> Dataset:
    return TokenData(JsonlSource(stories), ByteTokenizer(), SEQ_LEN, 0.2, cache_dir=cache).prepare(progress=False)


@pytest.fixture
def dataset(stories: Path, tmp_path: Path) -> Dataset:
    return build(stories, tmp_path / "cache")


def stream(dataset: Dataset, split: str) -> np.ndarray:
    return np.fromfile(dataset.folder / f"{split}.bin", np.uint16).astype(np.int64)


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "documents", "n_bytes")
    )


def test_an_epoch_visits_every_window_once(dataset: Dataset):
    n_windows = dataset.n_train_tokens // SEQ_LEN
    tokens = stream(dataset, "train")
    wanted = sorted(tuple(tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1]) for i in range(n_windows))
    orders = []
    for epoch in range(2):
        rows = [dataset.train_batch(epoch * n_windows + i, 1, seed=3) for i in range(n_windows)]
        found = [(*row.tokens[0].tolist(), int(row.targets[0, -1])) for row in rows]
        assert sorted(found) == wanted
        orders.append(found)
    assert orders[0] != orders[1]


def test_batches_are_consecutive_samples_across_epochs(dataset: Dataset):
    n_windows = dataset.n_train_tokens // SEQ_LEN
    batch_size = 9
    assert n_windows % batch_size
    for step in range(2 * n_windows // batch_size + 1):
        batch = dataset.train_batch(step, batch_size, seed=0)
        singles = [dataset.train_batch(step * batch_size + j, 1, seed=0) for j in range(batch_size)]
        assert torch.equal(batch.tokens, torch.cat([single.tokens for single in singles]))


def test_resumed_anywhere_it_goes_on_exactly(stories: Path, tmp_path: Path):
    whole = [build(stories, tmp_path).train_batch(step, 5, seed=1) for step in range(200)]
    for start in (0, 1, 77, 150):
        epoch_order.cache_clear()
        again = build(stories, tmp_path)
        assert all(same(again.train_batch(step, 5, seed=1), whole[step]) for step in range(start, 200))


@settings(max_examples=30, deadline=None)
@given(calls=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=6))
def test_what_was_asked_before_changes_nothing(tmp_path_factory: pytest.TempPathFactory, calls):
    cache = tmp_path_factory.getbasetemp() / "pure"
    cache.mkdir(exist_ok=True)
    text = cache / "a.jsonl"
    text.write_text("".join(f'{{"text": "a text with the number {i * i}"}}\n' for i in range(60)))
    dataset = build(text, cache / "cache")
    first = [dataset.train_batch(*call) for call in calls]
    epoch_order.cache_clear()
    assert all(same(dataset.train_batch(*call), batch) for call, batch in zip(calls[::-1], first[::-1], strict=True))


def test_seeds_give_other_orders_and_the_order_is_fixed_for_ever():
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert sorted(epoch_order(1, 2, 50)) == list(range(50))


def test_targets_documents_and_bytes_of_packed_documents(dataset: Dataset):
    tokens = stream(dataset, "train")
    for step in range(40):
        batch = dataset.train_batch(step, 4, seed=0)
        for row in range(4):
            window = [*batch.tokens[row].tolist(), int(batch.targets[row, -1])]
            assert batch.targets[row].tolist() == window[1:]
            opened = 0
            for place, token in enumerate(window[:-1]):
                # eos opens the document that follows it
                opened += token == 256
                assert batch.documents[row, place] == opened
                assert batch.n_bytes[row, place] == (window[place + 1] != 256)
    assert (tokens == 256).sum() > 100


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_validation_predicts_every_token_and_byte_once(dataset: Dataset, batch_size: int):
    batches = list(dataset.val_batches(batch_size))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert targets[targets != IGNORE].tolist() == stream(dataset, "val")[1:].tolist()
    assert (targets != IGNORE).sum() == dataset.n_val_tokens
    assert sum(int(batch.n_bytes.sum()) for batch in batches) == dataset.n_val_bytes
    padded = batches[-1]
    assert not padded.keep.all() and padded.keep.sum() > 0
    assert (padded.n_bytes[~padded.keep] == 0).all()
    assert (padded.tokens[~padded.keep][1:] == 256).all()


def test_part_of_the_validation_is_spread_over_it(dataset: Dataset):
    every = torch.cat([batch.tokens for batch in dataset.val_batches(4)])
    some = torch.cat([batch.tokens for batch in dataset.val_batches(4, max_tokens=10 * SEQ_LEN)])
    assert len(some) == 10 and torch.equal(some[0], every[0]) and torch.equal(some[-1], every[-1])
    least = list(dataset.val_batches(4, max_tokens=1))
    assert len(least) == 1 and len(least[0].tokens) == 1
    assert sum(len(batch.tokens) for batch in dataset.val_batches(4, max_tokens=10**9)) == len(every)


def test_rows_are_micro_batches(dataset: Dataset):
    batch = dataset.train_batch(5, 6, seed=0)
    parts = [batch.rows(start, start + 2) for start in (0, 2, 4)]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert same(batch.to("cpu"), batch)
    fields = (batch.tokens, batch.targets, batch.documents, batch.n_bytes)
    assert all(field.dtype == torch.int64 and field.shape == (6, SEQ_LEN) for field in fields)


def test_impossible_requests_are_refused(dataset: Dataset):
    with pytest.raises(ValueError, match="step=-1; allowed: at least 0"):
        dataset.train_batch(-1, 1, 0)
    with pytest.raises(ValueError, match="batch_size=0; allowed: at least 1"):
        dataset.train_batch(0, 0, 0)
    with pytest.raises(ValueError, match="seed=-1; allowed: at least 0"):
        dataset.train_batch(0, 1, -1)
    with pytest.raises(ValueError, match="batch_size=0; allowed: at least 1"):
        dataset.val_batches(0)
    with pytest.raises(ValueError, match=r"held-out document 9999; there are \d+, counted from 0"):
        dataset.val_document(9999)


def test_a_batch_costs_far_less_than_a_step(tmp_path: Path):
    """In time of the processor: a busy machine changes nothing."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{i} {"words " * 500}"}}\n' for i in range(1000)))
    dataset = TokenData(JsonlSource(path), ByteTokenizer(), 256, cache_dir=tmp_path).prepare(progress=False)
    dataset.train_batch(0, 16, 0)
    times = []
    for step in range(100):
        start = time.thread_time()
        dataset.train_batch(step, 16, 0)
        times.append(time.thread_time() - start)
    assert sorted(times)[50] < 1e-3
