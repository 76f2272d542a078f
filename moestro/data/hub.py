"""Corpora from the Hugging Face hub, streamed."""

from collections.abc import Iterator
from typing import Any

from moestro.data.cache import digest
from moestro.data.files import longest_text, need_extra
from moestro.data.records import text_of
from moestro.data.sources import Document


class HubSource:
    """A Hugging Face data set by name, read as a stream: nothing but the token shards lands on the disk.

    `data_files` with the names "json", "text", "parquet", "csv" reads local files through their builders.
    `max_documents` stops after so many, for data sets nobody reads to the end.

    The fingerprint holds the commit of the hub's repository (for local `data_files`: when they were written).
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        text_field: str = "text",
        data_files: Any = None,
        revision: str | None = None,
        max_documents: int | None = None,
    ):
        if max_documents is not None and max_documents < 1:
            raise ValueError(f"max_documents={max_documents}; allowed: at least 1, or none for all")
        self.path, self.config, self.split, self.text_field = name, config, split, text_field
        self.data_files, self.revision, self.max_documents = data_files, revision, max_documents
        self._opened: Any = None

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.path, self.config, self.split) if part)

    def fingerprint(self) -> str:
        builder = self._builder()
        files = builder.config.data_files or {}
        origins = {str(split): repr(there.origin_metadata) for split, there in files.items()}
        asked = [self.path, self.config, self.split, self.text_field, self.max_documents]
        return digest("HubSource", asked, builder.config_id, str(builder.config.version), origins)

    def documents(self) -> Iterator[Document]:
        try:
            stream = self._builder().as_streaming_dataset(self.split)
        except ValueError as error:
            raise ValueError(f"data set '{self.path}', split '{self.split}': {error}") from error
        rows, longest = self._rows(), longest_text()
        for row, record in enumerate(stream, 1):
            where = f"data set '{self.name}' row {row}"
            text = text_of(record, self.text_field, where, longest)
            yield Document(text, text, where, row / rows if rows else None)
            if row == self.max_documents:
                return

    def _rows(self) -> int | None:
        """How many documents there will be, where the data set says."""
        splits = self._builder().info.splits or {}
        known = splits[self.split].num_examples if self.split in splits else None
        return min(known or self.max_documents or 0, self.max_documents or known or 0) or None

    def _builder(self) -> Any:
        datasets = need_extra("datasets", f"reading '{self.path}' from the hub")
        if self._opened is None:
            try:
                self._opened = datasets.load_dataset_builder(
                    self.path, self.config, data_files=self.data_files, revision=self.revision
                )
            except ConnectionError as error:
                raise ConnectionError(f"data set '{self.path}' cannot be reached: {error}") from error
            except FileNotFoundError as error:
                raise FileNotFoundError(f"data set '{self.path}' is not there: {error}") from error
            except ValueError as error:
                raise ValueError(f"data set '{self.path}': {error}") from error
        return self._opened
