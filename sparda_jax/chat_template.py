# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""The chat template of a checkpoint: from messages to the text that the model was trained on.

Hugging Face keeps it as a Jinja template in tokenizer_config.json or chat_template.jinja. It runs
in Jinja's sandbox, which neither reaches Python's internals nor changes what it is given.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparda_jax.errors import DataError
from sparda_jax.tokenizer import read_json, special_tokens

type Message = Mapping[str, Any]
"""`role` (`system`, `user` or `assistant`), `content`, and whatever else a template reads."""

_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"


class ChatTemplate:
    """One template and the special tokens that it names.

    Attributes:
        adds_bos: the tokenizer puts BOS in front of the text (`add_bos_token`).

    Example:
        >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        >>> template = ChatTemplate(source)
        >>> template.render([{"role": "user", "content": "Why?"}])
        '<user>Why?'
    """

    adds_bos: bool

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        adds_bos: bool = False,
    ) -> None:
        """Compile a template.

        Args:
            source: in Jinja's language.
            special_tokens: names such as `bos_token` and their texts.
            adds_bos: as in the attribute.

        Raises:
            ImportError: if the package `jinja2` is not installed.
            DataError: if the template cannot be compiled.
        """
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError(
                "a chat template needs the package jinja2, which the extra `train` brings: "
                "pip install 'sparda-jax[train]'"
            ) from error
        self.adds_bos = adds_bos
        self._special_tokens = dict(special_tokens or {})
        self._errors: tuple[type[Exception], ...] = (jinja2.TemplateError,)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source, globals=_GLOBALS)
        except self._errors as error:
            raise DataError(
                f"the chat template of {len(source)} characters is no Jinja template: {error}; "
                "fetch the tokenizer's files again"
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTemplate":
        """Read the template of a checkpoint folder.

        Args:
            folder: holds tokenizer_config.json, and perhaps chat_template.jinja, which wins. Of
                several named templates the one called `default` is taken.

        Raises:
            DataError: the folder has no chat template, or an unreadable one.
        """
        folder = Path(folder)
        config = read_json(folder / _CONFIG)
        if (folder / _FILE).is_file():
            source = (folder / _FILE).read_text(encoding="utf-8")
        else:
            source = config.get("chat_template")
        if isinstance(source, list):
            named = {str(entry.get("name")): entry.get("template") for entry in source}
            if "default" not in named:
                raise DataError(
                    f"{folder.name!r} has {len(named)} chat templates but none called 'default': "
                    f"{sorted(named)}; write the one to use to {_FILE}"
                )
            source = named["default"]
        if not isinstance(source, str):
            raise DataError(
                f"{folder.name!r} has no chat template: 0 of 2 places hold one ({_FILE}, "
                f"'chat_template' of {_CONFIG}); add it, or give the model plain text"
            )
        tokens = special_tokens(config)
        return cls(source, special_tokens=tokens, adds_bos=config.get("add_bos_token") is True)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Turn messages into text.

        Args:
            messages: of a conversation, in order.
            add_generation_prompt: end with what opens the assistant's answer.
            **variables: what else the template asks for, `enable_thinking=False` for instance.

        Raises:
            DataError: the template refuses these messages, or cannot run.
        """
        given = self._special_tokens | variables
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **given
            )
        except (*self._errors, OverflowError, TypeError, ValueError) as error:
            raise DataError(
                f"the chat template refuses these {len(messages)} messages: {error}"
            ) from error


def _refuse(message: str) -> NoReturn:
    """What templates call `raise_exception`."""
    raise ValueError(message)


def _now(form: str) -> str:
    """What templates call `strftime_now`."""
    return datetime.datetime.now().strftime(form)


_GLOBALS = {"raise_exception": _refuse, "strftime_now": _now}


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """Write JSON as it is: Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
