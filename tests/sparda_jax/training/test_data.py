# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Training data: what is read, how it is packed, and that order depends on the step alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.errors import DataError
from sparda_jax.tokenizer import ByteTokenizer
from sparda_jax.training.data import (
    PackedWindows,
    TokenDocuments,
    open_shards,
    read_texts,
    split_heldout,
    tokenize_source,
)

BYTES = ByteTokenizer()
SEPARATOR = 258


def documents_of(*lengths, separator_id=SEPARATOR):
    """Documents in which every token is new: 0, 1, 2 and on."""
    lengths = np.array(lengths, np.int64)
    return TokenDocuments(
        shards=(np.arange(lengths.sum(), dtype=np.int32),),
        shard_of=np.zeros(len(lengths), np.int64),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        separator_id=separator_id,
        vocab_size=10**6,
    )


def stream_of(documents):
    """The packed stream by a loop: documents, each with its separator, and the segment of each."""
    tokens, owners = [], []
    for index in range(len(documents)):
        piece = documents[index].tolist()
        if documents.separator_id is not None:
            piece.append(documents.separator_id)
        tokens += piece
        owners += [index] * len(piece)
    return np.array(tokens), np.array(owners)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    seq_len=st.integers(1, 25),
    separator_id=st.sampled_from([SEPARATOR, None]),
)
@settings(deadline=None, max_examples=60)
def test_an_epoch_reads_every_full_window_of_the_stream_once(lengths, seq_len, separator_id):
    documents = documents_of(*lengths, separator_id=separator_id)
    tokens, owners = stream_of(documents)
    count = len(tokens) // seq_len
    if count == 0:
        return
    windows = PackedWindows(documents, seq_len=seq_len, batch_size=1, seed=3)
    assert windows.window_count == windows.steps_per_epoch == count
    read = [windows.batch_at(step) for step in range(count)]
    starts = []
    for batch in read:
        owner, offset = int(batch.first_documents[0]), int(batch.first_offsets[0])
        start = int(np.flatnonzero(owners == owner)[0]) + offset
        starts.append(start)
        expected = slice(start, start + seq_len)
        np.testing.assert_array_equal(batch.tokens[0], tokens[expected])
        np.testing.assert_array_equal(batch.segments[0], owners[expected] - owner)
        assert batch.lengths.tolist() == [seq_len]
    assert sorted(starts) == list(range(0, count * seq_len, seq_len))


def test_a_batch_depends_on_seed_and_step_alone():
    documents = documents_of(*range(5, 60))
    windows = PackedWindows(documents, seq_len=8, batch_size=4, seed=1)
    late = windows.batch_at(50)
    again = PackedWindows(documents, seq_len=8, batch_size=4, seed=1).batch_at(50)
    np.testing.assert_array_equal(late.tokens, again.tokens)
    assert not np.array_equal(late.tokens, windows.batch_at(51).tokens)
    other = PackedWindows(documents, seq_len=8, batch_size=4, seed=2).batch_at(50)
    assert not np.array_equal(late.tokens, other.tokens)


def test_epochs_read_the_same_windows_in_another_order():
    windows = PackedWindows(documents_of(400), seq_len=4, batch_size=100, seed=0)
    first, second = windows.batch_at(0).tokens, windows.batch_at(1).tokens
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.unique(first, axis=0), np.unique(second, axis=0))
    assert not np.array_equal(first, np.sort(first, axis=0))


def test_micro_batches_together_are_the_rows_of_one_large_batch():
    documents = documents_of(500)
    large = PackedWindows(documents, seq_len=4, batch_size=6)
    small = PackedWindows(documents, seq_len=4, batch_size=2, micro_batches=3)
    for step in (0, 7):
        parts = [small.batch_at(step, micro).tokens for micro in range(3)]
        np.testing.assert_array_equal(np.concatenate(parts), large.batch_at(step).tokens)


@pytest.mark.parametrize(("step", "micro"), [(-1, 0), (0, 2), (0, -1)])
def test_a_step_or_micro_batch_that_does_not_exist_is_refused(step, micro):
    windows = PackedWindows(documents_of(50), seq_len=4, batch_size=1, micro_batches=2)
    with pytest.raises(ValueError, match=rf"{step=} must be at least 0 and {micro=} .*=2"):
        windows.batch_at(step, micro)


def test_sizes_are_at_least_one():
    with pytest.raises(ValueError, match=r"seq_len=4, batch_size=0 and micro_batches=1 must be"):
        PackedWindows(documents_of(50), seq_len=4, batch_size=0)


def test_a_text_too_short_for_one_window_is_refused():
    with pytest.raises(DataError, match=r"has 11 tokens, .* fewer than one window of seq_len=12"):
        PackedWindows(documents_of(4, 5), seq_len=12, batch_size=1)
    assert PackedWindows(documents_of(4, 5), seq_len=11, batch_size=1).window_count == 1


def test_a_folder_is_read_in_order_of_name_without_hidden_files(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("first é")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": ""}\n{"text": "fourth"}\n')
    (tmp_path / "d.txt").write_text("")
    (tmp_path / ".hidden").write_bytes(b"\0")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "f").write_bytes(b"\0")
    found = list(read_texts(tmp_path))
    assert [document.text for document in found] == ["first é", "second", "third", "fourth"]
    assert found[3].file == tmp_path / "c.jsonl"


def test_tokens_of_a_source_are_those_of_its_texts(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.txt").write_text("cde")
    documents = tokenize_source(tmp_path, BYTES)
    assert [documents[i].tolist() for i in range(len(documents))] == [[97, 98], [99, 100, 101]]
    assert (documents.token_count, documents.separator_id, documents.vocab_size) == (5, 258, 259)
    packed = PackedWindows(documents, seq_len=7, batch_size=1).batch_at(0)
    assert packed.tokens.tolist() == [[97, 98, 258, 99, 100, 101, 258]]
    assert packed.segments.tolist() == [[0, 0, 0, 1, 1, 1, 1]]


def test_a_missing_source_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=r"0 of 1 sources found: 'none'"):
        tokenize_source(tmp_path / "none", BYTES)


def test_an_empty_folder_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=r"holds 0 files, at least 1 is needed"):
        tokenize_source(tmp_path, BYTES)


def test_a_folder_of_empty_files_is_one_clear_line(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"holds 0 tokens; at least 1 is needed"):
        tokenize_source(tmp_path, BYTES)


def test_a_binary_file_is_one_clear_line(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"ab\0cd")
    with pytest.raises(DataError, match=r"'a.bin' is binary: of its 5 bytes, byte 2 is NUL"):
        tokenize_source(tmp_path, BYTES)


def test_a_file_in_another_encoding_is_one_clear_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(DataError, match=r"'a.txt' is not UTF-8: of its 2 bytes, byte 1 cannot"):
        tokenize_source(tmp_path, BYTES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of 'a.jsonl' is not JSON"),
        ("[1]", "line 2 of 'a.jsonl' has 0 texts named 'body', 1 is needed"),
        ('{"text": "x"}', "line 2 of 'a.jsonl' has 0 texts named 'body', 1 is needed"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"body": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        list(read_texts(tmp_path / "a.jsonl", field="body"))


def test_heldout_documents_and_training_documents_share_nothing():
    documents = documents_of(*range(1, 21))
    training, heldout = split_heldout(documents, share=0.2, seed=5)
    assert (len(training), len(heldout)) == (16, 4)
    tokens = [np.concatenate([part[i] for i in range(len(part))]) for part in (training, heldout)]
    assert sorted(np.concatenate(tokens).tolist()) == list(range(documents.token_count))
    again = split_heldout(documents, share=0.2, seed=5)[1]
    np.testing.assert_array_equal(again.starts, heldout.starts)
    assert split_heldout(documents, share=0.2, seed=6)[1].starts.tolist() != heldout.starts.tolist()


def test_the_smallest_share_holds_out_one_document():
    training, heldout = split_heldout(documents_of(3, 3), share=0.01)
    assert len(training) == len(heldout) == 1


def test_the_end_of_a_single_document_is_held_out():
    training, heldout = split_heldout(documents_of(10), share=0.3)
    assert training[0].tolist() == list(range(7))
    assert heldout[0].tolist() == [7, 8, 9]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_heldout_share_leaves_something_on_both_sides(share):
    with pytest.raises(ValueError, match=f"share={share} must be above 0 and below 1"):
        split_heldout(documents_of(3, 3), share=share)


def test_a_single_token_cannot_be_split():
    with pytest.raises(DataError, match="1 document of 1 token cannot be split in 2"):
        split_heldout(documents_of(1), share=0.5)


@pytest.fixture
def shards(tmp_path):
    """Two shards of 5 and 4 tokens."""
    for number, lengths in enumerate([(2, 3), (4,)]):
        tokens = np.arange(sum(lengths), dtype=np.int32) + 10 * number
        np.save(tmp_path / f"{number}.npy", tokens)
        np.save(tmp_path / f"{number}_offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    entries = [
        {"file": f"{number}.npy", "offsets": f"{number}_offsets.npy", "tokens": tokens}
        for number, tokens in enumerate((5, 4))
    ]
    manifest = {"tokenizer": {"separator_id": 7, "vocab_size": 20}, "shards": entries}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_shards_are_read_as_one_list_of_documents_without_loading_them(shards):
    documents = open_shards(shards)
    assert [documents[i].tolist() for i in range(3)] == [[0, 1], [2, 3, 4], [10, 11, 12, 13]]
    assert (documents.separator_id, documents.vocab_size) == (7, 20)
    assert all(isinstance(shard, np.memmap) for shard in documents.shards)
    assert documents.starts.dtype == documents.lengths.dtype == np.int64
    packed = PackedWindows(documents, seq_len=12, batch_size=1).batch_at(0)
    assert packed.tokens.tolist() == [[0, 1, 7, 2, 3, 4, 7, 10, 11, 12, 13, 7]]


def test_a_folder_without_a_manifest_is_no_folder_of_shards(tmp_path):
    with pytest.raises(DataError, match=r"holds 0 of 1 manifest.json"):
        open_shards(tmp_path)


def test_a_manifest_without_shards_is_refused(shards):
    (shards / "manifest.json").write_text('{"shards": []}')
    with pytest.raises(DataError, match=r"lists 0 shards, at least 1 is needed"):
        open_shards(shards)


def test_a_missing_shard_is_named(shards):
    (shards / "1.npy").unlink()
    with pytest.raises(DataError, match=r"1 of 2 files of shard 1 are missing \('1.npy'"):
        open_shards(shards)


def test_a_shard_cut_short_is_refused(shards):
    np.save(shards / "0.npy", np.zeros(4, np.int32))
    with pytest.raises(DataError, match=r"'0.npy' holds 4 tokens, its offsets end at 5 .* says 5"):
        open_shards(shards)
