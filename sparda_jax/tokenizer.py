# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""From text to token ids and back: one protocol, plain bytes, and a `tokenizer.json`.

`ByteTokenizer` needs no file and cannot fail on any text; the shipped model reads bytes.
`HuggingFaceTokenizer` wraps the `tokenizers` package for every other model. A stream of ids becomes
text through `StreamDecoder`, which never shows half a character.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sparda_jax.errors import DataError

_SPECIAL_ROLES = ("bos", "eos", "sep")
_REPLACEMENT = "\ufffd"


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer.

    `encode` adds no special ids; a caller that wants BOS in front writes `[bos_id, *encode(text)]`.

    Attributes:
        bos_id: the id that opens a sequence, or None if the model has none.
        eos_id: the id that ends a sequence, or None.
        separator_id: the id put between documents packed into one window, or None.
        vocab_size: ids are at least 0 and below it.
    """

    bos_id: int | None
    eos_id: int | None
    separator_id: int | None
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, without special ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special ids left out."""
        ...


class ByteTokenizer:
    """Map text to the bytes of its UTF-8: id = byte, 256 = BOS, 257 = EOS, 258 = separator.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né")
        [110, 195, 169]
        >>> tokenizer.decode([256, 110, 195, 169, 257])
        'né'
    """

    bos_id: int | None = 256
    eos_id: int | None = 257
    separator_id: int | None = 258
    vocab_size: int = 259

    def encode(self, text: str) -> list[int]:
        """Turn text into its UTF-8 bytes.

        Args:
            text: any text. A lone surrogate, which UTF-8 cannot write, becomes `?`.

        Returns:
            ids from 0 to 255.
        """
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn bytes into text: what is not UTF-8 becomes U+FFFD, special ids are left out.

        Raises:
            ValueError: if an id is below 0 or not below `vocab_size`.
        """
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Drop special ids and return the rest as bytes.

        Raises:
            ValueError: if an id is below 0 or not below `vocab_size`.
        """
        return bytes(token for token in _checked(ids, self.vocab_size) if token < 256)


class HuggingFaceTokenizer:
    """Wrap a `tokenizer.json` of the `tokenizers` package.

    Special ids come from the files beside it: first the token names of `tokenizer_config.json`,
    then the ids of `config.json`. A model without a separator of its own uses EOS between
    documents.

    Attributes:
        bos_id: the id that opens a sequence, or None.
        eos_id: the id that ends a sequence, or None.
        eos_ids: every id that ends a sequence, `eos_id` first: `config.json` may list several.
        separator_id: the id between packed documents: `sep_token`, else `eos_id`.
        vocab_size: one more than the highest id, added tokens included.
    """

    bos_id: int | None
    eos_id: int | None
    separator_id: int | None
    vocab_size: int
    eos_ids: tuple[int, ...]

    def __init__(self, path: Path) -> None:
        """Read the tokenizer and its special ids.

        Args:
            path: a `tokenizer.json`, or the folder that holds one.

        Raises:
            ImportError: if the package `tokenizers` is not installed.
            DataError: if the file is missing or broken, or a special token is not in its
                vocabulary.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "reading a tokenizer.json needs the package tokenizers, which the extra `train` "
                "brings: pip install 'sparda-jax[train]'"
            ) from error
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"0 of 1 tokenizer files found: {file.name!r} is not in {file.parent.name!r}; give "
                "the path of a tokenizer.json"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise DataError(
                f"{file.name!r} ({file.stat().st_size} bytes) is not a tokenizer: {error}; fetch "
                "it again"
            ) from error
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        names = special_tokens(read_json(file.parent / "tokenizer_config.json"))
        ids = read_json(file.parent / "config.json")
        bos, eos, separator = (self._special_ids(role, names, ids) for role in _SPECIAL_ROLES)
        self.eos_ids = eos
        self.bos_id = bos[0] if bos else None
        self.eos_id = eos[0] if eos else None
        self.separator_id = separator[0] if separator else self.eos_id

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, without special ids."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special ids left out.

        Raises:
            ValueError: if an id is below 0 or not below `vocab_size`.
        """
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=True)

    def _special_ids(
        self, role: str, names: dict[str, str], ids: dict[str, Any]
    ) -> tuple[int, ...]:
        """All ids of a role, that of its named token first; empty if the model has none."""
        found: list[int] = []
        token = names.get(f"{role}_token")
        if token is not None:
            token_id = self._tokenizer.token_to_id(token)
            if token_id is None:
                raise DataError(
                    f"{role}_token {token!r} of tokenizer_config.json is none of the "
                    f"{self.vocab_size} tokens in the vocabulary; the files belong to different "
                    "models"
                )
            found.append(token_id)
        listed = ids.get(f"{role}_token_id")
        found += [] if listed is None else listed if isinstance(listed, list) else [listed]
        for token_id in found:
            if not 0 <= token_id < self.vocab_size:
                raise DataError(
                    f"{role}_token_id {token_id} of config.json must be below the vocabulary's "
                    f"{self.vocab_size}; the files belong to different models"
                )
        return tuple(dict.fromkeys(found))


class StreamDecoder:
    """Turn ids into text as they come, holding back characters that are not complete.

    The pieces joined are the text that `decode` gives for all ids at once.

    Example:
        >>> stream = StreamDecoder(ByteTokenizer())
        >>> [stream.push(byte) for byte in "né!".encode()]
        ['n', '', 'é', '!']
        >>> stream.finish()
        ''
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start an empty stream.

        Args:
            tokenizer: the one that made the ids.
        """
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # ids before this one are text already given
        self._context = 0  # decoded again each time: a word's spacing may depend on the one before

    def push(self, token: int) -> str:
        """Take one id and return the text that it completes, possibly none."""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith(_REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return new

    def finish(self) -> str:
        """End the stream: return what was held back, U+FFFD in the place of half characters."""
        new = self._new_text()
        self._context = self._shown = len(self._ids)
        return new

    def _new_text(self) -> str:
        """The text of the ids that were not shown yet."""
        context = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(context) :]


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; an empty one if there is no such file.

    Raises:
        DataError: the file is not JSON, or holds something else than an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path.name!r} ({path.stat().st_size} bytes) is not JSON: {error}; fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name!r} must hold 1 JSON object, not a {type(content).__name__}")
    return content


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Find the special tokens that a `tokenizer_config.json` names: `bos_token` and its text.

    A token is written as its text, or as an object with the text under `content`.

    Example:
        >>> special_tokens({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
        {'bos_token': '<s>', 'eos_token': '</s>'}
        >>> special_tokens({"sep_token": None, "add_bos_token": True})
        {}
    """
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in config.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as plain integers, each in range."""
    values = [int(token) for token in ids]
    for token in values:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"id {token} must be at least 0 and below {vocab_size=}; decode with the "
                "tokenizer that made the ids"
            )
    return values
