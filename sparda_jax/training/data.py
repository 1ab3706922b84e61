# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Training windows over local text or token shards; the state of the data is a step number.

Documents are laid end to end with a separator after each, and that stream is cut into windows of
`seq_len` tokens. Which window a row reads is a pure function of (seed, step, micro, row): an epoch
visits every window once, in an order that `permute` computes on the spot. So nothing is
shuffled in memory, nothing is stored in a checkpoint, and resuming replays nothing.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64

from sparda_jax.errors import DataError
from sparda_jax.tokenizer import Tokenizer
from sparda_jax.training.order import permute

MANIFEST = "manifest.json"
"""The file that makes a folder a folder of token shards."""


@dataclasses.dataclass(frozen=True)
class SourceText:
    """A document as it was read.

    Attributes:
        file: the file that it came from.
        text: its text.
    """

    file: Path
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDocuments:
    """Documents as tokens, in memory or memory-mapped.

    Document `i` is `shards[shard_of[i]][starts[i] : starts[i] + lengths[i]]`.

    Attributes:
        shards: arrays of token ids.
        shard_of: the shard of each document.
        starts: where in its shard each document starts, 64-bit.
        lengths: tokens of each document, 64-bit, at least 1.
        separator_id: the id put after each document when documents are packed, or None.
        vocab_size: ids are below it.
    """

    shards: tuple[Int[np.ndarray, " _tokens"], ...]
    shard_of: Int64[np.ndarray, " documents"]
    starts: Int64[np.ndarray, " documents"]
    lengths: Int64[np.ndarray, " documents"]
    separator_id: int | None
    vocab_size: int

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Int[np.ndarray, " tokens"]:
        """The tokens of document `index`."""
        start = self.starts[index]
        return self.shards[self.shard_of[index]][start : start + self.lengths[index]]

    @property
    def token_count(self) -> int:
        """Tokens of all documents, separators left out."""
        return int(self.lengths.sum())

    def take(self, indices: Int64[np.ndarray, " chosen"]) -> "TokenDocuments":
        """The documents with these indices, in this order, over the same shards."""
        return dataclasses.replace(
            self,
            shard_of=self.shard_of[indices],
            starts=self.starts[indices],
            lengths=self.lengths[indices],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBatch:
    """One batch of packed windows.

    Attributes:
        tokens: token ids.
        lengths: tokens that count in each row; a packed window is always full.
        segments: which document of its window a token belongs to, from 0 at the window's first; a
            separator belongs to the document that it ends.
        first_documents: index of the document that each window begins in.
        first_offsets: where in that document it begins, in tokens; its length means its separator.
    """

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]
    segments: Int32[np.ndarray, "B T"]
    first_documents: Int64[np.ndarray, " B"]
    first_offsets: Int64[np.ndarray, " B"]


def read_texts(source: Path, *, field: str = "text") -> Iterator[SourceText]:
    """Read documents from a text file, a JSONL file, or a folder of them.

    A file that ends in `.jsonl` holds one document a line, in `field`; any other file is one
    document. A folder is read with its subfolders in order of name; hidden files are passed over.

    Args:
        source: the file or folder.
        field: the name of the text in a JSONL line.

    Yields:
        the documents, empty ones left out.

    Raises:
        DataError: if there is no such file, the folder holds no file, a file is not UTF-8 text, or
            a line is not a JSON object with the field.
    """
    for file in _source_files(source):
        if file.suffix == ".jsonl":
            texts = _jsonl_texts(file, field)
        else:
            texts = iter([_read_text(file)])
        yield from (SourceText(file, text) for text in texts if text)


def tokenize_source(source: Path, tokenizer: Tokenizer, *, field: str = "text") -> TokenDocuments:
    """Read text and tokenize it in memory; see `read_texts` for what `source` may be.

    Raises:
        DataError: as `read_texts`, and if all documents are empty.
    """
    encoded = (tokenizer.encode(document.text) for document in read_texts(source, field=field))
    documents = [np.array(ids, np.int32) for ids in encoded if ids]
    if not documents:
        raise DataError(f"{source.name!r} holds 0 tokens; at least 1 is needed: give more text")
    lengths = np.array([len(ids) for ids in documents], np.int64)
    return TokenDocuments(
        shards=(np.concatenate(documents),),
        shard_of=np.zeros(len(documents), np.int64),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        separator_id=tokenizer.separator_id,
        vocab_size=tokenizer.vocab_size,
    )


def open_shards(folder: Path) -> TokenDocuments:
    """Open token shards, memory-mapped, as `experiments.prepare_data` writes them.

    A shard is a one-dimensional int32 `.npy` with the int64 offsets of its documents beside it;
    the manifest lists the shards and names the tokenizer.

    Raises:
        DataError: if the manifest or a shard is missing or broken, or they disagree.
    """
    manifest = _read_manifest(folder)
    shards, shard_of, starts, lengths = [], [], [], []
    for number, entry in enumerate(manifest["shards"]):
        paths = (folder / entry["file"], folder / entry["offsets"])
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of 2 files of shard {number} are missing ({missing[0]!r} is the "
                "first); prepare the data again"
            )
        tokens, offsets = np.load(paths[0], mmap_mode="r"), np.load(paths[1])
        if not len(tokens) == offsets[-1] == entry["tokens"]:
            raise DataError(
                f"{entry['file']!r} holds {len(tokens)} tokens, its offsets end at {offsets[-1]} "
                f"and the manifest says {entry['tokens']}; prepare the data again"
            )
        shards.append(tokens)
        shard_of.append(np.full(len(offsets) - 1, number, np.int64))
        starts.append(offsets[:-1])
        lengths.append(np.diff(offsets))
    return TokenDocuments(
        shards=tuple(shards),
        shard_of=np.concatenate(shard_of),
        starts=np.concatenate(starts),
        lengths=np.concatenate(lengths),
        separator_id=manifest["tokenizer"]["separator_id"],
        vocab_size=manifest["tokenizer"]["vocab_size"],
    )


def split_heldout(
    documents: TokenDocuments, *, share: float, seed: int = 0
) -> tuple[TokenDocuments, TokenDocuments]:
    """Set documents aside for evaluation: no token is in both parts.

    Whole documents are drawn, at least one. A single document is cut instead: its end is held out.

    Args:
        documents: what to split.
        share: the share held out, of documents (or of the one document's tokens), in (0, 1).
        seed: which documents.

    Returns:
        the training documents and the held-out ones, each in their former order.

    Raises:
        ValueError: if `share` is not between 0 and 1.
        DataError: if there is a single document of a single token.
    """
    if not 0 < share < 1:
        raise ValueError(f"{share=} must be above 0 and below 1")
    if len(documents) == 1:
        length = documents.token_count
        if length < 2:
            raise DataError(f"1 document of {length} token cannot be split in 2; give more text")
        kept = np.array([min(max(round(length * (1 - share)), 1), length - 1)], np.int64)
        return (
            dataclasses.replace(documents, lengths=kept),
            dataclasses.replace(
                documents, starts=documents.starts + kept, lengths=documents.lengths - kept
            ),
        )
    count = min(max(round(len(documents) * share), 1), len(documents) - 1)
    order = np.random.default_rng(seed).permutation(len(documents))
    return documents.take(np.sort(order[count:])), documents.take(np.sort(order[:count]))


class PackedWindows:
    """Batches of full windows over packed documents: `batch_at(step)` for any step, in any order.

    Tokens after the last full window of the stream are not used.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        micro_batches: int = 1,
    ) -> None:
        """Lay out the windows; nothing is copied.

        Args:
            documents: what to read.
            seq_len: tokens in a window.
            batch_size: windows in one micro-batch.
            seed: of the order of windows.
            micro_batches: micro-batches in one step, for gradient accumulation.

        Raises:
            ValueError: if a size is below 1.
            DataError: if the documents do not fill one window.
        """
        if min(seq_len, batch_size, micro_batches) < 1:
            raise ValueError(f"{seq_len=}, {batch_size=} and {micro_batches=} must be at least 1")
        self._documents = documents
        self._separators = 0 if documents.separator_id is None else 1
        ends = np.cumsum(documents.lengths + self._separators)
        self._starts = np.concatenate([np.zeros(1, np.int64), ends])  # in the stream
        self.seq_len, self.batch_size, self.micro_batches = seq_len, batch_size, micro_batches
        self.seed = seed
        self.window_count = int(self._starts[-1]) // seq_len
        if self.window_count < 1:
            raise DataError(
                f"the text has {int(self._starts[-1])} tokens, separators included, fewer than one "
                f"window of {seq_len=}; give more text or a shorter window"
            )

    @property
    def steps_per_epoch(self) -> float:
        """Steps until every window was read once."""
        return self.window_count / (self.batch_size * self.micro_batches)

    def batch_at(self, step: int, micro: int = 0) -> TokenBatch:
        """Read the batch of a step.

        Args:
            step: from 0.
            micro: which of the step's micro-batches, from 0.

        Raises:
            ValueError: if `step` is negative or `micro` is not below `micro_batches`.
        """
        if step < 0 or not 0 <= micro < self.micro_batches:
            raise ValueError(
                f"{step=} must be at least 0 and {micro=} from 0 to below {self.micro_batches=}"
            )
        first = (step * self.micro_batches + micro) * self.batch_size
        rows = [self._window(first + row) for row in range(self.batch_size)]
        return TokenBatch(
            tokens=np.stack([row[0] for row in rows]),
            lengths=np.full(self.batch_size, self.seq_len, np.int32),
            segments=np.stack([row[1] for row in rows]),
            first_documents=np.array([row[2] for row in rows], np.int64),
            first_offsets=np.array([row[3] for row in rows], np.int64),
        )

    def _window(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"], int, int]:
        """The tokens and segments of the `index`-th window read, and where in which document."""
        epoch, position = divmod(index, self.window_count)
        place = np.array([position], np.uint64)
        window = int(permute(place, size=self.window_count, seed=self.seed, epoch=epoch)[0])
        start = window * self.seq_len
        separator = self._documents.separator_id
        document = first = int(np.searchsorted(self._starts, start, side="right")) - 1
        tokens = np.empty(self.seq_len, np.int32)
        segments = np.empty(self.seq_len, np.int32)
        filled = 0
        while filled < self.seq_len:
            offset = start + filled - int(self._starts[document])
            end = min(self.seq_len, filled + int(self._starts[document + 1]) - start - filled)
            text = self._documents[document][offset : offset + end - filled]
            tokens[filled : filled + len(text)] = text
            if separator is not None and len(text) < end - filled:
                tokens[end - 1] = separator
            segments[filled:end] = document - first
            filled = end
            document += 1
        return tokens, segments, first, start - int(self._starts[first])


def _source_files(source: Path) -> list[Path]:
    """The files of a source, in order of name."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"0 of 1 sources found: {source.name!r} is neither a file nor a folder")
    files = sorted(
        path
        for path in source.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(source).parts)
    )
    if not files:
        raise DataError(
            f"the folder {source.name!r} holds 0 files, at least 1 is needed; put text files in it"
        )
    return files


def _read_text(file: Path) -> str:
    """A file's text; refuses what is not text."""
    data = file.read_bytes()
    position = data.find(b"\0")
    if position >= 0:
        raise DataError(
            f"{file.name!r} is binary: of its {len(data)} bytes, byte {position} is NUL; leave it "
            "out or turn it into text"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.name!r} is not UTF-8: of its {len(data)} bytes, byte {error.start} cannot be "
            "read; leave it out or convert it"
        ) from error


def _jsonl_texts(file: Path, field: str) -> Iterator[str]:
    """The texts of a JSONL file; empty lines are passed over."""
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} of {file.name!r} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise DataError(
                f"line {number} of {file.name!r} has 0 texts named {field!r}, 1 is needed; give "
                "the name of its text as field"
            )
        yield record[field]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder.name!r} holds 0 of 1 {MANIFEST}, so it is no folder of token shards; make it "
            "with experiments.prepare_data"
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not manifest.get("shards"):
        raise DataError(f"{MANIFEST} in {folder.name!r} lists 0 shards, at least 1 is needed")
    return manifest
