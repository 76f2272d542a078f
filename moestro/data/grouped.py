"""`GroupedSource`: several sources as one, each a group of its own."""

from collections.abc import Iterator, Sequence

from moestro.data.cache import digest
from moestro.data.sources import Document, Source


class GroupedSource:
    """The documents of several sources, one source after the other; those of source i are of group i (a language, a
    domain, ...), which batches carry to experts that serve one group.

    `most_bytes` takes of each source its first documents, up to so many bytes of text, so that none outweighs others.

    Raises: ValueError where there is no source, or `most_bytes` is below 1 or below a source's first document, whose
    group would have no text.
    """

    def __init__(self, sources: Sequence[Source], most_bytes: int | None = None) -> None:
        if not sources:
            raise ValueError("sources=[], allowed: at least one")
        if most_bytes is not None and most_bytes < 1:
            raise ValueError(f"most_bytes={most_bytes}, allowed: at least 1")
        self.sources, self.most_bytes = list(sources), most_bytes

    @property
    def name(self) -> str:
        return " and ".join(source.name for source in self.sources)

    def fingerprint(self) -> str:
        """Of all sources in their order."""
        return digest("GroupedSource", self.most_bytes, [source.fingerprint() for source in self.sources])

    def documents(self) -> Iterator[Document]:
        """Each with the number of its source."""
        for group, source in enumerate(self.sources):
            for document in self._some_of(source):
                done = None if document.done is None else (group + document.done) / len(self.sources)
                yield document._replace(group=group, done=done)

    def _some_of(self, source: Source) -> Iterator[Document]:
        size = 0
        for number, document in enumerate(source.documents()):
            size += len(document.text.encode())
            if self.most_bytes is not None and size > self.most_bytes:
                if number:
                    return
                raise ValueError(f"most_bytes={self.most_bytes}: {document.where} has {size}, so that nothing of "
                                 f"{source.name} would be taken; allowed: at least {size}")  # fmt: skip
            yield document
