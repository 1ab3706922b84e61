# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Ask questions about a long file, with its K and V on the host.

    python -m experiments.chat --file book.txt
    python -m experiments.chat --file book.txt --model openbmb/MiniCPM4.1-8B --question "Who?"

Answers stream; after each stand the tokens per second and the KV memory. Every question reads the
file anew, so no question knows of another.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

from sparda_jax.chat_template import ChatTemplate
from sparda_jax.errors import DataError, SpardaError
from sparda_jax.generate import Generation, Progress, generate
from sparda_jax.model import SpardaLM
from sparda_jax.sampling import Sampling
from sparda_jax.session import KVPlace
from sparda_jax.shapes import Mode
from sparda_jax.shipped import load_shipped
from sparda_jax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, StreamDecoder, Tokenizer
from sparda_jax.weights.folder import resolve_folder

SHIPPED = "shipped"
"""The name of the model that comes with the package."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What is read, who answers, and how.

    Attributes:
        file: the text that the questions are about, UTF-8.
        question: one question; None reads them from the terminal until an empty line.
        model: `shipped`, or a folder or hub id in Hugging Face's layout with a tokenizer.json.
        plain: put the question after the text instead of into the chat template. The shipped
            model knows nothing else.
        thinking: what chat templates with a variable `enable_thinking` are told.
        context: tokens of the file that are read, from its start; None reads all of it.
        mode: `sparda`, `sparse` or `dense`; dense needs `kv` to be `resident` or `auto`.
        kv: where K and V are: `offload` (host), `resident` (device) or `auto`.
        heads: Forecast heads of another file; None takes the model's own.
        dtype: of the parameters; None takes the checkpoint's.
        max_new_tokens: the longest answer.
        temperature: 0 always takes the likeliest token.
        seed: of the drawing at other temperatures.
    """

    file: pathlib.Path
    question: str | None = None
    model: str = SHIPPED
    plain: bool = False
    thinking: bool = False
    context: int | None = None
    mode: Mode = "sparda"
    kv: KVPlace = "offload"
    heads: pathlib.Path | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """A model with what turns questions into its tokens and back.

    Attributes:
        model: the decoder.
        tokenizer: its tokenizer.
        template: its chat template; None for plain text.
        eos_ids: tokens that end an answer.
    """

    model: SpardaLM
    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: tuple[int, ...]

    def prompt(self, text: str, question: str, *, thinking: bool) -> list[int]:
        """Turn the text and a question about it into one prompt.

        Args:
            text: what the question is about.
            question: comes after it.
            thinking: what the template's `enable_thinking` is.
        """
        whole = f"{text}\n\n{question}"
        if self.template is None:
            return self.tokenizer.encode(whole)
        messages = [{"role": "user", "content": whole}]
        ids = self.tokenizer.encode(self.template.render(messages, enable_thinking=thinking))
        bos = self.tokenizer.bos_id
        if self.template.adds_bos and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids


def open_chat(config: Config) -> Chat:
    """Load the model, its tokenizer and its chat template.

    Raises:
        CheckpointError: the model is missing or damaged.
        DataError: it has no tokenizer.json, or no chat template and `plain` is false.
        ValueError: `heads` for the shipped model.
    """
    if config.model == SHIPPED:
        if config.heads is not None:
            raise ValueError(f"heads={str(config.heads)!r} is for other models than {SHIPPED!r}")
        tokenizer = ByteTokenizer()
        model = load_shipped(config.dtype or "float32")
        return Chat(model, tokenizer, None, (257,))
    folder = resolve_folder(config.model)
    template = None if config.plain else ChatTemplate.load(folder)
    tokenizer = HuggingFaceTokenizer(folder)
    model = SpardaLM.from_pretrained(folder, dtype=config.dtype, heads=config.heads)
    return Chat(model, tokenizer, template, tokenizer.eos_ids)


def read_text(config: Config, tokenizer: Tokenizer) -> str:
    """Read the file, or the `context` tokens at its start.

    Raises:
        DataError: it is missing, empty or not UTF-8.
        ValueError: `context` < 1.
    """
    if config.context is not None and config.context < 1:
        raise ValueError(f"{config.context=} must be at least 1")
    if not config.file.is_file():
        raise DataError(f"{str(config.file)!r} is not a file (0 of 1 found); give --file a text")
    try:
        text = config.file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{config.file.name!r} is not text: byte {error.start} of "
            f"{config.file.stat().st_size} is not UTF-8; give --file a text"
        ) from None
    if not text.strip():
        raise DataError(f"{config.file.name!r} is empty ({len(text)} characters); give a text")
    if config.context is None:
        return text
    return tokenizer.decode(tokenizer.encode(text)[: config.context])


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What came of one question.

    Attributes:
        text: of the answer.
        prompt_tokens: that were read for it.
        generation: its tokens, and what they took.
        tokens_per_s: without the first two tokens: one is the prefill's, the next one compiles.
    """

    text: str
    prompt_tokens: int
    generation: Generation
    tokens_per_s: float


def answer(
    chat: Chat, config: Config, text: str, question: str, write: Callable[[str], Any]
) -> Answer:
    """Answer one question, handing on each piece of text as it comes.

    Args:
        chat: who answers.
        config: how.
        text: what the question is about.
        question: the question.
        write: is given the pieces.

    Raises:
        CapacityError: text and question are longer than the model's context, or than the memory.
    """
    prompt = chat.prompt(text, question, thinking=config.thinking)
    stream, pieces, clock = StreamDecoder(chat.tokenizer), [], []

    def show(piece: str) -> None:
        pieces.append(piece)
        write(piece)

    def on_step(progress: Progress) -> None:
        clock.append(time.perf_counter())
        token = progress.tokens[0]
        if token is not None and token not in chat.eos_ids:
            show(stream.push(token))

    result = generate(
        chat.model,
        [prompt],
        max_new_tokens=config.max_new_tokens,
        mode=config.mode,
        kv=config.kv,
        sampling=Sampling(temperature=config.temperature),
        eos_ids=chat.eos_ids,
        key=jax.random.key(config.seed),
        on_step=on_step,
    )
    show(stream.finish())
    steady = len(clock) - 2
    rate = steady / (clock[-1] - clock[1]) if steady > 0 else result.tokens_per_s
    return Answer("".join(pieces), len(prompt), result, rate)


def describe(answered: Answer) -> dict[str, Any]:
    """Collect the numbers that stand after an answer.

    Returns:
        `prompt_tokens`, `new_tokens`, `tokens_per_s`, `prefill_seconds`, `place`,
        `device_kv_bytes`, `full_kv_bytes` and `hit_rate`.
    """
    result = answered.generation
    return {
        "prompt_tokens": answered.prompt_tokens,
        "new_tokens": len(result.tokens[0]),
        "tokens_per_s": answered.tokens_per_s,
        "prefill_seconds": result.prefill_seconds,
        "place": result.place,
        "device_kv_bytes": sum(result.device_kv_bytes.values()),
        "full_kv_bytes": result.full_kv_bytes,
        "hit_rate": result.traffic.hit_rate,
    }


def status_line(numbers: dict[str, Any]) -> str:
    """Say in one line what an answer took."""
    device, full = numbers["device_kv_bytes"] / 2**20, numbers["full_kv_bytes"] / 2**20
    return (
        f"[{numbers['prompt_tokens']} tokens read in {numbers['prefill_seconds']:.1f} s, "
        f"{numbers['new_tokens']} written at {numbers['tokens_per_s']:.1f} tokens/s; KV memory: "
        f"{device:.1f} MiB on the device of {full:.1f} MiB in full ({numbers['place']}), "
        f"hit rate {numbers['hit_rate']:.3f}]"
    )


def questions(config: Config) -> Iterator[str]:
    """Give the question of the command line, or those typed until an empty line."""
    if config.question is not None:
        yield config.question
        return
    while True:
        try:
            asked = input("question: ").strip()
        except EOFError:
            return
        if not asked:
            return
        yield asked


def main(config: Config, chat: Chat | None = None) -> list[dict[str, Any]]:
    """Answer every question on standard output.

    Args:
        config: the file, the model and the question.
        chat: another model; that of `config` is loaded if left out.

    Returns:
        for each question `question`, `answer` and the numbers of `describe`.

    Raises:
        DataError: the file or the tokenizer cannot be used.
        CapacityError: the file is longer than the model's context; `context` shortens it.
        CheckpointError: the model cannot be loaded.
    """
    chat = chat or open_chat(config)
    text = read_text(config, chat.tokenizer)
    rows = []
    for question in questions(config):
        answered = answer(
            chat, config, text, question, lambda piece: print(piece, end="", flush=True)
        )
        numbers = describe(answered)
        print(f"\n{status_line(numbers)}")
        rows.append({"question": question, "answer": answered.text, **numbers})
    return rows


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (SpardaError, ValueError) as error:
        sys.exit(f"error: {error}")
