# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: bytes, a `tokenizer.json`, and text that comes piece by piece."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_jax.errors import DataError
from sparda_jax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, StreamDecoder, Tokenizer

BYTES = ByteTokenizer()


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE of 256 + 3 tokens, without merges, in a folder like a model's."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<end>"])
    made.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    return tmp_path


def test_bytes_are_their_own_ids():
    assert BYTES.encode("a\n€") == [97, 10, 0xE2, 0x82, 0xAC]
    assert (BYTES.bos_id, BYTES.eos_id, BYTES.separator_id, BYTES.vocab_size) == (
        256,
        257,
        258,
        259,
    )


@given(st.text(max_size=40))
def test_bytes_give_back_any_text_without_surrogates(text):
    assert BYTES.decode(BYTES.encode(text)) == text.encode("utf-8", "replace").decode()


def test_special_ids_are_no_text():
    assert BYTES.decode([256, 104, 258, 105, 257]) == "hi"


def test_broken_bytes_become_replacement_characters():
    assert BYTES.decode([0xE2, 65]) == "\ufffdA"


@pytest.mark.parametrize("token", [-1, 259])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"id {token} must be at least 0 and below vocab_size=259"):
        BYTES.decode([65, token])


def test_both_tokenizers_follow_the_protocol(folder):
    assert isinstance(BYTES, Tokenizer)
    assert isinstance(HuggingFaceTokenizer(folder), Tokenizer)


def test_special_ids_come_from_the_files_beside_the_tokenizer(folder):
    tokenizer = HuggingFaceTokenizer(folder / "tokenizer.json")
    assert tokenizer.bos_id == 256
    assert tokenizer.eos_id == 257
    assert tokenizer.eos_ids == (257, 258)
    assert tokenizer.separator_id == 257
    assert tokenizer.vocab_size == 259


def test_a_tokenizer_alone_has_no_special_ids(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").unlink()
    tokenizer = HuggingFaceTokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.separator_id) == (None, None, None)
    assert tokenizer.eos_ids == ()


def test_a_wrapped_tokenizer_gives_text_back_and_drops_special_ids(folder):
    tokenizer = HuggingFaceTokenizer(folder)
    ids = tokenizer.encode("def f(x):\n    return 'é'")
    assert 256 not in ids
    assert tokenizer.decode([256, *ids, 257]) == "def f(x):\n    return 'é'"


def test_a_wrapped_tokenizer_refuses_an_id_outside_its_vocabulary(folder):
    with pytest.raises(ValueError, match="id 259 must be at least 0 and below vocab_size=259"):
        HuggingFaceTokenizer(folder).decode([259])


def test_a_missing_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=r"0 of 1 tokenizer files found: 'tokenizer.json'"):
        HuggingFaceTokenizer(tmp_path)


def test_a_broken_tokenizer_is_one_clear_line(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"'tokenizer.json' \(2 bytes\) is not a tokenizer"):
        HuggingFaceTokenizer(folder)


def test_a_special_token_of_another_model_is_refused(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(DataError, match=r"eos_token '<stop>' .* none of the 259 tokens"):
        HuggingFaceTokenizer(folder)


def test_a_special_id_of_another_model_is_refused(folder):
    (folder / "config.json").write_text('{"bos_token_id": 300}')
    with pytest.raises(DataError, match=r"bos_token_id 300 .* below the vocabulary's 259"):
        HuggingFaceTokenizer(folder)


@pytest.mark.parametrize(
    ("content", "message"), [("{", r"\(1 bytes\) is not JSON"), ("[]", "1 JSON object, not a list")]
)
def test_a_broken_file_beside_the_tokenizer_is_refused(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(DataError, match=message):
        HuggingFaceTokenizer(folder)


def test_a_missing_package_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"sparda-jax\[train\]"):
        HuggingFaceTokenizer(tmp_path)


@given(st.lists(st.integers(0, 258), max_size=30))
@settings(deadline=None)
def test_streamed_bytes_join_to_the_whole_text(ids):
    stream = StreamDecoder(BYTES)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == BYTES.decode(ids)


def test_half_a_character_is_never_shown():
    stream = StreamDecoder(BYTES)
    assert [stream.push(byte) for byte in "€".encode()] == ["", "", "€"]
    assert stream.push(0xE2) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_a_wrapped_tokenizer_streams_the_whole_text(folder):
    tokenizer = HuggingFaceTokenizer(folder)
    ids = [256, *tokenizer.encode("naïve — ok"), 257]
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == "naïve — ok"
    assert "ï" in pieces
    assert stream.finish() == ""
