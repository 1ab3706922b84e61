# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""A batch kept full: each request gets what it gets alone, and joining compiles nothing."""

import jax
import numpy as np
import pytest

from sparda_jax.batcher import Batcher
from sparda_jax.config import RopeConfig
from sparda_jax.decode import draw_program
from sparda_jax.errors import CapacityError, DataError
from sparda_jax.generate import generate
from sparda_jax.sampling import Sampling
from sparda_jax.testing import tiny_model

LENGTHS = (61, 18, 150, 5, 90, 33, 7)
NEW = (30, 12, 25, 40, 1, 17, 9)
ROOM = {"prompt_tokens": 160, "max_new_tokens": 40}
PLACES = [
    pytest.param({"kv": "resident"}, id="resident"),
    pytest.param({"kv": "offload", "fetch": "in_graph"}, id="in_graph"),
    pytest.param({"kv": "offload", "fetch": "device_put"}, id="device_put"),
]


def prompts(lengths=LENGTHS):
    return [np.random.default_rng(n).integers(0, 64, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model():
    rope = RopeConfig(  # what a row may reach matters
        kind="longrope",
        original_max_positions=100,
        max_positions=1024,
        short_factor=(1.0, 1.1, 1.2, 1.3),
        long_factor=(1.0, 1.5, 2.0, 3.0),
    )
    return tiny_model(layers=2, rope=rope)


@pytest.fixture(scope="module")
def alone(model):
    return [
        generate(model, [prompt], max_new_tokens=new).tokens[0]
        for prompt, new in zip(prompts(), NEW, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_every_request_gets_what_it_gets_alone(model, alone, place):
    heard = {}
    listen = lambda request, token: heard.setdefault(request, []).append(token)
    with Batcher(model, 3, **ROOM, **place, on_token=listen) as batcher:
        for prompt, new in zip(prompts(), NEW, strict=True):
            batcher.submit(prompt, new)
        found = {done.request: done for done in batcher.run()}
    assert [found[number].tokens for number in range(len(alone))] == alone
    assert [heard[number] for number in range(len(alone))] == alone
    assert {done.reason for done in found.values()} == {"length"}


def test_requests_may_come_while_others_run_and_rows_are_used_again(model, alone):
    with Batcher(model, 1, **ROOM, kv="resident") as batcher:
        batcher.submit(prompts()[1], NEW[1])
        found = []
        for done in batcher.run():
            found.append(done)
            if len(found) == 1:
                batcher.submit_all([prompts()[6], prompts()[3]], NEW[6])
    assert [done.request for done in found] == [0, 1, 2]
    assert found[0].tokens == alone[1]
    assert found[1].tokens == alone[6]
    assert found[2].tokens == alone[3][: NEW[6]]


def test_joining_and_leaving_compile_nothing(model):
    with Batcher(model, 2, **ROOM, kv="resident") as batcher:
        batcher.submit_all(prompts((20, 30)), 3)
        assert len(list(batcher.run())) == 2
        decoder = batcher._decoder
        program = draw_program(decoder._layout, decoder._way, batcher._draw)
        before = program._cache_size()
        batcher.submit_all(prompts((150, 3, 64, 65)), 5)
        assert len(list(batcher.run())) == 4
        assert program._cache_size() == before


def test_an_end_token_frees_the_row(model, alone):
    end = alone[0][4]
    with Batcher(model, 1, **ROOM, kv="resident", eos_ids=(end,)) as batcher:
        batcher.submit(prompts()[0], NEW[0])
        batcher.submit(prompts()[1], 2)
        first, second = batcher.run()
    assert first.tokens == alone[0][: alone[0].index(end) + 1]
    assert first.reason == "eos"
    assert second.request == 1


def test_a_request_draws_by_its_number_whoever_shares_the_batch(model):
    warm = {"sampling": Sampling(temperature=1.0, top_k=20), "key": jax.random.key(3)}
    drawn = []
    for rows in (1, 3):
        with Batcher(model, rows, **ROOM, kv="resident", **warm) as batcher:
            batcher.submit_all(prompts((18, 33, 7)), 8)
            drawn.append({done.request: done.tokens for done in batcher.run()})
    assert drawn[0] == drawn[1]
    together = generate(model, prompts((18, 33, 7)), max_new_tokens=8, kv="resident", **warm)
    assert drawn[0] == dict(enumerate(together.tokens))


def test_what_does_not_fit_is_refused_when_it_is_submitted(model):
    with Batcher(model, 1, prompt_tokens=10, max_new_tokens=4) as batcher:
        with pytest.raises(CapacityError, match=r"11 tokens .* prompt_tokens=10 and max_new_tok"):
            batcher.submit([1] * 11)
        with pytest.raises(CapacityError, match=r"max_new_tokens=5 do not fit"):
            batcher.submit([1], 5)
        with pytest.raises(DataError, match="token 64"):
            batcher.submit([64])
        assert list(batcher.run()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens=0 must be at least 1"),
        ({"sampling": Sampling(temperature=1.0)}, "needs a key; got key=None"),
    ],
)
def test_a_batcher_that_could_not_work_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        Batcher(model, **({"rows": 1, "prompt_tokens": 4, "max_new_tokens": 2} | options))


def test_an_exception_frees_the_host_memory(model):
    opened = []

    def interrupted():
        with Batcher(model, 1, **ROOM, kv="offload") as batcher:
            opened.append(batcher._host)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert opened[0].is_closed
