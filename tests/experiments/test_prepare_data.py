# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Token shards: what is written is what training reads."""

import hashlib
import json

import numpy as np
import pytest

from experiments.prepare_data import Config, main
from sparda_jax.errors import DataError
from sparda_jax.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from sparda_jax.training.data import PackedWindows, open_shards, tokenize_source


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha é")
    (folder / "b.jsonl").write_text('{"text": "beta"}\n{"text": "gamma"}\n')
    (folder / "c.txt").write_text("delta" * 5)
    return folder


def test_shards_hold_the_tokens_that_reading_the_text_gives(source, tmp_path):
    main(Config(source, tmp_path / "out", shard_tokens=10))
    written, direct = open_shards(tmp_path / "out"), tokenize_source(source, ByteTokenizer())
    assert len(written.shards) == 2
    assert len(written) == len(direct) == 4
    for index in range(4):
        np.testing.assert_array_equal(written[index], direct[index])
    batches = [
        PackedWindows(documents, seq_len=9, batch_size=2, seed=1).batch_at(3)
        for documents in (written, direct)
    ]
    np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)


def test_the_manifest_tells_files_counts_and_tokenizer(source, tmp_path):
    manifest = main(Config(source, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert (manifest["tokens"], manifest["documents"]) == (8 + 9 + 25, 4)
    assert [(f["name"], f["documents"], f["tokens"]) for f in manifest["files"]] == [
        ("a.txt", 1, 8),
        ("b.jsonl", 2, 9),
        ("c.txt", 1, 25),
    ]
    data = (source / "b.jsonl").read_bytes()
    assert manifest["files"][1]["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["tokenizer"]["name"] == "bytes"
    assert (manifest["tokenizer"]["separator_id"], manifest["tokenizer"]["vocab_size"]) == (
        258,
        259,
    )


def test_any_tokenizer_file_can_be_used(source, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    vocab = {"[UNK]": 0, "alpha": 1, "beta": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    manifest = main(Config(source, tmp_path / "out", tokenizer=str(tmp_path)))
    documents = open_shards(tmp_path / "out")
    expected = HuggingFaceTokenizer(tmp_path).encode("alpha é")
    assert documents[0].tolist() == expected == [1, 0]
    assert documents.separator_id is None
    data = (tmp_path / "tokenizer.json").read_bytes()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_an_output_folder_that_is_not_empty_is_refused(source, tmp_path):
    with pytest.raises(DataError, match=r"'texts' holds 3 files, 0 are allowed"):
        main(Config(source, source))


def test_a_source_without_tokens_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"'a.txt' holds 0 tokens, at least 1 is needed"):
        main(Config(tmp_path / "a.txt", tmp_path / "out"))


def test_a_shard_has_at_least_one_token(tmp_path):
    with pytest.raises(ValueError, match=r"self.shard_tokens=0 must be at least 1"):
        Config(tmp_path, tmp_path / "out", shard_tokens=0)
