# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The backbone's corpus: what is in it, and that nothing held out is trained on."""

import hashlib
import json

import numpy as np
import pytest

from experiments import corpus
from experiments.corpus import DOCUMENT_BYTES, HELDOUT_NAMES, Document
from sparda_jax.errors import DataError


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of four files, two of them held out; caches are emptied before and after."""
    folder = tmp_path / "library"
    files = {
        "textwrap.py": b"wrap = 1\n" * 4,
        "held.py": b"held = 2\n" * 4,
        "pack/copy.py": b"held = 2\n" * 4,
        "pack/own.py": b"own = 3\n",
        "pack/twin.py": b"own = 3\n",
        "pack/__init__.py": b"",
        "test/test_wrap.py": b"assert True\n",
        "config-x/made.py": b"path = 4\n",
        "notes.txt": b"text\n",
    }
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(folder))
    monkeypatch.setattr(corpus, "HELDOUT_NAMES", ("textwrap.py", "held.py"))
    _forget()
    yield folder
    _forget()


def _forget():
    corpus._library_documents.cache_clear()
    corpus.training_documents.cache_clear()


def test_no_heldout_file_is_trained_on_by_name_or_by_content():
    training = corpus.training_documents()
    heldout = corpus.heldout_files()
    assert len(training) > 300
    assert tuple(d.name for d in heldout) == HELDOUT_NAMES
    assert not {d.name for d in training} & set(HELDOUT_NAMES)
    assert not {d.sha256 for d in training} & {d.sha256 for d in heldout}


def test_hardly_a_long_line_of_a_heldout_file_is_in_the_training_text():
    def long_lines(document):
        return [line.strip() for line in document.data.split(b"\n") if len(line.strip()) >= 40]

    seen = {line for document in corpus.training_documents() for line in long_lines(document)}
    lines = [line for document in corpus.heldout_files() for line in long_lines(document)]
    assert len(lines) > 10_000
    assert sum(line in seen for line in lines) < 0.03 * len(lines)


def test_no_test_of_the_library_and_no_installed_package_is_in_the_corpus():
    names = [d.name for d in corpus.training_documents()]
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & corpus.SKIPPED_FOLDERS
    assert not any(name.startswith("_sysconfigdata") for name in names)


def test_there_are_sixty_four_heldout_documents_of_one_length_that_share_nothing():
    documents = corpus.heldout_documents(count=64)
    assert {len(d.data) for d in documents} == {DOCUMENT_BYTES}
    assert all(d.data.isascii() for d in documents)
    assert len({d.name for d in documents}) == len({d.sha256 for d in documents}) == 64
    assert len({d.name.split("@")[0] for d in documents}) > 50


def test_a_piece_is_the_bytes_at_the_offset_in_its_name():
    whole = {d.name: d.data for d in corpus.heldout_files()}
    for document in corpus.heldout_documents():
        name, start = document.name.split("@")
        assert document.data == whole[name][int(start) : int(start) + DOCUMENT_BYTES]


def test_a_piece_that_is_not_ascii_is_dropped():
    files = [Document("a.py", b"ab\xc3\xa9ef")]
    pieces = corpus.cut_documents(files, count=None, document_bytes=2)
    assert [d.name for d in pieces] == ["a.py@0", "a.py@4"]


def test_more_heldout_documents_than_there_are_is_an_error():
    with pytest.raises(DataError, match=r"give 2 documents of 2 bytes, fewer than count=3"):
        corpus.cut_documents([Document("a.py", b"abcde")], count=3, document_bytes=2)


def test_empty_files_tests_and_second_copies_are_left_out(library):
    assert [d.name for d in corpus.training_documents()] == ["pack/own.py"]
    assert [d.name for d in corpus.heldout_files()] == ["textwrap.py", "held.py"]


def test_a_library_without_a_heldout_file_is_an_error(library):
    (library / "held.py").unlink()
    with pytest.raises(DataError, match=r"1 of 2 held-out files .* \('held.py' is the first\)"):
        corpus.heldout_files()


def test_a_library_without_sources_is_an_error(library):
    (library / "textwrap.py").unlink()
    with pytest.raises(DataError, match=r"holds 0 of the sources needed \(1 looked for"):
        corpus.library_folder()


def test_the_manifest_names_every_file_with_its_sha256(library):
    manifest = corpus.manifest()
    assert manifest["bytes"] == {"training": 8, "heldout": 72}
    assert [(f["name"], f["split"]) for f in manifest["files"]] == [
        ("pack/own.py", "training"),
        ("textwrap.py", "heldout"),
        ("held.py", "heldout"),
    ]
    assert manifest["files"][0]["sha256"] == hashlib.sha256(b"own = 3\n").hexdigest()


def test_a_packed_corpus_gives_back_both_splits(library, tmp_path):
    folder = corpus.pack(tmp_path / "packed")
    for split, documents in (
        ("training", corpus.training_documents()),
        ("heldout", corpus.heldout_files()),
    ):
        packed = corpus.load_packed(folder, split=split)
        assert packed.offsets.dtype == np.int64
        assert [packed[i] for i in range(len(packed))] == [d.data for d in documents]
    assert json.loads((folder / "manifest.json").read_text()) == corpus.manifest()


def test_a_document_outside_the_packed_corpus_is_refused(library, tmp_path):
    packed = corpus.load_packed(corpus.pack(tmp_path / "packed"))
    with pytest.raises(IndexError, match=r"index=1 must be at least 0 and below 1"):
        packed[1]


def test_a_packed_corpus_with_files_missing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"2 of 2 files .* missing \('training.npy' is the first\)"):
        corpus.load_packed(tmp_path)


def test_a_packed_corpus_cut_short_is_refused(library, tmp_path):
    folder = corpus.pack(tmp_path / "packed")
    np.save(folder / "training.npy", np.zeros(5, np.uint8))
    with pytest.raises(DataError, match=r"holds 5 bytes but its offsets end at 8"):
        corpus.load_packed(folder)


def test_the_heldout_documents_written_are_those_of_the_manifest(tmp_path):
    paths = corpus.write_heldout(tmp_path / "heldout", count=3)
    manifest = json.loads((tmp_path / "heldout" / "manifest.json").read_text())
    assert [f["file"] for f in manifest["files"]] == [path.name for path in paths]
    for path, entry in zip(paths, manifest["files"], strict=True):
        data = path.read_bytes()
        assert path.suffix == ".txt"
        assert len(data) == entry["bytes"] == DOCUMENT_BYTES
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert entry["source"] in HELDOUT_NAMES


def test_the_script_packs_the_corpus_and_writes_heldout_documents(tmp_path):
    config = corpus.Config(tmp_path / "packed", heldout=tmp_path / "heldout", heldout_count=2)
    sizes = corpus.main(config)
    for split, size in sizes.items():
        assert len(corpus.load_packed(tmp_path / "packed", split=split).data) == size > 10**6
    assert len(list((tmp_path / "heldout").glob("*.txt"))) == 2


def test_the_script_writes_no_heldout_documents_unasked(library, tmp_path):
    assert corpus.main(corpus.Config(tmp_path / "packed")) == {"training": 8, "heldout": 72}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["library", "packed"]
