# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The corpus of the shipped backbone: the sources of Python's own standard library.

Every machine that can run this project already holds about 11 MB of well-kept text under a free
licence, so the small backbone needs no download. The split is by file name: the files in
`HELDOUT_NAMES` are never trained on, and neither is any other file with the same content.

What is trained on is the library of one Python release. `pack` writes it down once, with a sha256
for every file, so that a training run elsewhere reads the same bytes:

    python -m experiments.corpus --out runs/corpus
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8

from sparda_jax.errors import DataError

DOCUMENT_BYTES = 8192
"""Length of a held-out document."""

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "_bundled",  # wheels that ensurepip installs
        "dist-packages",
        "idle_test",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
"""Folders left out wherever they occur: tests, demos and what is not the library's own."""

SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
"""Names that hold what one machine's build wrote: its paths and its compiler flags."""

HELDOUT_NAMES = (
    "_markupbase.py",
    "base64.py",
    "bdb.py",
    "bz2.py",
    "calendar.py",
    "cmd.py",
    "code.py",
    "compileall.py",
    "contextlib.py",
    "csv.py",
    "dis.py",
    "filecmp.py",
    "fileinput.py",
    "fractions.py",
    "gettext.py",
    "graphlib.py",
    "gzip.py",
    "hashlib.py",
    "heapq.py",
    "html/parser.py",
    "http/cookies.py",
    "json/decoder.py",
    "json/encoder.py",
    "logging/config.py",
    "lzma.py",
    "mimetypes.py",
    "modulefinder.py",
    "multiprocessing/pool.py",
    "numbers.py",
    "pkgutil.py",
    "plistlib.py",
    "poplib.py",
    "pprint.py",
    "profile.py",
    "pstats.py",
    "pyclbr.py",
    "queue.py",
    "random.py",
    "runpy.py",
    "selectors.py",
    "shlex.py",
    "shutil.py",
    "smtplib.py",
    "socketserver.py",
    "statistics.py",
    "symtable.py",
    "tabnanny.py",
    "tempfile.py",
    "textwrap.py",
    "timeit.py",
    "trace.py",
    "tracemalloc.py",
    "types.py",
    "urllib/robotparser.py",
    "uuid.py",
    "warnings.py",
    "weakref.py",
    "webbrowser.py",
    "zipimport.py",
)
"""Files that are never trained on, named relative to the standard library's folder."""

Split = Literal["training", "heldout"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Where the corpus goes.

    Attributes:
        out: the folder for the packed corpus, both splits.
        heldout: the folder for held-out documents as text files; None writes none.
        heldout_count: how many of them.
    """

    out: Path
    heldout: Path | None = None
    heldout_count: int = 24


@dataclasses.dataclass(frozen=True)
class Document:
    """A file of the library, or a piece of one.

    Attributes:
        name: path relative to the library's folder, with forward slashes; a piece adds `@offset`.
        data: its bytes.
    """

    name: str
    data: bytes

    @property
    def sha256(self) -> str:
        """The content's sha256, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class PackedCorpus:
    """Documents laid end to end: document `i` is `data[offsets[i] : offsets[i + 1]]`.

    Attributes:
        data: all bytes, usually memory-mapped.
        offsets: 64-bit start of each document in `data`, and the end of the last.
    """

    data: UInt8[np.ndarray, " bytes"]
    offsets: Int[np.ndarray, " documents_and_end"]

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        """The bytes of document `index`, from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index=} must be at least 0 and below {len(self)}, the documents")
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


def library_folder() -> Path:
    """Find the running Python's standard library.

    Raises:
        DataError: if the library is not a folder of sources, as in a frozen or zipped Python.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "textwrap.py").is_file():
        raise DataError(
            f"the standard library at {str(folder)!r} holds 0 of the sources needed (1 looked for: "
            "textwrap.py); use a Python with its library unpacked, or read a packed corpus"
        )
    return folder


def is_in_corpus(name: str) -> bool:
    """Tell whether a file of the library belongs to the corpus, in either split.

    Args:
        name: path relative to the library's folder, with forward slashes.

    Example:
        >>> [is_in_corpus(n) for n in ("json/decoder.py", "test/test_json.py", "LICENSE.txt")]
        [True, False, False]
    """
    parts = name.split("/")
    skipped = any(part in SKIPPED_FOLDERS or part.startswith(SKIPPED_PREFIXES) for part in parts)
    return name.endswith(".py") and not skipped


@functools.cache
def _library_documents() -> tuple[Document, ...]:
    """All files of the corpus, sorted by name; empty files are left out."""
    root = library_folder()
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        relative = Path(folder).relative_to(root)
        names += [(relative / file).as_posix() for file in files]
    documents = (Document(n, (root / n).read_bytes()) for n in sorted(filter(is_in_corpus, names)))
    return tuple(document for document in documents if document.data)


def heldout_files() -> tuple[Document, ...]:
    """Read the held-out files whole, in the order of `HELDOUT_NAMES`.

    Raises:
        DataError: if the running Python lacks one of them.
    """
    by_name = {document.name: document for document in _library_documents()}
    missing = [name for name in HELDOUT_NAMES if name not in by_name]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(HELDOUT_NAMES)} held-out files are not in this Python's "
            f"library ({missing[0]!r} is the first); read a packed corpus instead"
        )
    return tuple(by_name[name] for name in HELDOUT_NAMES)


@functools.cache
def training_documents() -> tuple[Document, ...]:
    """Read what is trained on: every file of the corpus but the held-out ones, each content once.

    Returns:
        Documents sorted by name. A file whose content equals a held-out file's, or that of an
        earlier file, is left out.
    """
    seen = {document.sha256 for document in heldout_files()}
    kept = []
    for document in _library_documents():
        if document.name not in HELDOUT_NAMES and document.sha256 not in seen:
            seen.add(document.sha256)
            kept.append(document)
    return tuple(kept)


def heldout_documents(
    *, count: int | None = None, document_bytes: int = DOCUMENT_BYTES
) -> tuple[Document, ...]:
    """Cut the held-out files into documents of equal length.

    The first piece of every file comes first, then the second pieces, and so on. Pieces do not
    overlap. What is left at a file's end is dropped, and so is a piece that is not ASCII, so that
    every document is text on its own.

    Args:
        count: how many documents; None takes all there are.
        document_bytes: length of each, in bytes.

    Raises:
        DataError: if there are fewer than `count` such pieces.
    """
    return cut_documents(heldout_files(), count=count, document_bytes=document_bytes)


def cut_documents(
    files: Sequence[Document], *, count: int | None, document_bytes: int
) -> tuple[Document, ...]:
    """Cut `files` into pieces of `document_bytes`, round by round; see `heldout_documents`.

    Raises:
        DataError: if there are fewer than `count` such pieces.

    Example:
        >>> files = [Document("a.py", b"abcde"), Document("b.py", b"fg")]
        >>> [d.name for d in cut_documents(files, count=None, document_bytes=2)]
        ['a.py@0', 'b.py@0', 'a.py@2']
    """
    longest = max((len(file.data) for file in files), default=0)
    pieces = [
        Document(f"{file.name}@{start}", file.data[start : start + document_bytes])
        for start in range(0, longest - document_bytes + 1, document_bytes)
        for file in files
        if start + document_bytes <= len(file.data)
        and file.data[start : start + document_bytes].isascii()
    ]
    if count is not None and len(pieces) < count:
        raise DataError(
            f"the held-out files give {len(pieces)} documents of {document_bytes} bytes, fewer "
            f"than {count=}; ask for fewer or shorter ones"
        )
    return tuple(pieces[:count])


def manifest() -> dict[str, Any]:
    """Describe the corpus: Python's version and, for each file, its split, length and sha256."""
    splits = (("training", training_documents()), ("heldout", heldout_files()))
    return {
        "python": platform.python_version(),
        "bytes": {split: sum(len(d.data) for d in documents) for split, documents in splits},
        "files": [
            {"name": d.name, "split": split, "bytes": len(d.data), "sha256": d.sha256}
            for split, documents in splits
            for d in documents
        ],
    }


def write_heldout(folder: Path, *, count: int = 24) -> list[Path]:
    """Write the first held-out documents as `.txt` files, with a `manifest.json` beside them.

    Args:
        folder: where they go; made if missing.
        count: how many, each of `DOCUMENT_BYTES` bytes.

    Returns:
        the paths of the documents, in order.

    Raises:
        DataError: if there are fewer than `count` documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths, files = [], []
    for document in heldout_documents(count=count):
        name, start = document.name.split("@")
        path = folder / f"{name.removesuffix('.py').replace('/', '.')}.{start}.txt"
        path.write_bytes(document.data)
        paths.append(path)
        files.append({"file": path.name, "source": name, "offset": int(start)})
        files[-1] |= {"bytes": len(document.data), "sha256": document.sha256}
    _write_json(
        folder / "manifest.json",
        {
            "source": "excerpts of the Python standard library, never trained on",
            "licence": "PSF-2.0",
            "python": platform.python_version(),
            "files": files,
        },
    )
    return paths


def pack(folder: Path) -> Path:
    """Write both splits as arrays that another machine can train from.

    Writes `training.npy` and `heldout.npy` (uint8), their `*_offsets.npy` (int64, one more than
    documents) and `manifest.json`; about 12 MB.

    Args:
        folder: where they go; made if missing.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in (("training", training_documents()), ("heldout", heldout_files())):
        lengths = np.array([len(document.data) for document in documents], np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        data = np.frombuffer(b"".join(document.data for document in documents), np.uint8)
        np.save(folder / f"{split}.npy", data)
        np.save(folder / f"{split}_offsets.npy", offsets)
    _write_json(folder / "manifest.json", manifest())
    return folder


def main(config: Config) -> dict[str, int]:
    """Pack the corpus, and write held-out documents if a folder for them is given.

    Returns:
        the bytes of each split.
    """
    pack(config.out)
    if config.heldout is not None:
        write_heldout(config.heldout, count=config.heldout_count)
    return manifest()["bytes"]


def load_packed(folder: Path, *, split: Split = "training") -> PackedCorpus:
    """Open what `pack` wrote, memory-mapped.

    Args:
        folder: the folder given to `pack`.
        split: which documents.

    Raises:
        DataError: if the files are missing, or if data and offsets disagree.
    """
    paths = (folder / f"{split}.npy", folder / f"{split}_offsets.npy")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of 2 files of the packed corpus are missing ({missing[0]!r} is the "
            "first); write them with experiments.corpus.pack"
        )
    corpus = PackedCorpus(np.load(paths[0], mmap_mode="r"), np.load(paths[1]))
    if len(corpus.data) != corpus.offsets[-1]:
        raise DataError(
            f"{paths[0].name!r} holds {len(corpus.data)} bytes but its offsets end at "
            f"{corpus.offsets[-1]}; write both again with experiments.corpus.pack"
        )
    return corpus


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import tyro

    for split, size in main(tyro.cli(Config)).items():
        print(f"{split}: {size} bytes")
