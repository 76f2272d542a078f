"""Corpora: where documents come from. A source yields documents in a fixed order and can say what it holds."""

import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moestro.data.cache import digest
from moestro.data.files import (
    ROW_GROUP_COPIES,
    HeldLines,
    find_files,
    longest_text,
    need_extra,
    read_lines,
    suffix,
    too_long,
)
from moestro.data.records import MissingField, json_object, text_of
from moestro.ops.whole_files import sha256

WIKITEXT_HEADING = r" = [^=].* = $"
SPLITTING = "Set split to 'line', 'blank-line' or 'heading', or cut the file into several"


class Document(NamedTuple):
    """One text. `key` decides on which side of the split it falls; a document without a name is its own key."""

    key: str
    text: str
    where: str  # for messages: file, or file:line
    done: float | None = None  # share of the source read so far, where the source knows its length
    group: int | None = None  # what kind of text it is, where the corpus tells kinds apart


class Source(Protocol):
    """What the rest of the package asks of a corpus."""

    @property
    def name(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...

    def fingerprint(self) -> str:
        """SHA-256 of the content and of the settings that shape the documents; not of where they lie."""
        ...


class FileSource:
    """A corpus of files: subclasses say how one file becomes documents."""

    suffixes: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()  # folders that are not entered

    def __init__(self, paths: str | Path | Sequence[str | Path]):
        self.paths = [paths] if isinstance(paths, str | Path) else list(paths)
        if not self.paths:
            raise ValueError("paths=[]: no file, folder or pattern given")
        for path in map(str, self.paths):
            if not path.strip() or "\0" in path:
                raise ValueError(f"paths={path!r}: no path; give a file, folder or pattern")

    @property
    def name(self) -> str:
        first = Path(self.paths[0]).name
        return first if len(self.paths) == 1 else f"{first} and {len(self.paths) - 1} more"

    def files(self) -> dict[Path, str]:
        """Every file of the corpus with its key."""
        return find_files(self.paths, self.suffixes, self.left_out)

    def settings(self) -> dict[str, Any]:
        """What shapes the documents beside the files themselves."""
        return {}

    def fingerprint(self) -> str:
        content = [(key, sha256(path)) for path, key in self.files().items()]
        return digest(type(self).__name__, self.settings(), content)

    def documents(self) -> Iterator[Document]:
        files = self.files()
        sizes = {path: path.stat().st_size for path in files}
        total, before = max(1, sum(sizes.values())), 0
        for path, key in files.items():
            for document in self.read(path, key):
                yield document._replace(done=(before + (document.done or 0.0) * sizes[path]) / total)
            before += sizes[path]

    def read(self, path: Path, key: str) -> Iterator[Document]:
        """The documents of one file; `done` is the share of this file."""
        raise NotImplementedError


class StdlibSource(FileSource):
    """The Python standard library's own source: text that lies on every machine (PSF licence).

    One file is one document. The text differs between Python versions: compare results of one version only.
    """

    suffixes = (".py",)
    left_out = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"})

    def __init__(self):
        super().__init__(sysconfig.get_paths()["stdlib"])

    @property
    def name(self) -> str:
        return f"Python {sys.version.split()[0]} standard library"

    def read(self, path: Path, key: str) -> Iterator[Document]:
        if path.stat().st_size > (longest := longest_text()):
            raise too_long(str(path), "this file", longest, "Read other text")
        # tokenize.open honours a file's own coding line, as Python does
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as Python source: {error}") from error
        yield Document(key, text, str(path), done=1.0)


class TextSource(FileSource):
    """Plain text files, cut into documents; the documents joined are the file again, byte for byte.

    split: "file" (one document a file), "line", "blank-line" (paragraphs), or "heading" (a line that matches the
    regular expression `heading` opens a document; the default is an article of WikiText).
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        split: str = "file",
        heading: str = WIKITEXT_HEADING,
        suffixes: Sequence[str] = (".txt", ".text", ".md", ".rst"),
    ):
        super().__init__(paths)
        rules = {"file", "line", "blank-line", "heading"}
        if split not in rules:
            raise ValueError(f"split={split!r} is unknown; allowed: {', '.join(sorted(rules))}")
        try:
            self.heading = re.compile(heading)
        except re.error as error:
            raise ValueError(f"heading={heading!r} is not a regular expression: {error}") from error
        self.split = split
        self.suffixes = tuple(suffixes)

    def settings(self) -> dict[str, Any]:
        return {"split": self.split} | ({"heading": self.heading.pattern} if self.split == "heading" else {})

    def read(self, path: Path, key: str) -> Iterator[Document]:
        held, longest = HeldLines(), longest_text()
        has_text, previous, number, opened, done = False, "", 0, 1, 0.0
        for number, line, line_done, size in read_lines(path, longest):
            if has_text and self._opens(line, previous):
                yield self._document(held, key, f"{path}:{opened}", done)
                has_text, opened = False, number
            held.add(line, size)
            if held.size > longest:
                raise too_long(f"{path}:{opened}", f"this document (split='{self.split}')", longest, SPLITTING)
            has_text = has_text or not line.isspace()
            previous, done = line, line_done
        if held.size:
            yield self._document(held, key, f"{path}:{opened}", 1.0)

    def _opens(self, line: str, previous: str) -> bool:
        match self.split:
            case "line":
                return not line.isspace()
            case "blank-line":
                return previous.isspace() and not line.isspace()
            case "heading":
                return self.heading.match(line.rstrip("\r\n")) is not None
        return False

    def _document(self, held: HeldLines, key: str, where: str, done: float) -> Document:
        text = held.taken()
        return Document(key if self.split == "file" else text, text, where, done)


class JsonlSource(FileSource):
    """One JSON object a line; the text is in `text_field`. Where `group_field` is given, it says what kind of text each
    document is: that of `groups[i]` is of group i."""

    suffixes = (".jsonl", ".ndjson", ".json")

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        text_field: str = "text",
        group_field: str | None = None,
        groups: Sequence[str] = (),
    ):
        super().__init__(paths)
        if bool(groups) != (group_field is not None) or len(set(groups)) != len(groups):
            raise ValueError(
                f"group_field={group_field!r}, groups={list(groups)}, allowed: both or neither, with different groups"
            )
        self.text_field, self.group_field, self.groups = text_field, group_field, tuple(groups)

    def settings(self) -> dict[str, Any]:
        grouping = {"group_field": self.group_field, "groups": self.groups} if self.groups else {}
        return {"text_field": self.text_field} | grouping

    def read(self, path: Path, key: str) -> Iterator[Document]:
        for number, line, done, _ in read_lines(path, longest_text()):
            if not line.isspace():
                where = f"{path}:{number}"
                record = json_object(line, where)
                text = text_of(record, self.text_field, where)
                yield Document(text, text, where, done, self._group(record, where))

    def _group(self, record: dict[str, Any], where: str) -> int | None:
        if self.group_field is None:
            return None
        if (value := record.get(self.group_field)) not in self.groups:
            allowed = ", ".join(map(repr, self.groups))
            raise ValueError(f"{where}: field '{self.group_field}' holds {value!r}, allowed (groups): {allowed}")
        return self.groups.index(value)


class ParquetSource(FileSource):
    """Parquet files; the text is in the column `text_field`. A row group's texts are decoded together, twice over."""

    suffixes = (".parquet", ".pq")
    most_rows, most_bytes = 256, 2**23  # that are handed on together

    def __init__(self, paths: str | Path | Sequence[str | Path], text_field: str = "text"):
        super().__init__(paths)
        self.text_field = text_field

    def settings(self) -> dict[str, Any]:
        return {"text_field": self.text_field}

    def read(self, path: Path, key: str) -> Iterator[Document]:
        pyarrow = need_extra("pyarrow", f"{path}: reading Parquet")
        parquet = need_extra("pyarrow.parquet", f"{path}: reading Parquet")
        try:
            # not the whole of a group's compressed bytes before its first row
            file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
        with file:
            if self.text_field not in file.schema_arrow.names:
                raise MissingField(self.text_field, file.schema_arrow.names, str(path))
            rows, longest = max(1, file.metadata.num_rows), longest_text()
            for row, record in enumerate(self._records(file, path), 1):
                where = f"{path}: row {row}"
                text = text_of(record, self.text_field, where, longest)
                yield Document(text, text, where, row / rows)

    def _records(self, file: Any, path: Path) -> Iterator[dict[str, Any]]:
        """Group by group: {the field: its value}."""
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.text_field)
            if size > (most := longest_text(ROW_GROUP_COPIES)):
                raise ValueError(
                    f"{path}: row group {number} holds {size / 1e6:,.1f} MB of '{self.text_field}', which are decoded "
                    f"together; allowed with the memory that is free now: {most / 1e6:,.1f} MB. Write the file again "
                    "with smaller row groups (row_group_size), or free memory"
                )
            rows = self.most_bytes * group.num_rows // max(1, size)
            rows = max(1, min(self.most_rows, rows))
            for batch in file.iter_batches(rows, row_groups=[number], columns=[self.text_field]):
                yield from batch.to_pylist()


def source_for(paths: str | Path | Sequence[str | Path], text_field: str = "text") -> FileSource:
    """The source that reads these paths, chosen by the extension of the first file they name."""
    kinds = {**dict.fromkeys(JsonlSource.suffixes, JsonlSource), **dict.fromkeys(ParquetSource.suffixes, ParquetSource)}
    text = TextSource(paths)
    readable = (*text.suffixes, *kinds)
    first = next(iter(find_files(text.paths, readable)))
    kind = kinds.get(suffix(first))
    return kind(paths, text_field) if kind else text
