"""Files of text: finding them, opening them compressed or not, reading them line by line."""

import bz2
import glob
import gzip
import importlib
import io
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple, cast

from moestro.ops.machine_memory import free_machine_memory

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Bytes of memory allowed for each of a document: up to 4 where it is held, 4 in the parts that a tokenizer is given,
# and 8 for each of up to one id a byte, twice while they are joined.
DOCUMENT_COPIES = 24
# As much for a row group of Parquet: decoded twice over, and what is handed on of it.
ROW_GROUP_COPIES = 4
# bytes of a document or row group that are always tried
SHORT = 2**20


class Line(NamedTuple):
    """One line of a text file, with its line break."""

    number: int
    text: str
    done: float  # share of the file (as it lies on the disk) read so far
    size: int  # its bytes in the file


class HeldLines:
    """Lines of a document; joined now and then, because many short strings take many times their text."""

    LINES = 4096

    def __init__(self) -> None:
        self._blocks, self._lines, self.size = list[str](), list[str](), 0

    def add(self, line: str, size: int) -> None:
        self._lines.append(line)
        self.size += size
        if len(self._lines) == self.LINES:
            self._blocks.append("".join(self._lines))
            self._lines.clear()

    def taken(self) -> str:
        """All of it, which is held no longer."""
        text = "".join([*self._blocks, *self._lines])
        self._blocks, self._lines, self.size = [], [], 0
        return text


def need_extra(module: str, why: str) -> ModuleType:
    """The optional module, or an ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{why} needs the package '{module}': pip install 'moestro[data]'") from error


def suffix(path: Path) -> str:
    """What a file holds, by its name: "a.jsonl.xz" and "a.jsonl" -> ".jsonl"."""
    inner = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return inner.suffix.lower()


def find_files(
    paths: Iterable[str | Path], suffixes: tuple[str, ...], left_out: frozenset[str] = frozenset()
) -> dict[Path, str]:
    """Every file the paths (files, folders, globs) name, in a fixed order, with the name that is its key.

    Of a folder, files with other suffixes are passed over, and folders named in `left_out` are not entered.
    Keys do not depend on where the corpus lies: relative to the folder or to the fixed part of the glob.

    Raises: FileNotFoundError where a path names nothing; ValueError for a file of another kind.
    """
    found: dict[Path, str] = {}
    for path in paths:
        root, files = _matches(Path(path).expanduser(), suffixes, left_out)
        for file in files:
            if suffix(file) not in suffixes:
                allowed = ", ".join(suffixes)
                raise ValueError(
                    f"{file}: unknown extension '{suffix(file)}', this source reads {allowed} "
                    f"(also compressed: {', '.join(COMPRESSIONS)})"
                )
            found[file] = file.relative_to(root).as_posix()
    return found


def _matches(path: Path, suffixes: tuple[str, ...], left_out: frozenset[str]) -> tuple[Path, list[Path]]:
    """(root that keys are relative to, files) of one path of the user's."""
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        files = sorted(file for file in _below(path, left_out) if suffix(file) in suffixes)
        if not files:
            raise FileNotFoundError(f"{path}: no file here ends in {', '.join(suffixes)}")
        return path, files
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"{path}: no such file or folder (looked from {Path.cwd()})")
    files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: no file matches this pattern (looked from {Path.cwd()})")
    fixed = Path()
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed, files


def _below(folder: Path, left_out: frozenset[str]) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out]
        yield from (Path(at, name) for name in names)


def longest_text(copies: int = DOCUMENT_COPIES) -> int:
    """Bytes of text that may be held whole where each takes `copies`: what is free now, over them; no limit where that
    is not known."""
    free = free_machine_memory()
    return sys.maxsize if free is None else max(SHORT, free // copies)


def read_lines(path: Path, longest: int = sys.maxsize) -> Iterator[Line]:
    """The lines of a UTF-8 file, compressed or not, without ever holding more than one.

    Raises: ValueError with file and byte offset where the text is not UTF-8 or the compressed data is broken; with file
    and line where one has more than `longest` bytes.
    """
    size = max(1, path.stat().st_size)
    offset = 0
    with path.open("rb") as raw:
        stream = _decompressed(raw, path)
        number = 0
        while data := _next_line(stream, path, raw, longest):
            number += 1
            if len(data) > longest:
                raise too_long(f"{path}:{number}", "this line", longest, "Break it into several lines")
            text = _decoded(data.removeprefix(BYTE_ORDER_MARK) if number == 1 else data, path, offset)
            offset += len(data)
            yield Line(number, text, raw.tell() / size, len(data))


def too_long(where: str, what: str, longest: int, advice: str) -> ValueError:
    """The refusal of what would have to be held whole and may not fit."""
    return ValueError(
        f"{where}: {what} is longer than {longest / 1e6:,.1f} MB, 1/{DOCUMENT_COPIES} of the memory that is free "
        f"now: a document is held whole, with copies and tokens. {advice}, or free memory"
    )


def _next_line(stream: BinaryIO, path: Path, raw: BinaryIO, longest: int) -> bytes:
    try:
        return stream.readline(min(longest, sys.maxsize - 1) + 1)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be unpacked near byte {raw.tell()} of the file: {error}") from error


def _decoded(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ValueError(f"{path}: byte {at} is 0x{data[error.start]:02x}, which is not UTF-8") from error


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    match path.suffix:
        case ".gz":
            return cast(BinaryIO, gzip.open(raw))
        case ".bz2":
            return cast(BinaryIO, bz2.open(raw))
        case ".xz":
            return cast(BinaryIO, lzma.open(raw))
        case ".zst":
            return io.BufferedReader(_Zstd(raw, path))
    return raw


class _Zstd(io.RawIOBase):
    """Unpacked bytes of a .zst file. A cut-off file is an error here; zstandard's own reader lets it pass."""

    def __init__(self, raw: BinaryIO, path: Path):
        self.raw = raw
        self.module = need_extra("zstandard", f"{path}: reading .zst")
        self.frame = None
        self.packed = b""
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # the signature is io.RawIOBase's
        while not self.ready and self._more():
            pass
        taken = self.ready[: len(buffer)]
        self.ready = self.ready[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def _more(self) -> bool:
        """Unpack one more piece into `ready`; False at the end of the file."""
        self.packed = self.packed or self.raw.read(1 << 14)
        if not self.packed:
            if self.frame is not None:
                raise EOFError("the file ends in the middle of a compressed frame")
            return False
        self.frame = self.frame or self.module.ZstdDecompressor().decompressobj()
        try:
            self.ready = memoryview(self.frame.decompress(self.packed))
        except self.module.ZstdError as error:
            raise OSError(str(error)) from error
        self.packed = self.frame.unused_data if self.frame.eof else b""
        self.frame = None if self.frame.eof else self.frame
        return True
