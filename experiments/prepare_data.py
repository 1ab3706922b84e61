# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Turn a folder of text into token shards that training reads memory-mapped.

    python -m experiments.prepare_data --source texts --output runs/tokens

Writes `shard_00000.npy` (int32 ids), `shard_00000_offsets.npy` (int64, one more than documents) and
so on, and `manifest.json`: the tokenizer, and for every file its sha256, documents and tokens.
`sparda_jax.training.data.open_shards` opens the result.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from sparda_jax.errors import DataError
from sparda_jax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from sparda_jax.training.data import MANIFEST, read_texts


@dataclasses.dataclass(frozen=True)
class Config:
    """What to tokenize, with what, and where to put it.

    Attributes:
        source: a text file, a JSONL file, or a folder of them.
        output: an empty or new folder for the shards.
        tokenizer: `bytes`, or the path of a `tokenizer.json` or of the folder that holds it.
        field: the name of the text in a JSONL line.
        shard_tokens: a shard is closed as soon as it has this many tokens; no document is split.
    """

    source: Path
    output: Path
    tokenizer: str = "bytes"
    field: str = "text"
    shard_tokens: int = 2**27

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise ValueError(f"{self.shard_tokens=} must be at least 1")


class _ShardWriter:
    """Collects documents and writes a shard whenever enough tokens are there."""

    def __init__(self, folder: Path, shard_tokens: int) -> None:
        self.entries: list[dict[str, Any]] = []
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._documents: list[np.ndarray] = []
        self._tokens = 0

    def add(self, ids: list[int]) -> None:
        """Take one document."""
        self._documents.append(np.array(ids, np.int32))
        self._tokens += len(ids)
        if self._tokens >= self._shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what was collected, if anything."""
        if not self._documents:
            return
        stem = f"shard_{len(self.entries):05d}"
        lengths = np.array([len(ids) for ids in self._documents], np.int64)
        np.save(self._folder / f"{stem}.npy", np.concatenate(self._documents))
        np.save(
            self._folder / f"{stem}_offsets.npy",
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        )
        self.entries.append(
            {
                "file": f"{stem}.npy",
                "offsets": f"{stem}_offsets.npy",
                "documents": len(lengths),
                "tokens": self._tokens,
            }
        )
        self._documents, self._tokens = [], 0


def main(config: Config) -> dict[str, Any]:
    """Tokenize a source into shards.

    Returns:
        the manifest that was written.

    Raises:
        DataError: if the output folder is not empty, or the source has no usable text.
    """
    present = list(config.output.iterdir()) if config.output.is_dir() else []
    if present:
        raise DataError(
            f"the output folder {config.output.name!r} holds {len(present)} files, 0 are allowed; "
            "empty it or give another"
        )
    tokenizer, described = _load_tokenizer(config.tokenizer)
    files: dict[Path, dict[str, Any]] = {}
    root = config.source if config.source.is_dir() else config.source.parent
    config.output.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(config.output, config.shard_tokens)
    for document in read_texts(config.source, field=config.field):
        if document.file not in files:
            files[document.file] = {
                "name": document.file.relative_to(root).as_posix(),
                "sha256": hashlib.sha256(document.file.read_bytes()).hexdigest(),
                "documents": 0,
                "tokens": 0,
            }
        ids = tokenizer.encode(document.text)
        if ids:
            files[document.file]["documents"] += 1
            files[document.file]["tokens"] += len(ids)
            writer.add(ids)
    writer.flush()
    tokens = sum(entry["tokens"] for entry in writer.entries)
    if not tokens:
        raise DataError(f"{config.source.name!r} holds 0 tokens, at least 1 is needed")
    manifest = {
        "tokenizer": described,
        "tokens": tokens,
        "documents": sum(entry["documents"] for entry in writer.entries),
        "files": list(files.values()),
        "shards": writer.entries,
    }
    text = json.dumps(manifest, indent=1) + "\n"
    (config.output / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _load_tokenizer(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and what the manifest says about it."""
    if name == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
        origin = {"name": "bytes", "sha256": None}
    else:
        path = Path(name)
        tokenizer = HuggingFaceTokenizer(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        origin = {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return tokenizer, origin | {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "separator_id": tokenizer.separator_id,
    }


if __name__ == "__main__":
    import tyro

    made = main(tyro.cli(Config))
    print(
        f"{made['tokens']} tokens of {made['documents']} documents in {len(made['shards'])} shards"
    )
