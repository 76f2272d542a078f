"""Corpora: where documents come from. A source yields documents in a fixed order and can say what it holds."""

import json
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moestro.data.cache import digest
from moestro.data.files import HeldLines, find_files, longest_document, need_extra, read_lines, suffix, too_long
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
        held, longest = HeldLines(), longest_document()
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
        for number, line, done, _ in read_lines(path, longest_document()):
            if not line.isspace():
                where = f"{path}:{number}"
                record = _json_object(line, where)
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
    """Parquet files; the text is in the column `text_field`."""

    suffixes = (".parquet", ".pq")
    rows_at_once = 256

    def __init__(self, paths: str | Path | Sequence[str | Path], text_field: str = "text"):
        super().__init__(paths)
        self.text_field = text_field

    def settings(self) -> dict[str, Any]:
        return {"text_field": self.text_field}

    def read(self, path: Path, key: str) -> Iterator[Document]:
        pyarrow = need_extra("pyarrow", f"{path}: reading Parquet")
        parquet = need_extra("pyarrow.parquet", f"{path}: reading Parquet")
        try:
            file = parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
        with file:
            columns = file.schema_arrow.names
            if self.text_field not in columns:
                raise MissingField(self.text_field, columns, str(path))
            row, rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(self.rows_at_once, columns=[self.text_field]):
                for record in batch.to_pylist():
                    row += 1
                    text = text_of(record, self.text_field, f"{path}: row {row}")
                    yield Document(text, text, f"{path}: row {row}", row / rows)


def source_for(paths: str | Path | Sequence[str | Path], text_field: str = "text") -> FileSource:
    """The source that reads these paths, chosen by the extension of the first file they name."""
    kinds = {**dict.fromkeys(JsonlSource.suffixes, JsonlSource), **dict.fromkeys(ParquetSource.suffixes, ParquetSource)}
    text = TextSource(paths)
    readable = (*text.suffixes, *kinds)
    first = next(iter(find_files(text.paths, readable)))
    kind = kinds.get(suffix(first))
    return kind(paths, text_field) if kind else text


def text_of(record: dict[str, Any], field: str, where: str) -> str:
    """The text in a record's field. Raises: MissingField; ValueError where it holds no text."""
    if field not in record:
        raise MissingField(field, list(record), where)
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field '{field}' holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field '{field}': character {error.start} is half of a surrogate pair") from error
    return text


class MissingField(ValueError):
    """A record without the text's field; `there` are the fields that it has."""

    def __init__(self, field: str, there: Sequence[str], where: str):
        super().__init__(f"{where}: no field '{field}'; there are: {', '.join(there) or 'none'}. Set text_field")
        self.there = tuple(there)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON: nested too deep") from error
    except ValueError as error:
        # a number of thousands of digits
        raise ValueError(f"{where}: cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object with a text field")
    return record
