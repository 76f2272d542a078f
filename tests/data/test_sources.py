"""Sources give the documents that are there, whatever the packing, and say what is wrong and where."""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from moestro.data import JsonlSource, ParquetSource, StdlibSource, TextSource, source_for
from moestro.data.corpus import Corpus, is_held_out

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
ARTICLES = " \n = First = \n \n One , two .\n = = Part = = \n Three .\n = Second = \n Four : é .\n"


def texts(source) -> list[str]:
    return [document.text for document in source.documents()]


@pytest.mark.parametrize("packing", PACK)
def test_packed_text_reads_as_plain_text(tmp_path: Path, packing: str):
    text = "".join(f"line {i} é\n" for i in range(30_000))
    (tmp_path / f"a.txt{packing}").write_bytes(PACK[packing](text.encode()))
    assert texts(TextSource(tmp_path)) == [text]


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_cut_off_packed_file_is_an_error(tmp_path: Path, packing: str):
    packed = PACK[packing](b"".join(b"%d\n" % (i * i) for i in range(50_000)))
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"a\.txt\.\w+: cannot be unpacked near byte \d+ of the file"):
        texts(TextSource(path))


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_is_not_packed_is_an_error(tmp_path: Path, packing: str):
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(b"plain text, whatever the name says\n" * 10)
    with pytest.raises(ValueError, match=r"a\.txt\.\w+: cannot be unpacked"):
        texts(TextSource(path))


def test_several_zstd_frames_are_one_text(tmp_path: Path):
    pack = PACK[".zst"]
    (tmp_path / "a.txt.zst").write_bytes(pack(b"one ") + pack(b"two\n") + pack(b"three"))
    assert texts(TextSource(tmp_path)) == ["one two\nthree"]


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(PACK[".zst"](b"text"))
    with pytest.raises(ImportError, match=re.escape("needs the package 'zstandard': pip install 'moestro[data]'")):
        texts(TextSource(tmp_path))


@pytest.mark.parametrize(
    ("split", "documents"),
    [
        ("file", [ARTICLES]),
        (
            "line",
            [
                " \n = First = \n \n",
                " One , two .\n",
                " = = Part = = \n",
                " Three .\n",
                " = Second = \n",
                " Four : é .\n",
            ],
        ),
        ("blank-line", [" \n = First = \n \n", " One , two .\n = = Part = = \n Three .\n = Second = \n Four : é .\n"]),
        ("heading", [" \n = First = \n \n One , two .\n = = Part = = \n Three .\n", " = Second = \n Four : é .\n"]),
    ],
)
def test_text_splits_lose_nothing(tmp_path: Path, split: str, documents: list[str]):
    path = tmp_path / "a.txt"
    path.write_text(ARTICLES)
    assert texts(TextSource(path, split=split)) == documents
    assert "".join(documents) == ARTICLES


def test_a_heading_of_ones_own(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("ACT 1\nx\nACT 2\ny\n")
    assert texts(TextSource(path, split="heading", heading="ACT ")) == ["ACT 1\nx\n", "ACT 2\ny\n"]


def test_places_and_shares_of_documents(tmp_path: Path):
    (tmp_path / "a.txt").write_text("1\n\n2\n")
    (tmp_path / "b.txt").write_text("3\n")
    documents = list(TextSource(tmp_path, split="blank-line").documents())
    assert [document.where for document in documents] == [
        f"{tmp_path}/a.txt:1",
        f"{tmp_path}/a.txt:3",
        f"{tmp_path}/b.txt:1",
    ]
    done = [document.done or 0 for document in documents]
    assert done == sorted(done) and done[-1] == 1


def test_paths_folders_and_globs_name_files_in_order(tmp_path: Path):
    for name in ("b/2.txt", "a/1.txt", "a/note.pdf", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(TextSource(tmp_path)) == ["a/1.txt", "b/2.txt", "c.md"]
    assert texts(TextSource(f"{tmp_path}/**/*.txt")) == ["a/1.txt", "b/2.txt"]
    assert texts(TextSource([tmp_path / "c.md", tmp_path])) == ["c.md", "a/1.txt", "b/2.txt"]
    assert list(TextSource(f"{tmp_path}/*/*.txt").files().values()) == ["a/1.txt", "b/2.txt"]
    with pytest.raises(ValueError, match=r"note\.pdf: unknown extension '\.pdf', this source reads \.txt"):
        TextSource(f"{tmp_path}/a/*").files()


def test_a_name_with_brackets_is_a_name(tmp_path: Path):
    path = tmp_path / "a[1].txt"
    path.write_text("text")
    assert texts(TextSource(path)) == ["text"]


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such file or folder \(looked from /"):
        texts(TextSource(tmp_path / "nowhere.txt"))
    with pytest.raises(FileNotFoundError, match=r"\*\.txt: no file matches this pattern"):
        texts(TextSource(tmp_path / "*.txt"))
    with pytest.raises(FileNotFoundError, match=r"no file here ends in \.txt, \.text"):
        texts(TextSource(tmp_path))
    with pytest.raises(ValueError, match=r"paths=\[\]: no file, folder or pattern given"):
        TextSource([])


def test_unknown_split_and_heading_are_refused():
    with pytest.raises(ValueError, match="split='blankline' is unknown; allowed: blank-line, file, heading, line"):
        TextSource("a.txt", split="blankline")
    with pytest.raises(ValueError, match=r"heading='\(' is not a regular expression"):
        TextSource("a.txt", split="heading", heading="(")


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_wrong_encoding_names_file_and_byte(tmp_path: Path, packing: str):
    (tmp_path / f"a.txt{packing}").write_bytes(PACK[packing]("first\nna\u00efve\n".encode("latin-1")))
    with pytest.raises(ValueError, match=r"a\.txt(\.gz)?: byte 8 is 0xef, which is not UTF-8"):
        texts(TextSource(tmp_path))


def test_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert texts(JsonlSource(tmp_path)) == ["one"]


def test_jsonl_reads_the_field_and_passes_over_blank_lines(tmp_path: Path):
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"body": "one"}\n\n{"body": "two\\u00e9"}'))
    documents = list(JsonlSource(path, text_field="body").documents())
    assert [(document.text, document.where) for document in documents] == [("one", f"{path}:1"), ("twoé", f"{path}:3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a" "b"}', r"a\.jsonl:2: not valid JSON: Expecting ',' delimiter \(column 14\)"),
        ("[1, 2]", r"a\.jsonl:2: a JSON list, not an object with a text field"),
        ('{"body": "x", "id": 3}', r"a\.jsonl:2: no field 'text'; there are: body, id\. Set text_field"),
        ('{"text": null}', r"a\.jsonl:2: field 'text' holds NoneType, not text"),
        ('{"text": "ab\\ud800"}', r"a\.jsonl:2: field 'text': character 2 is half of a surrogate pair"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path: Path, line: str, message: str):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        texts(JsonlSource(tmp_path))


def test_parquet(tmp_path: Path):
    rows = [f"row {i} é" for i in range(700)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": list(range(700))}), path, compression="zstd")
    documents = list(ParquetSource(path).documents())
    assert [document.text for document in documents] == rows
    assert documents[-1].where == f"{path}: row 700" and documents[-1].done == 1
    with pytest.raises(ValueError, match=r"a\.parquet: no field 'body'; there are: text, n\. Set text_field"):
        texts(ParquetSource(path, text_field="body"))
    with pytest.raises(ValueError, match=r"a\.parquet: row 1: field 'n' holds int, not text"):
        texts(ParquetSource(path, text_field="n"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
        texts(ParquetSource(path))


def test_source_for_goes_by_the_extension(tmp_path: Path):
    for name in ("a.txt.gz", "b.jsonl.zst", "c.parquet", "d.xyz"):
        (tmp_path / name).touch()
    assert isinstance(source_for(tmp_path / "a.txt.gz"), TextSource)
    assert isinstance(source_for(tmp_path / "b.jsonl.zst"), JsonlSource)
    assert isinstance(source_for(tmp_path / "c.parquet"), ParquetSource)
    with pytest.raises(ValueError, match=r"d\.xyz: unknown extension '\.xyz', this source reads .*\.jsonl.*\.parquet"):
        source_for(tmp_path / "d.xyz")


def test_fingerprint_follows_content_and_settings_not_place(tmp_path: Path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same\n\ntext\n")
    here, there = (TextSource(tmp_path / folder).fingerprint() for folder in ("here", "there"))
    assert here == there
    assert TextSource(tmp_path / "here", split="line").fingerprint() != here
    (tmp_path / "here" / "a.txt").write_text("same\n\ntexT\n")
    assert TextSource(tmp_path / "here").fingerprint() != here


def test_fields_are_part_of_the_fingerprint(stories: Path):
    assert JsonlSource(stories).fingerprint() == JsonlSource(stories).fingerprint()
    assert JsonlSource(stories, text_field="id").fingerprint() != JsonlSource(stories).fingerprint()


def test_the_standard_library_is_a_corpus():
    documents = list(StdlibSource().documents())
    keys = [document.key for document in documents]
    assert "argparse.py" in keys and "json/decoder.py" in keys
    folders = {folder for key in keys for folder in key.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    assert sum(len(document.text) for document in documents) > 5_000_000
    held_out = sum(is_held_out(key, 0.05) for key in keys) / len(keys)
    assert 0.02 < held_out < 0.10


def test_an_unreadable_library_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.py").write_bytes(b"# coding: no-such-code\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"a\.py: cannot be read as Python source: unknown encoding.*no-such-code"):
        texts(StdlibSource())


def test_the_split_depends_on_the_document_alone(tmp_path: Path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(2000)]

    def held_out(order: list[str]) -> set[str]:
        (tmp_path / "a.jsonl").write_text("\n".join(order))
        documents = Corpus(JsonlSource(tmp_path), None, 0.05).documents("reading")
        return {document.text for split, document in documents if split == "val"}

    first = held_out(lines)
    assert 60 < len(first) < 140
    assert held_out(lines[::-1]) == first
    # a document more at the start, or one given twice, moves no other
    assert held_out([json.dumps({"text": "new"}), *lines, lines[7]]) - {"new"} == first
