"""Which documents train and which are held out: decided by each document's own key, never by its position."""

import hashlib
from collections.abc import Iterator

from moestro.data.cache import digest
from moestro.data.progress import Report, silent
from moestro.data.sources import Document, Source

PARTS_PER_MILLION = 1_000_000


def is_held_out(key: str, val_fraction: float) -> bool:
    """SHA-256(key) mod 10^6 < 10^6 val_fraction: the same for a document wherever and whenever it is read."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")
    return number % PARTS_PER_MILLION < val_fraction * PARTS_PER_MILLION


class Corpus:
    """A source split into "train" and "val": by key, or, where `val_source` is given, by source."""

    def __init__(self, source: Source, val_source: Source | None, val_fraction: float, report: Report = silent):
        if not 0 < val_fraction <= 1:
            raise ValueError(f"val_fraction={val_fraction}; allowed: above 0, at most 1 (1: nothing to train on)")
        self.source, self.val_source, self.val_fraction, self.report = source, val_source, val_fraction, report
        self._fingerprint: str | None = None

    @property
    def name(self) -> str:
        return self.source.name

    def fingerprint(self) -> str:
        """SHA-256 of both sources and of the rule that splits them."""
        if self._fingerprint is None:
            rule = self.val_fraction if self.val_source is None else self.val_source.fingerprint()
            self._fingerprint = digest("Corpus", self.source.fingerprint(), rule)
        return self._fingerprint

    def documents(self, stage: str) -> Iterator[tuple[str, Document]]:
        """("train" or "val", document), documents without any text left out."""
        for document in self._watched(self.source, stage):
            held_out = self.val_source is None and is_held_out(document.key, self.val_fraction)
            yield "val" if held_out else "train", document
        if self.val_source is not None:
            for document in self._watched(self.val_source, f"{stage} (held-out)"):
                yield "val", document

    def train_texts(self, stage: str) -> Iterator[str]:
        """The texts of the train split."""
        for split, document in self.documents(stage):
            if split == "train":
                yield document.text

    def _watched(self, source: Source, stage: str) -> Iterator[Document]:
        shown = 0.0
        self.report(stage, None)
        for document in source.documents():
            if document.done is not None and document.done >= shown + 0.002:
                shown = document.done
                self.report(stage, shown)
            if document.text:
                yield document
        self.report(stage, 1.0)
