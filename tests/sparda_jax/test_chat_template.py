# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Chat templates: MiniCPM-like ones render, unusable ones say so, none reaches Python."""

import json
import sys

import pytest

from sparda_jax.chat_template import ChatTemplate
from sparda_jax.errors import DataError

pytest.importorskip("jinja2", reason="needs the package jinja2: extra `train`")

CHAT = """{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n' }}
    {%- endif %}
{%- endif %}"""
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 < 2 & 'x'?"}]
TEXT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 < 2 & 'x'?<|im_end|>\n"


def write_config(folder, **fields):
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_a_conversation_becomes_the_text_that_the_template_says():
    template = ChatTemplate(CHAT)
    assert template.render(ASKED) == TEXT + "<|im_start|>assistant\n"
    assert template.render(ASKED, add_generation_prompt=False) == TEXT


def test_variables_reach_the_template():
    template = ChatTemplate(CHAT)
    assert template.render(ASKED, enable_thinking=False).endswith("<think>\n\n</think>\n")
    assert template.render(ASKED, enable_thinking=True).endswith("assistant\n")


def test_a_template_is_read_from_the_tokenizers_configuration(tmp_path):
    write_config(tmp_path, chat_template=CHAT, add_bos_token=True)
    template = ChatTemplate.load(tmp_path)
    assert template.adds_bos
    assert template.render(ASKED).startswith(TEXT)


def test_special_tokens_are_known_to_the_template(tmp_path):
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}"
    write_config(
        tmp_path,
        chat_template=source,
        bos_token={"content": "<s>"},
        eos_token="</s>",
        pad_token=None,
    )
    template = ChatTemplate.load(tmp_path)
    assert template.render(ASKED) == "<s>Be brief.</s>"
    assert not template.adds_bos


def test_the_default_of_several_templates_is_taken(tmp_path):
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    write_config(tmp_path, chat_template=named)
    assert ChatTemplate.load(tmp_path).render(ASKED) == "d"
    write_config(tmp_path, chat_template=named[:1])
    with pytest.raises(DataError, match=r"1 chat templates but none called 'default': \['tools'\]"):
        ChatTemplate.load(tmp_path)


def test_a_file_of_its_own_wins(tmp_path):
    write_config(tmp_path, chat_template="old", bos_token="<s>")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}new")
    assert ChatTemplate.load(tmp_path).render(ASKED) == "<s>new"


@pytest.mark.parametrize("has_config", [True, False])
def test_a_folder_without_a_template_says_what_to_do(tmp_path, has_config):
    if has_config:
        write_config(tmp_path, bos_token="<s>")
    with pytest.raises(DataError, match=r"0 of 2 places hold one .* give the model plain text"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ not", r"'tokenizer_config\.json' \(5 bytes\) is not JSON"),
        ("[1]", "must hold 1 JSON object, not a list"),
    ],
)
def test_an_unreadable_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError, match=message):
        ChatTemplate.load(tmp_path)


def test_a_broken_template_is_refused():
    with pytest.raises(DataError, match="template of 10 characters is no Jinja template"):
        ChatTemplate("{% for %}x")


def test_what_the_template_refuses_is_told():
    with pytest.raises(DataError, match="refuses these 1 messages: unknown role narrator"):
        ChatTemplate(CHAT).render([{"role": "narrator", "content": "Once"}])
    with pytest.raises(DataError, match=r"refuses these 1 messages: .*content"):
        ChatTemplate(CHAT).render([{"role": "user"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(DataError, match="refuses these 2 messages"):
        ChatTemplate(source).render(ASKED)


def test_json_is_written_as_it_is():
    source = "{{ messages[1] | tojson }}{{ [1] | tojson(indent=1) }}"
    want = '{"role": "user", "content": "1 < 2 & \'x\'?"}[\n 1\n]'
    assert ChatTemplate(source).render(ASKED) == want


def test_the_date_and_loop_controls_of_other_templates_work():
    source = "{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert ChatTemplate(source).render(ASKED) == "01"
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(ASKED)) == 10


def test_without_jinja_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'sparda-jax\[train\]'"):
        ChatTemplate("x")
