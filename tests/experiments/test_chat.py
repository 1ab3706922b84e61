# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Questions about a file: prompts, streamed answers, numbers, and every refusal."""

import dataclasses
import json
import types

import numpy as np
import pytest

from experiments import chat
from experiments.chat import Chat, Config, main, open_chat
from sparda_jax.errors import CapacityError, DataError
from sparda_jax.generate import generate
from sparda_jax.model import SpardaLM
from sparda_jax.testing import tiny_model
from sparda_jax.tokenizer import ByteTokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
WORDS = "the quick brown fox jumps over a lazy dog. " * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with a byte-level tokenizer.json and a chat template."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    made = tmp_path_factory.mktemp("chat") / "model"
    model = tiny_model(vocab_size=264)
    model.save_pretrained(made, eos_ids=[257, 259])
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(made / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (made / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": True}))
    return made


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    return path


def small(text, **fields):
    return Config(file=text, **({"max_new_tokens": 6, "context": 150} | fields))


def test_an_answer_streams_and_is_what_generate_gives(folder, text, capsys):
    config = small(text, model=str(folder), question="Who jumps?")
    rows = main(config)
    opened = open_chat(config)
    prompt = opened.prompt(WORDS[:150], "Who jumps?", thinking=False)
    assert prompt[:2] == [256, 258]
    whole = opened.tokenizer.encode(f"user\n{WORDS[:150]}\n\nWho jumps?")
    assert prompt[2 : 2 + len(whole)] == whole
    assert prompt[2 + len(whole)] == 259
    want = generate(opened.model, [prompt], max_new_tokens=6, kv="offload", eos_ids=opened.eos_ids)
    assert opened.eos_ids == (257, 259)
    [row] = rows
    assert row["answer"] == opened.tokenizer.decode(want.tokens[0])
    assert (row["prompt_tokens"], row["new_tokens"]) == (len(prompt), len(want.tokens[0]))
    assert row["place"] == "offload"
    assert 0 < row["device_kv_bytes"] < row["full_kv_bytes"] == want.full_kv_bytes
    assert 0.0 <= row["hit_rate"] <= 1.0
    told = capsys.readouterr().out
    assert told.startswith(row["answer"])
    assert f"[{len(prompt)} tokens read in" in told
    assert "tokens/s; KV memory: " in told
    assert "MiB in full (offload), hit rate" in told


class Told:
    """A tokenizer of letters, to see pieces arrive."""

    bos_id = eos_id = separator_id = None
    vocab_size = 64

    def encode(self, text):
        return [ord(c) % 64 for c in text]

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids)


def test_pieces_come_one_by_one_and_an_end_token_is_not_shown(text):
    chat_of = Chat(tiny_model(), Told(), None, ())
    config = small(text, context=None, max_new_tokens=5, kv="auto")
    pieces = []
    given = chat.answer(chat_of, config, WORDS[:60], "?", pieces.append)
    assert pieces == [*given.text, ""]
    assert len(given.text) == len(given.generation.tokens[0]) == 5
    assert given.generation.place == "resident"
    ends = dataclasses.replace(chat_of, eos_ids=(given.generation.tokens[0][0],))
    given = chat.answer(ends, config, WORDS[:60], "?", pieces.append)
    assert (given.text, len(given.generation.tokens[0]), given.tokens_per_s) == ("", 1, 0.0)


def test_the_rate_leaves_out_what_compiles(text, monkeypatch):
    clock = iter([0.0, 60.0, 60.5, 61.0, 61.5])
    named = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(chat, "time", named)
    chat_of = Chat(tiny_model(), Told(), None, ())
    given = chat.answer(chat_of, small(text, max_new_tokens=5), WORDS[:60], "?", len)
    assert given.tokens_per_s == 2.0


def test_another_temperature_draws_by_its_seed(text):
    chat_of = Chat(tiny_model(), Told(), None, ())
    hot = small(text, temperature=5.0, kv="auto")
    one, again, other = (
        chat.answer(chat_of, dataclasses.replace(hot, seed=seed), "words", "?", len).text
        for seed in (1, 1, 2)
    )
    assert one == again != other
    with pytest.raises(ValueError, match=r"temperature=-1\.0 must be at least 0"):
        chat.answer(chat_of, dataclasses.replace(hot, temperature=-1.0), "words", "?", len)


def test_questions_are_read_until_an_empty_line(folder, text, monkeypatch):
    lines = iter(["Who?", "What? ", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    rows = main(small(text, model=str(folder), context=40, max_new_tokens=2))
    assert [row["question"] for row in rows] == ["Who?", "What?"]

    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert main(small(text), Chat(tiny_model(), Told(), None, ())) == []


def test_plain_text_needs_no_template(folder, text, tmp_path):
    config = small(text, model=str(folder), plain=True, heads=folder / "heads.safetensors")
    opened = open_chat(config)
    assert opened.template is None
    assert opened.prompt("ab", "c?", thinking=True) == opened.tokenizer.encode("ab\n\nc?")
    SpardaLM.from_pretrained(folder, progress=None).save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="'bare' has no chat template"):
        open_chat(small(text, model=str(tmp_path / "bare")))


def test_a_template_that_writes_bos_gets_no_second_one(folder, text):
    opened = open_chat(small(text, model=str(folder)))
    named = chat.ChatTemplate(
        "{{ bos_token }}{{ messages[0].content }}",
        special_tokens={"bos_token": "<s>"},
        adds_bos=True,
    )
    twice = dataclasses.replace(opened, template=named)
    assert twice.prompt("a", "b", thinking=False).count(256) == 1


def test_the_shipped_model_reads_bytes():
    opened = open_chat(Config(file=None, dtype="bfloat16"))
    assert isinstance(opened.tokenizer, ByteTokenizer)
    assert opened.model.config.dtype == "bfloat16"
    assert opened.prompt("né", "?", thinking=False) == list("né\n\n?".encode())
    with pytest.raises(ValueError, match=r"heads='x\.pt' is for other models than 'shipped'"):
        open_chat(Config(file=None, heads=chat.pathlib.Path("x.pt")))


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path):
    chat_of = Chat(tiny_model(), Told(), None, ())
    with pytest.raises(DataError, match=r"none\.txt' is not a file \(0 of 1 found\)"):
        main(Config(file=tmp_path / "none.txt"), chat_of)
    (tmp_path / "binary").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="'binary' is not text: byte 2 of 3 is not UTF-8"):
        main(Config(file=tmp_path / "binary"), chat_of)
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(DataError, match=r"'empty' is empty \(2 characters\)"):
        main(Config(file=tmp_path / "empty"), chat_of)
    (tmp_path / "words").write_text(WORDS)
    with pytest.raises(ValueError, match=r"config\.context=0 must be at least 1"):
        main(Config(file=tmp_path / "words", context=0), chat_of)


def test_a_file_longer_than_the_context_is_refused_before_any_work(text):
    long = Config(file=text, question="?", max_new_tokens=900)
    with pytest.raises(CapacityError, match=r"900 may follow: \d+ in all, but config.max_context="):
        main(long, Chat(tiny_model(), Told(), None, ()))


def test_a_status_line_gives_tokens_per_second_and_both_memories():
    numbers = {
        "prompt_tokens": 8000,
        "new_tokens": 12,
        "tokens_per_s": 31.24,
        "prefill_seconds": 2.0,
        "place": "offload",
        "device_kv_bytes": 3 << 20,
        "full_kv_bytes": 12 << 20,
        "hit_rate": np.float64(0.9375),
    }
    assert chat.status_line(numbers) == (
        "[8000 tokens read in 2.0 s, 12 written at 31.2 tokens/s; KV memory: 3.0 MiB on the device "
        "of 12.0 MiB in full (offload), hit rate 0.938]"
    )
