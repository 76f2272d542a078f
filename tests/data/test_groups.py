"""Groups of text: from the recipe's sources to every token of a batch, and to the experts that serve one group."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.data import ByteTokenizer, Dataset, GroupedSource, JsonlSource, TextSource, TokenData
from moestro.data.shards import read_meta
from tests.data.build import build, only

FARM = [f"The cow number {i} says moo. " for i in range(60)]
YARD = [f"<ship {i}/> " for i in range(90)]


def lines(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "domain": kind}) + "\n" for text, kind in rows))
    return path


@pytest.fixture
def sources(tmp_path: Path) -> GroupedSource:
    both = ((FARM, "farm"), (YARD, "yard"))
    files = [lines(tmp_path / f"{kind}.jsonl", [(text, kind) for text in texts]) for texts, kind in both]
    return GroupedSource([JsonlSource(file) for file in files])


def prepared(source, tmp_path: Path, **settings) -> Dataset:
    settings = {"val_fraction": 0.3, **settings}
    return TokenData(source, ByteTokenizer(), 16, cache_dir=tmp_path / "cache", **settings).prepare(progress=False)


def group_of_text(tokens: torch.Tensor, documents: torch.Tensor) -> list[set[int]]:
    """For every whole document of a row what its characters say: 0 where it speaks of cows, 1 where of ships."""
    said = []
    for number in documents.unique():
        text = bytes(t for t in tokens[documents == number].tolist() if t < 256).decode()
        said.append({int("<" in text or "/" in text)} if set("<>/cow") & set(text) else {0, 1})
    return said


def test_every_token_knows_the_group_of_its_document(sources, tmp_path):
    dataset = prepared(sources, tmp_path)
    seen = set()
    for batch in (dataset.train_batch(3, 4, seed=0), *dataset.val_batches(4)):
        assert batch.groups.shape == batch.tokens.shape and batch.groups.dtype == torch.int64
        for tokens, documents, groups, keep in zip(
            batch.tokens, batch.documents, batch.groups, batch.keep, strict=True
        ):
            for number, said in zip(
                documents[keep].unique(), group_of_text(tokens[keep], documents[keep]), strict=True
            ):
                (group,) = set(groups[keep][documents[keep] == number].tolist())
                assert group in said
                seen.add(group)
    assert seen == {0, 1}
    whole = dataset.train_batch(0, 4, seed=1)
    assert torch.equal(whole.rows(1, 3).groups, whole.groups[1:3]) and whole.to("cpu").groups is not None


def test_a_record_s_field_says_its_group(tmp_path):
    file = lines(tmp_path / "mixed.jsonl", [(FARM[0], "farm"), (YARD[0], "yard"), (FARM[1], "farm")])
    source = JsonlSource(file, group_field="domain", groups=["yard", "farm"])
    assert [document.group for document in source.documents()] == [1, 0, 1]
    plain, other = JsonlSource(file), JsonlSource(file, group_field="domain", groups=["farm", "yard"])
    assert len({each.fingerprint() for each in (plain, source, other)}) == 3
    with pytest.raises(ValueError, match=r"jsonl:2: field 'domain' holds 'yard', allowed \(groups\): 'farm'"):
        list(JsonlSource(file, group_field="domain", groups=["farm"]).documents())
    for wrong in ({"group_field": "domain"}, {"groups": ["a"]}, {"group_field": "domain", "groups": ["a", "a"]}):
        with pytest.raises(ValueError, match="allowed: both or neither, with different groups"):
            JsonlSource(file, **wrong)


def test_a_limit_takes_the_first_documents_of_each_source(sources):
    limited = GroupedSource(sources.sources, most_bytes=100)
    found = list(limited.documents())
    for group, texts in enumerate((FARM, YARD)):
        own = [document.text for document in found if document.group == group]
        assert own == texts[: len(own)] and sum(map(len, own)) <= 100 < sum(map(len, texts[: len(own) + 1]))
    assert limited.fingerprint() != sources.fingerprint()
    assert [d.done for d in sources.documents()] == sorted(d.done for d in sources.documents())
    with pytest.raises(ValueError, match=r"most_bytes=5: .*farm\.jsonl:1 has 27, .*allowed: at least 27"):
        list(GroupedSource(sources.sources, most_bytes=5).documents())
    with pytest.raises(ValueError, match=r"sources=\[\], allowed: at least one"):
        GroupedSource([])
    with pytest.raises(ValueError, match="most_bytes=0, allowed: at least 1"):
        GroupedSource(sources.sources, most_bytes=0)


def test_groups_are_part_of_the_fingerprint_and_checked(sources, tmp_path):
    dataset = prepared(sources, tmp_path)
    turned = prepared(GroupedSource(sources.sources[::-1]), tmp_path)
    assert dataset.fingerprint != turned.fingerprint
    folder = dataset.folder
    assert np.fromfile(folder / "train.groups", np.int64).tolist() == sorted(np.fromfile(folder / "train.groups", int))
    (folder / "val.groups").write_bytes(b"\1" + (folder / "val.groups").read_bytes()[1:])
    with pytest.raises(ValueError, match=r"val\.groups: damaged"):
        Dataset(folder, 16)


def test_a_corpus_without_groups_is_what_it_was(stories, tmp_path):
    """Shards, fingerprints and batches of before."""
    dataset = build(stories, tmp_path / "cache")
    assert dataset.train_batch(0, 2, 0).groups is None
    assert not list(only(tmp_path / "cache" / "tokens").glob("*.groups"))
    meta = read_meta(dataset.folder)["splits"]
    assert meta["train"]["groups_sha256"] is None
    del meta["train"]["groups_sha256"], meta["val"]["groups_sha256"]


def test_half_of_a_corpus_with_groups_is_refused(sources, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("no group\n\nat all\n")
    text = TextSource(other, split="blank-line")
    with pytest.raises(ValueError, match="only one kind has groups; allowed: both"):
        prepared(sources, tmp_path, val_source=text)

    class Some(JsonlSource):
        def documents(self):
            for number, document in enumerate(super().documents()):
                yield document._replace(group=number % 2 or None)

    with pytest.raises(ValueError, match="some documents are of a group and some of none; allowed: all or none"):
        prepared(Some(sources.sources[0].paths), tmp_path)
