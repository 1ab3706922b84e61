# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""What fewer bits on the host cost: the shipped model reads on from packed records.

    python -m experiments.host_dtype

Documents that the model never saw, then the questions after texts with needles, are read token by
token with offloaded K and V and as few slots as a choice needs, so that most blocks come back from
the host. The right token is fed whatever the model says, so the readings differ in nothing but what
the host holds. The record is `experiments/results/host_dtype.<device>.json`.
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments import records
from experiments.exam import needle_exam
from sparda_jax.kv.pack import check_host_dtype
from sparda_jax.model import SpardaLM
from sparda_jax.session import Session
from sparda_jax.shipped import heldout_texts, load_shipped
from sparda_jax.tokenizer import ByteTokenizer

PLAIN = "model's"
"""How a row names the model's own dtype."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is read, and how much of it.

    Attributes:
        host_dtypes: what the host holds; the first is what the others are compared with.
        batch: documents, and texts with needles.
        beginning: bytes of a document that are read at once.
        steps: bytes that are read one by one after them.
        context: bytes of a text with needles and its questions.
        questions: needles in each text, all of them asked for.
        seed: of needles.
        commit: hash of the commit that runs; None asks git.
        dirty: whether the tree differs from it; None asks git.
        date: of the run; None asks the clock.
        out: folder for the record; None writes none.
    """

    host_dtypes: tuple[str, ...] = (PLAIN, "int8", "float8_e4m3fn")
    batch: int = 8
    beginning: int = 7168
    steps: int = 512
    context: int = 8192
    questions: int = 8
    seed: int = 0
    commit: str | None = None
    dirty: bool | None = None
    date: str | None = None
    out: Path | None = records.RESULTS


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What the model said of each token that was fed, before it was.

    Attributes:
        nats: −log of the probability of the right token.
        said: the likeliest token.
        fetched: bytes that a step fetched, in the mean.
        host_bytes: of all records.
    """

    nats: Float[np.ndarray, "steps B"]
    said: Int[np.ndarray, "steps B"]
    fetched: float
    host_bytes: int


@jax.jit
def _judge(logits: Float[Array, "B V"], right: Int[Array, " B"]) -> tuple[Array, Array]:
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), right[:, None], axis=-1)[:, 0]
    return nats, jnp.argmax(logits, axis=-1)


def read_on(
    model: SpardaLM, tokens: Int[np.ndarray, "B S"], beginning: int, host_dtype: str
) -> Reading:
    """Read the beginnings at once and the rest token by token.

    Args:
        model: the decoder.
        tokens: of the rows.
        beginning: tokens read at once.
        host_dtype: what the host holds; `PLAIN` is the model's.
    """
    steps = tokens.shape[1] - beginning
    with Session(
        model,
        list(tokens[:, :beginning]),
        max_new_tokens=steps,
        kv="offload",
        slots=model.config.sparse.selected_blocks,
        host_dtype=None if host_dtype == PLAIN else check_host_dtype(host_dtype),
        prefill_rows=1,
    ) as session:
        logits, found = session.prefill(), []
        for step in range(steps):
            right = jnp.asarray(tokens[:, beginning + step], jnp.int32)
            found.append(_judge(logits, right))
            logits = session.step(right)
        nats, said = (np.stack(each) for each in zip(*jax.device_get(found), strict=True))
        traffic = session.traffic()
        return Reading(
            nats=nats,
            said=said,
            fetched=float(traffic.fetched_bytes.sum(axis=1).mean()),
            host_bytes=session.host_bytes,
        )


def _documents(count: int, size: int) -> tuple[np.ndarray, list[bytes]]:
    texts = [text.data for text in heldout_texts()[:count]]
    encode = ByteTokenizer().encode
    return np.stack([np.asarray(encode(text[:size].decode("ascii"))) for text in texts]), texts


def measure(config: Config) -> list[dict[str, object]]:
    """Read everything once for each dtype; a row for each.

    Args:
        config: what is read.

    Raises:
        ValueError: a dtype is unknown, or fewer documents are shipped than a batch.
    """
    model = load_shipped()
    documents, haystacks = _documents(config.batch, config.beginning + config.steps)
    if len(documents) < config.batch:
        raise ValueError(f"{config.batch=} documents are asked for, {len(documents)} are shipped")
    exam = needle_exam(
        haystacks,
        prompts=config.batch,
        questions=config.questions,
        context=config.context,
        seed=config.seed,
    )
    prompts = [prompt for prompt in exam.prompts if prompt is not None]
    predicting = np.stack([prompt.predicting_positions for prompt in prompts])  # [B Q 6]
    answers = np.stack([prompt.answer_tokens for prompt in prompts])
    beginning = int(predicting.min())
    rows: list[dict[str, object]] = []
    first: Reading | None = None
    for host_dtype in config.host_dtypes:
        text = read_on(model, documents, config.beginning, host_dtype)
        asked = read_on(model, exam.tokens, beginning, host_dtype)
        first = first or text
        # What is said at position p is a row's guess for p + 1.
        at = predicting + 1 - beginning
        said = np.stack([asked.said[at[row], row] for row in range(config.batch)])
        rows.append(
            {
                "host_dtype": host_dtype,
                "bits_per_byte": float(text.nats.mean() / math.log(2)),
                "bits_per_byte_ratio": float(text.nats.mean() / first.nats.mean()),
                "mean_nats_change": float(np.abs(text.nats - first.nats).mean()),
                "same_next_byte": float((text.said == first.said).mean()),
                "needle_accuracy": float((said == answers).all(axis=-1).mean()),
                "needle_samples": int(answers.shape[0] * answers.shape[1]),
                "fetched_bytes_per_step": text.fetched,
                "host_bytes": text.host_bytes,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(config: Config) -> records.Record:
    """Measure, print and write the record.

    Raises:
        ValueError: as `measure`, or the tree differs from the commit and a record is asked for.
    """
    settings = ("batch", "beginning", "steps", "context", "questions", "seed")
    head = records.head_of("host_dtype", config, settings)
    record = dataclasses.replace(head, rows=measure(config))
    if config.out is not None:
        print(records.write(record, config.out))
    return record


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
