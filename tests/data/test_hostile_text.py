"""Text as it is found: binary, empty, in other encodings, without line breaks, larger than memory."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moestro.cli import main
from moestro.data import ByteTokenizer, Document, HubSource, JsonlSource, StdlibSource, TextSource, TokenData
from moestro.data.sources import Source
from tests.conftest import ROOT

MIB = 2**20


def prepared(tmp_path: Path, content: bytes, name: str = "a.txt", **options: object) -> TokenData:
    """Data of one file, every document of it held out."""
    (tmp_path / name).write_bytes(content)
    source: Source = TextSource(tmp_path / name, **options) if name.endswith(".txt") else JsonlSource(tmp_path / name)  # type: ignore[arg-type]
    return TokenData(source, ByteTokenizer(), 8, val_fraction=1.0, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt is empty: no document with text in it"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", r"a\.txt: byte 8 is 0xff, which is not UTF-8"),
        ("schön".encode("latin-1"), r"a\.txt: byte 3 is 0xf6, which is not UTF-8"),
        ("words".encode("utf-16"), r"a\.txt: byte 0 is 0xff, which is not UTF-8"),
        (b"good line\n" * 100 + b"bad \xc3\x28 line\n", r"a\.txt: byte 1004 is 0xc3, which is not UTF-8"),
        (b"\xed\xa0\x80", r"a\.txt: byte 0 is 0xed, which is not UTF-8"),
        (b"\xc0\xaf", r"a\.txt: byte 0 is 0xc0, which is not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, content).prepare(progress=False)
    assert not list((tmp_path / "cache").glob("tokens/*"))


@pytest.mark.parametrize(
    "content",
    [
        b"one\ntwo\r\nthree\rfour\n\rfive",
        b"zero \x00 byte \x00\x00 and \x1b[31m and \x07",
        b"\xef\xbb\xbfwith a mark",
        "a line separator \u2028, a next line \x85, a form feed \x0c".encode(),
        "😀 family: 👩\u200d👩\u200d👧, right to left: שלום, combined: e\u0301".encode(),
        b"<|endoftext|></s><pad>",
        b"no line break at all" * 1000,
        b"\n\n\n\n\n",
    ],
)
@pytest.mark.parametrize("split", ["file", "line", "blank-line"])
def test_text_comes_back_byte_for_byte(tmp_path: Path, content: bytes, split: str) -> None:
    dataset = prepared(tmp_path, content, split=split).prepare(progress=False)
    text = "".join(dataset.val_document(number) for number in range(dataset.n_val_documents))
    assert text.encode() == content.removeprefix(b"\xef\xbb\xbf")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "ok"} trailing', r"a\.jsonl:2: not valid JSON"),
        (b"[" * 100_000, r"a\.jsonl:2: not valid JSON"),
        (b'{"text": 1' + b"0" * 5000 + b"}", r"a\.jsonl:2: "),
        (b"\x00", r"a\.jsonl:2: not valid JSON"),
    ],
)
def test_lines_that_are_no_records_are_refused_with_their_place(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, b'{"text": "fine"}\n' + line + b"\n", "a.jsonl").prepare(progress=False)


class Long:
    """One document of `n` characters without a line break, and a short one."""

    def __init__(self, n: int) -> None:
        self.n = n

    name = "long"

    def fingerprint(self) -> str:
        return f"long {self.n}"

    def documents(self) -> Iterator[Document]:
        yield Document("a", "x" * self.n, "long")
        yield Document("b", "short", "short")


def test_one_document_of_many_parts_has_every_byte(tmp_path: Path) -> None:
    data = TokenData(Long(3_000_000), ByteTokenizer(), 8, val_fraction=1.0, cache_dir=tmp_path)
    dataset = data.prepare(progress=False)
    assert dataset.n_val_bytes == 3_000_005 and dataset.val_document(0) == "x" * 3_000_000


PREPARE = """
import sys
from pathlib import Path
from moestro.cli import main
code = main(sys.argv[1:])
# not ru_maxrss, which starts with what the parent held
print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])
sys.exit(code)
"""


def peak(tmp_path: Path, file: Path, split: str, kind: str = "text") -> int:
    """Peak resident bytes of `moestro prepare` on a file, in a process of its own."""
    splitting = f", split: {split}" if split else ""
    words = [f"data.source={{kind: {kind}, paths: {file}{splitting}}}", "data.tokenizer={kind: bytes}"]
    words += [f"data.cache_dir={tmp_path / 'cache'}", "data.val_fraction=0.5", "data.seq_len=16"]
    command = [sys.executable, "-c", PREPARE, "prepare", str(ROOT / "recipes" / "dense.yaml"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_corpus_larger_than_the_memory_that_it_gets_is_prepared(tmp_path: Path) -> None:
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    paragraph = b"seven wise owls watch from an old oak tree. " * 50 + b"\n\n"
    small.write_bytes(b"".join(b"%d\n\n" % number for number in range(100)))
    with large.open("wb") as file:
        for number in range(400):
            file.write(b"%d\n\n" % number + paragraph * 480)
    base = peak(tmp_path, small, "blank-line")
    assert large.stat().st_size > 400 * MIB
    # not to 400 MB besides what the process itself takes
    assert peak(tmp_path, large, "blank-line") < base + 150 * MIB


def test_training_on_hostile_text_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "a.txt"
    recipe = str(ROOT / "recipes" / "dense.yaml")
    for content in (b"", b"\xff" * 100, b"x"):
        file.write_bytes(content)
        words = [f"data.source={{kind: text, paths: {file}}}", "data.tokenizer={kind: bytes}"]
        assert main(["train", recipe, *words, "--out", str(tmp_path / "run")]) in (1, 2)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("moestro: error: ") and "a.txt" in error
    assert json.loads(json.dumps(error))


CONFINED = """
import resource, sys
from pathlib import Path
from moestro.data import ByteTokenizer, JsonlSource, ParquetSource, TextSource, TokenData
kind, path, other, cache, spare = sys.argv[1:]
if kind == 'parquet':
    import pyarrow.parquet
pages = int(Path('/proc/self/statm').read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(spare), resource.RLIM_INFINITY))
source = {'text': TextSource, 'json': JsonlSource, 'parquet': ParquetSource}[kind](path)
data = TokenData(source, ByteTokenizer(), 8, val_source=TextSource(other), cache_dir=cache)
try:
    print(data.prepare(progress=False).n_train_tokens)
except ValueError as error:
    print(error)
"""
SIZE = 50_000_000


def confined(tmp_path: Path, kind: str, path: Path, spare: int) -> str:
    """What is said of a file by a process that may have `spare` bytes more of addresses than its imports took."""
    (tmp_path / "other.txt").write_text("held out text")
    words = [kind, str(path), str(tmp_path / "other.txt"), str(tmp_path / "cache"), str(spare)]
    # Arrow's own pools take addresses ahead of need
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-c", CONFINED, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "line",
    [pytest.param(b"seven wise owls " * 200 + b"\n", marks=pytest.mark.slow), b"x" * SIZE],
    ids=["lines", "line"],
)
def test_a_document_that_may_not_fit_is_refused_and_one_that_fits_fits(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(line * (SIZE // len(line)))
    refused = confined(tmp_path, "text", path, 6 * SIZE)
    what = "this document (split='file')" if len(line) < SIZE else "this line"
    assert refused.startswith(f"{path}:1: {what} is longer than ") and "1/24 of the memory that is free" in refused
    assert not list((tmp_path / "cache").glob("tokens/*"))
    assert "Set split to 'line'" in refused or "Break it into several lines" in refused
    # the share is not so large that what it lets pass would not fit
    if len(line) < SIZE:
        assert int(confined(tmp_path, "text", path, 25 * SIZE)) == path.stat().st_size + 1


def test_a_record_that_may_not_fit_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "short"}\n{"text": "' + b"x" * SIZE + b'"}\n')
    assert confined(tmp_path, "json", path, 6 * SIZE).startswith(f"{path}:2: this line is longer than ")


def parquet_of(path: Path, groups: list[list[str]]) -> Path:
    """A file with these row groups."""
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())])) as writer:
        for texts in groups:
            writer.write_table(pyarrow.table({"text": texts}))
    return path


def test_a_row_group_that_may_not_fit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "a.parquet", [["short"], [f"{n}".zfill(500_000) for n in range(2 * SIZE // 500_000)]])
    said = confined(tmp_path, "parquet", path, 6 * SIZE)
    assert said.startswith(f"{path}: row group 1 holds 100.0 MB of 'text', which are decoded together; allowed with ")
    assert "smaller row groups" in said and not list((tmp_path / "cache").glob("tokens/*"))


def test_a_row_that_may_not_fit_is_refused_with_its_number(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "a.parquet", [["short"], ["x" * SIZE]])
    said = confined(tmp_path, "parquet", path, 12 * SIZE)
    assert said.startswith(f"{path}: row 2: this document (field 'text') is longer than ")


@pytest.mark.slow
def test_a_parquet_file_larger_than_the_memory_that_it_gets_is_prepared(tmp_path: Path) -> None:
    small = parquet_of(tmp_path / "small.parquet", [[f"{n}" for n in range(100)]])
    texts = [[f"{group} {n}".zfill(500_000) for n in range(20)] for group in range(40)]
    large = parquet_of(tmp_path / "large.parquet", texts)
    # not to 400 MB besides what the process itself takes
    assert peak(tmp_path, large, "", "parquet") < peak(tmp_path, small, "", "parquet") + 150 * MIB


@pytest.mark.parametrize("source", ["hub", "stdlib"])
def test_documents_that_come_whole_are_refused_where_they_may_not_fit(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": "é" * 600}) + "\n")
    (tmp_path / "long.py").write_text("#" * 1001)
    monkeypatch.setattr("moestro.data.hub.longest_text", lambda: 1000)
    monkeypatch.setattr("moestro.data.sources.longest_text", lambda: 1000)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    made = StdlibSource() if source == "stdlib" else HubSource("json", data_files=str(tmp_path / "rows.jsonl"))
    where = {"hub": r"data set 'json/train' row 2: this document \(field 'text'\)", "stdlib": r"long\.py: this file"}
    with pytest.raises(ValueError, match=where[source] + r" is longer than 0\.0 MB, 1/24 of the memory that is free"):
        list(made.documents())
