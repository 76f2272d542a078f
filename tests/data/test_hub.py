"""Hugging Face data sets as streams, tried without the network on local files through their own builders."""

import json
from pathlib import Path

import pytest

from moestro.data import ByteTokenizer, HubSource, TokenData

ROWS = [f"hub document {i} é" for i in range(100)]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(ROWS)))
    return str(path)


def texts(source: HubSource) -> list[str]:
    return [document.text for document in source.documents()]


def test_a_stream_gives_the_rows_in_order(rows: str, tmp_path: Path):
    assert texts(HubSource("json", data_files=rows)) == ROWS
    assert texts(HubSource("json", data_files={"test": rows}, split="test")) == ROWS
    assert texts(HubSource(str(tmp_path))) == ROWS
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert texts(HubSource("text", data_files=str(tmp_path / "a.txt"))) == ["one", "two"]


def test_a_stream_becomes_a_data_set(rows: str, tmp_path: Path):
    data = TokenData(HubSource("json", data_files=rows), ByteTokenizer(), 32, 0.1, cache_dir=tmp_path / "cache")
    dataset = data.prepare(progress=False)
    assert dataset.name == "json/train"
    assert dataset.n_train_bytes + dataset.n_val_bytes == sum(len(text.encode()) for text in ROWS)
    assert dataset.val_document(0) in ROWS


def test_a_stream_can_be_cut_short(rows: str):
    source = HubSource("json", data_files=rows, max_documents=7)
    documents = list(source.documents())
    assert [document.text for document in documents] == ROWS[:7] and documents[-1].done == 1
    with pytest.raises(ValueError, match="max_documents=0; allowed: at least 1"):
        HubSource("json", max_documents=0)


def test_the_fingerprint_follows_files_and_settings(rows: str):
    source = HubSource("json", data_files=rows)
    assert source.fingerprint() == HubSource("json", data_files=rows).fingerprint()
    assert source.fingerprint() != HubSource("json", data_files=rows, max_documents=7).fingerprint()
    assert source.fingerprint() != HubSource("json", data_files=rows, text_field="id").fingerprint()
    Path(rows).write_text('{"text": "other"}\n')
    assert source.fingerprint() == source.fingerprint() != HubSource("json", data_files=rows).fingerprint()


def test_what_is_wrong_is_named(rows: str):
    with pytest.raises(
        ValueError, match=r"data set 'json/train' row 1: no field 'body'; there are: text, id\. Set text"
    ):
        texts(HubSource("json", data_files=rows, text_field="body"))
    with pytest.raises(
        ValueError, match=r"data set 'json', split 'test': Bad split: test\. Available splits: \['train'\]"
    ):
        texts(HubSource("json", data_files=rows, split="test"))
    with pytest.raises(ConnectionError, match="data set 'nobody/nothing' cannot be reached: .*Offline"):
        HubSource("nobody/nothing").fingerprint()
    with pytest.raises(FileNotFoundError, match=r"data set 'json' is not there: .*gone\.jsonl"):
        HubSource("json", data_files=f"{rows}/gone.jsonl").fingerprint()


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"reading 'x' from the hub needs the package 'datasets': .*moestro\[data\]"):
        HubSource("x").fingerprint()
