"""`TokenData` says what to read; `prepare` gives the `Dataset` that a training run reads from."""

from collections.abc import Iterator
from pathlib import Path

from moestro.data.batches import Batch, Windows
from moestro.data.cache import appearing, digest
from moestro.data.corpus import Corpus
from moestro.data.progress import progress_bar
from moestro.data.shards import open_shard, read_meta, write_shards
from moestro.data.sources import Source
from moestro.data.tokenizers import BPETokenizer, Tokenizer, load_tokenizer
from moestro.ops.cache_folder import cache_root
from moestro.upgrades import SHARDS


class TokenData:
    """A corpus, a tokenizer and a window length.

    `val_fraction` of the documents are held out, or, where `val_source` is given, all of that source and nothing
    else. `val_fraction=1` holds out everything: for evaluation on text that was never trained on.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer | BPETokenizer,
        seq_len: int,
        val_fraction: float = 0.05,
        val_source: Source | None = None,
        cache_dir: str | Path | None = None,
    ):
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}; allowed: at least 1")
        Corpus(source, val_source, val_fraction)
        self.source, self.tokenizer, self.seq_len = source, tokenizer, seq_len
        self.val_fraction, self.val_source = val_fraction, val_source
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else cache_root()

    def prepare(self, progress: bool = True) -> "Dataset":
        """Build the token shards unless they are there already, and open them."""
        with progress_bar(progress) as report:
            corpus = Corpus(self.source, self.val_source, self.val_fraction, report)
            tokenizer = self.tokenizer.fitted(corpus, self.cache_dir)
            key = digest(SHARDS.version, corpus.fingerprint(), tokenizer.fingerprint())
            folder = self.cache_dir / "tokens" / key[:24]
            if not folder.is_dir():
                with appearing(folder) as filling:
                    write_shards(filling, key, corpus, tokenizer)
        return Dataset(folder, self.seq_len)


class Dataset:
    """Training and held-out batches from a folder of token shards.

    Raises: ValueError where the folder is damaged or the train split shorter than one window.
    """

    def __init__(self, folder: str | Path, seq_len: int):
        self.folder, self.seq_len = Path(folder), seq_len
        self._meta = read_meta(self.folder)
        self.name: str = self._meta["name"]
        self.tokenizer = load_tokenizer(self.folder)
        if (found := self.tokenizer.fingerprint()) != self._meta["tokenizer"]:
            raise ValueError(
                f"{self.folder}/tokenizer.json: damaged: its fingerprint is {found[:12]}..., meta.json says "
                f"{self._meta['tokenizer'][:12]}.... Delete the folder and it will be built anew"
            )
        self.vocab_size = self.tokenizer.vocab_size
        self._train, self._val = self._windows("train"), self._windows("val")
        if self._train.shard.meta.n_documents and not self._train.n_full:
            raise ValueError(
                f"{self.name}: its {self._train.n_targets} training tokens do not fill one window of seq_len={seq_len}"
            )

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of one step: a pure function of its arguments, so a run resumes exactly anywhere.

        Every epoch visits every window once, in its own order; a batch may lie across two epochs.
        """
        for what, value, least in (("step", step, 0), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{what}={value}; allowed: at least {least}")
        if not self._train.n_full:
            raise ValueError(f"{self.name}: all of it is held out (val_fraction=1), there is nothing to train on")
        return self._train.train_batch(step, batch_size, seed)

    def val_batches(self, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """The held-out split in a fixed order, every token a target once; the end is padded with ignored targets.

        `max_tokens` takes about so many, in windows spread evenly over the split.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; allowed: at least 1")
        return self._val.in_order(batch_size, max_tokens)

    def val_document(self, number: int) -> str:
        """The text of one held-out document."""
        index = self._val.shard.index
        if not 0 <= number < len(index) - 1:
            raise ValueError(f"held-out document {number}; there are {len(index) - 1}, counted from 0")
        return self.tokenizer.decode(self._val.shard.tokens[index[number, 0] + 1 : index[number + 1, 0]].tolist())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the batches: equal fingerprints, equal batches."""
        hashes = [windows.shard.sha256 for windows in (self._train, self._val)]
        return digest(self._meta["tokenizer"], self.seq_len, hashes)

    @property
    def text_fingerprint(self) -> str:
        """SHA-256 of the text and its split, whatever the tokenizer: equal ones make bits per byte comparable."""
        return digest(self._train.shard.meta.text_sha256, self._val.shard.meta.text_sha256)

    @property
    def n_train_tokens(self) -> int:
        return self._train.n_targets

    @property
    def n_train_bytes(self) -> int:
        return self._train.shard.meta.n_bytes

    @property
    def n_val_tokens(self) -> int:
        return self._val.n_targets

    @property
    def n_val_bytes(self) -> int:
        return self._val.shard.meta.n_bytes

    @property
    def n_val_documents(self) -> int:
        return self._val.shard.meta.n_documents

    @property
    def zlib_bytes(self) -> int:
        """Size of the held-out text after zlib -9, its documents joined."""
        return self._val.shard.meta.zlib_bytes

    @property
    def byte_error(self) -> int:
        """Bytes of text by which tokens' own byte counts are off, over both splits; 0 for an exact tokenizer."""
        return self._train.shard.meta.byte_error + self._val.shard.meta.byte_error

    def _windows(self, split: str) -> Windows:
        shard = open_shard(self.folder, split, self._meta)
        return Windows(shard, self.seq_len, self.tokenizer.eos_id, self.tokenizer.byte_lengths())


def zlib_bpb(dataset: Dataset) -> float:
    """Bits per byte of zlib -9 on the held-out text: a model above it has learned nothing useful yet."""
    return 8 * dataset.zlib_bytes / dataset.n_val_bytes
