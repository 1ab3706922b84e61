# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The demo at tiny size, and what it says to a text that it cannot use."""

import json
import math
import subprocess
import sys

import pytest

from experiments import demo, shipped_model
from sparda_jax.config import ModelConfig
from sparda_jax.errors import CapacityError, DataError
from sparda_jax.testing import tiny_model

TEXT = b"".join(b"line %d of a text that says very little\n" % i for i in range(60))


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=259)


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "mine.txt").write_bytes(TEXT)
    config = demo.Config(
        text=folder / "mine.txt",
        context=384,
        out=folder / "out",
        questions=2,
        steps=12,
        train_tokens=128,
        recall_tokens=192,
        new_tokens=12,
    )
    return demo.main(config, model, [TEXT, TEXT[::-1]]), folder / "out"


@pytest.mark.slow
def test_the_demo_reports_every_number(report):
    report, folder = report
    written = json.loads((folder / "report.json").read_text())
    assert written.keys() == report.keys()
    assert written["bits_per_byte"].keys() == {"dense", "sparse", "sparda", "sparda_fresh"}
    assert written["needle_accuracy"].keys() >= {"dense", "sparse", "sparda"}
    assert written["needle_samples"] == 2
    assert written["recall"].keys() >= {"forecast", "previous_query", "forecast_fresh"}
    assert all(0.0 < share <= 1.0 for share in written["recall"].values())
    assert all(1.0 < bits < 20.0 for bits in written["bits_per_byte"].values())
    offload = written["offload"]
    assert offload["equal_tokens"] is True
    assert 0.0 < offload["hit_rate"] < 1.0
    assert 0 < offload["fetched_blocks_per_step"] < offload["chosen_blocks_per_step"]
    assert offload["device_kv_bytes"] < offload["full_kv_bytes"]
    assert written["seconds"].keys() >= {"train", "prefill", "decode"}
    assert written["config"]["context"] == 384
    assert written["versions"].keys() >= {"python", "jax", "flax", "sparda_jax"}


@pytest.mark.slow
def test_training_lowers_the_loss(report):
    history = report[0]["training"]
    assert len(history) == 12
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.slow
def test_the_demo_writes_its_figures_and_links_them(report):
    _, folder = report
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name in ("training.png", "choices.png", "memory.png"):
        assert f"({name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "`mine.txt`" in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is empty: 0 bytes, but --context asks for 100"),
        (b"abc", r"is too short: 3 bytes, but --context asks for 100"),
        (b"ab\xff" * 90, r"is binary: byte 2 of 270 is not UTF-8"),
        (b"ab\x00" * 90, r"is binary: byte 2 of 270 is zero"),
    ],
)
def test_a_text_that_cannot_be_used_gives_one_line(tmp_path, data, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        demo.read_text(path, 100)
    assert "\n" not in str(error.value)


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(DataError, match="0 of 1 texts"):
        demo.read_text(tmp_path / "none.txt", 100)


def test_a_context_beyond_the_models_is_refused():
    config = demo.Config(context=9000, new_tokens=96)
    with pytest.raises(CapacityError, match=r"9000 is too long.* 8704 .* 96; ask for 8608"):
        demo.check_sizes(config, ModelConfig.shipped())


@pytest.mark.parametrize("name", ["context", "train_tokens", "recall_tokens"])
def test_a_text_without_a_choice_is_refused(name):
    config = demo.Config(**{name: 512})
    with pytest.raises(DataError, match=r"512 is too short: a query reads 512 tokens, so 1024"):
        demo.check_sizes(config, ModelConfig.shipped())


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    run = subprocess.run(
        [sys.executable, "-m", "experiments.demo", "--text", str(tmp_path / "empty.txt")],
        capture_output=True,
        text=True,
        cwd=demo.ROOT,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        "error: 'empty.txt' is empty: 0 bytes, but --context asks for 8192"
    ]


@pytest.mark.slow
def test_the_evaluation_of_the_shipped_model_has_the_keys_of_the_report(model):
    config = shipped_model.Config(
        dtype="float32",
        context=192,
        batch=2,
        documents=3,
        prompts=2,
        questions=1,
        recall_documents=2,
        fresh_steps=2,
        fresh_batch=2,
        fresh_tokens=96,
        new_tokens=6,
    )
    documents = [TEXT[i * 200 : i * 200 + 192] for i in range(4)]
    haystacks = [TEXT[i : i + 192] for i in range(4)]
    told = []
    report = shipped_model.measure(
        model, config, heldout=haystacks, training=documents, tell=lambda *a: told.append(a)
    )
    assert report["bits_per_byte"].keys() == {"dense", "sparse", "sparda", "sparda_fresh"}
    assert report["documents"] == 3
    assert report["needle_samples"] == 2
    assert report["recall"].keys() == {
        "forecast", "forecast_fresh", "previous_query", "query", "random"
    }  # fmt: skip
    assert math.isclose(
        report["recall"]["query"], sum(report["recall_by_layer"]["query"][1:]) / 2, rel_tol=1e-6
    )
    assert report["offload"]["equal_tokens"] is True
    assert report["offload"]["prompts"] == 3
    assert report["seconds"].keys() == {"train", "prefill", "decode"}
    assert ("recall", 2, 2) in told


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="prompts=0 must be at least 1"):
        shipped_model.Config(prompts=0)
    with pytest.raises(ValueError, match=r"recall_documents=16 must not exceed .*documents=8"):
        shipped_model.Config(documents=8)


def test_a_tree_with_changes_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(shipped_model, "load_shipped", lambda *args, **named: pytest.fail("read"))
    config = shipped_model.Config(commit="0123abcd", dirty=True)
    with pytest.raises(ValueError, match="the tree differs from commit 0123abcd"):
        shipped_model.main(config)


def test_too_few_documents_are_refused(tmp_path, monkeypatch):
    from experiments import corpus

    folder = tmp_path / "packed"
    monkeypatch.setattr(corpus, "training_documents", lambda: (corpus.Document("a", b"xy" * 50),))
    monkeypatch.setattr(corpus, "heldout_files", lambda: (corpus.Document("b", b"zw" * 50),))
    corpus.pack(folder)
    config = shipped_model.Config(corpus=folder, context=50, documents=16)
    with pytest.raises(DataError, match=r"2 held-out documents of 50 bytes, but .*documents=16"):
        shipped_model.read_documents(config)
    few = shipped_model.Config(corpus=folder, context=50, documents=2, recall_documents=2)
    held, training = shipped_model.read_documents(few)
    assert held == [b"zw" * 25] * 2
    assert training == [b"xy" * 50]
