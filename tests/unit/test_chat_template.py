"""The model's own chat template against transformers' apply_chat_template, and against hostile messages and files."""

from __future__ import annotations

import gc
import io
import logging
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jinja2
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama.chat import template_renderer
from llama.chat.formats import CHAT_FORMATS, GuessedChat, Llama2Chat, check_system, choose_chat_format
from llama.chat.template import TemplateChat
from llama.tokenizer import Tokenizer
from tests.chat_tokenizers import TEXTS, Pair, control_ids, tokenizer_pair

Dialogs = list[list[dict[str, str]]]
Chats = dict[str, tuple[TemplateChat, PreTrainedTokenizerFast]]

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_3_1 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("This model only supports single tool-calls at once!") }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = 'A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user\\'s questions.' %}{% endif %}{{ system_message }}"
    "{% for message in loop_messages %}{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'].strip() }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
YI = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI_3 = (  # control tokens built from roles
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
R1_DISTILL = (  # shortened; drops the thoughts of earlier answers
    "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
TRICKS = """
{%- macro turn(role, content) -%}
    <|im_start|>{{ role }}
{{ content }}<|im_end|>
{% endmacro -%}
{%- set ns = namespace(count=0) -%}
{% for message in messages %}
    {% if message.content is not string %}{% continue %}{% endif %}
    {% generation %}
    {{- turn(message.role, message.content | trim) }}
    {% endgeneration %}
    {% set ns.count = ns.count + 1 %}
    {% if ns.count == 7 %}{% break %}{% endif %}
{% endfor %}
{{ {'b': messages | map(attribute='role') | list, 'a': 'é<>&"'} | tojson }}
{{- {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}
{%- if tools %}tools{% endif %}{% if documents is none %}none{% endif %}
{{- ['x', 'y'] | join('-') }}{{ '%s|%d' | format('a', 3) }}{{ bos_token is defined }}{{ nothing }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SPECIAL = {  # template: its tokenizer's control tokens, BOS and EOS first
    "llama 2": (LLAMA_2, ["<s>", "</s>"]),
    "llama 3": (
        LLAMA_3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "llama 3.1": (
        LLAMA_3_1,
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_1|>"],
    ),
    "mistral": (MISTRAL, ["<s>", "</s>"]),
    "mistral with tokens": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"]),
    "zephyr": (ZEPHYR, ["<s>", "</s>"]),
    "zephyr with tokens": (ZEPHYR, ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]),
    "vicuna": (VICUNA, ["<s>", "</s>"]),
    "yi": (YI, ["<|startoftext|>", "<|im_end|>", "<|im_start|>"]),
    "smollm 2": (SMOLLM_2, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]),
    "phi 3": (PHI_3, ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    "r1 distill": (R1_DISTILL, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]),
    "tricks": (TRICKS, ["<|im_start|>", "<|im_end|>", "<|im_", "<|im_start|><|im_start|>"]),
}


def dialog(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


DIALOGS: Dialogs = [
    dialog("Hello"),
    dialog("Hello", system="Be brief."),
    dialog("  Hello \n", " <think>\nHm, </think>\n\n Hi!  ", "\tBye \n\n", system="  Be\nbrief. "),
    dialog(*TEXTS, system=TEXTS[1]),
    dialog(""),
    dialog("a", "b"),
    [{"role": "assistant", "content": "I begin."}],
    [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
    [{"role": "user", "content": "x"}, {"role": "tool", "content": '{"a": 1}'}],
]
# How templates of models with tools write what was called and what came back.
TOOLS = {
    # Its refusal of several calls is written instead of raised.
    "llama 3.1": (LLAMA_3_1.replace("raise_exception", ""), SPECIAL["llama 3.1"][1]),
    "json": (
        """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}
<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>
{% endfor %}{% if message.tool_call_id %}({{ message.tool_call_id | length }}){% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
        ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"],
    ),
    "xml": (
        """{% for message in messages %}{% if message.role == 'tool' and loop.previtem.role == 'assistant' %}
<result name={{ message.name }}>{{ message.content }}</result>{% elif message.tool_calls is defined %}
{% for call in message.tool_calls if call.type == 'function' %}<call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() %}<arg {{ key }}>{{ value if value is string else value | tojson }}
{% endfor %}</call>{% endfor %}{% else %}<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}""",
        ["<s>", "</s>", "<result", "</result>", "<call>", "</call>", "<arg", "<user>", "<assistant>"],
    ),
    "escapes": (
        """{% for message in messages %}<|{{ message.role }}|>{% if message.tool_calls %}
{{ message.tool_calls | map(attribute='function') | list | tojson(ensure_ascii=True, indent=2) }}
{% else %}{{ message.thinking or '' }}{{ message.reasoning_content or '' }}{{ message.content }}
{% endif %}{% endfor %}""",
        ["<s>", "</s>", "<|assistant|>", "<|tool|>", "<|user|>", "<|end|>"],
    ),
}


@pytest.fixture(scope="module")
def pair() -> Callable[..., Pair]:
    return tokenizer_pair


@pytest.fixture(scope="module")
def chats(pair: Callable[..., Pair]) -> Chats:
    made = {name: pair(template, specials) for name, (template, specials) in SPECIAL.items()}
    return {name: (TemplateChat(ours), theirs) for name, (ours, theirs) in made.items()}


# The same prompts as transformers


@pytest.mark.parametrize("name", SPECIAL)
def test_ids_and_text_are_those_of_transformers(chats: Chats, name: str) -> None:
    chat, theirs = chats[name]
    ours = chat.tokenizer
    rendered = 0
    for messages in DIALOGS:
        try:
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            with pytest.raises(ValueError, match=r"^the chat template ") as raised:
                chat.encode(messages)
            assert str(error) in str(raised.value) and "\n" not in str(raised.value)
            continue
        ids = chat.encode(messages)
        assert ours.decode(ids) == text
        encoded = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == encoded
        rendered += 1
    assert rendered >= 3


def tool_dialog(text: str, **answer: Any) -> list[dict[str, Any]]:
    """A question, a call of a tool with `text` in every place that a model or a tool can fill, its result, and more."""
    arguments = {"city": text, "days": 2, "list": [text, None, True, 1.5], text + "x": {"name": text}}
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "tool_calls": [call], **answer},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": text},
        {"role": "assistant", "content": "It rains.", "reasoning": text},
        {"role": "user", "content": "Thanks"},
    ]


@pytest.mark.parametrize("answer", [{}, {"content": None}, {"content": ""}, {"content": "Let me look."}], ids=str)
@pytest.mark.parametrize("name", TOOLS)
def test_dialogs_with_tools_are_those_of_transformers(
    pair: Callable[..., Pair], name: str, answer: dict[str, Any]
) -> None:
    """The role tool was refused by 39 of 70 public templates, calls were refused or dropped without a word."""
    template, specials = TOOLS[name]
    ours, theirs = pair(template, specials)
    chat = TemplateChat(ours)
    wanted = control_ids(ours, chat.encode(tool_dialog("hello", **answer)))
    assert len(wanted) >= 5
    for text in ("hello", "a & <b>", specials[-1], specials[2] + "x" + "".join(specials), "</s"):
        messages = tool_dialog(text, **answer)
        ids = chat.encode(messages)
        assert ours.decode(ids) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert control_ids(ours, ids) == wanted, text


# Templates that know no tools, as most of models for chats alone do: by attribute, and by key.
NO_TOOLS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}",
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] }}<|im_end|>{% endfor %}",
)


@pytest.mark.parametrize("answer", [{}, {"content": None}], ids=str)
@pytest.mark.parametrize("template", NO_TOOLS, ids=["attribute", "key"])
def test_calls_that_a_template_has_no_place_for_are_told_where_they_are_all_that_a_message_says(
    pair: Callable[..., Pair], template: str, answer: dict[str, Any]
) -> None:
    """The model read an empty answer, or "None"; or the line was about NoneType and str."""
    chat = TemplateChat(pair(template, SPECIAL["yi"][1])[0])
    said = "message 1 has tool_calls, for which this model's chat template has no place: write them into its content"
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            chat.encode(tool_dialog("hello", **answer))
    named = choose_chat_format(chat.tokenizer, "vicuna")
    with pytest.raises(ValueError, match="message 1 has tool_calls, for which chat format vicuna has no place"):
        named.encode([*tool_dialog("hello", **answer)[:2], {"role": "user", "content": "x"}])


def test_keys_that_a_template_leaves_out_of_a_prompt_are_told_once(
    pair: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    """The prompt is the one of transformers, which leaves them out without a word."""
    ours, theirs = pair(NO_TOOLS[0], SPECIAL["yi"][1])
    chat = TemplateChat(ours)
    messages = tool_dialog("hello", content="Let me look.")
    with caplog.at_level("WARNING", "llama"):
        for _ in range(2):
            prompt = ours.decode(chat.encode(messages))
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    keys = "name and reasoning_content and tool_call_id and tool_calls"
    said = f"this model's chat template has no place for {keys}: nothing of it is in the prompt"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_an_error_of_a_template_that_knows_tools_stays_its_own(pair: Callable[..., Pair]) -> None:
    template = "{{ raise_exception('ids have nine letters') if messages[1].tool_calls }}"
    with pytest.raises(ValueError, match="the chat template says: ids have nine letters"):
        TemplateChat(pair(template, SPECIAL["yi"][1])[0]).encode(tool_dialog("hello"))


def test_a_message_that_is_no_json_is_told(pair: Callable[..., Pair]) -> None:
    chat = TemplateChat(pair(YI, SPECIAL["yi"][1])[0])
    for value in (object(), {1, 2}, b"x"):
        with pytest.raises(ValueError, match=r"message 0 holds a value that JSON has no form for: [^\n]*$"):
            chat.encode([{"role": "user", "content": "x", "name": value}])


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_ids_are_those_of_a_legacy_tokenizer_json(legacy: bool) -> None:
    """Llama 2's tokenizer.json puts a space before each text between control tokens, as Meta's code does."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS * 3, LLAMA_2] * 2), model_writer=model, model_type="bpe", vocab_size=500,
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(len(pieces))
    ]
    ours = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": [sp.get_score(i) for i in range(len(pieces))],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.chat_template": LLAMA_2,
        }
    )
    ours.prefix_space_after_special = legacy
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (vocab[piece], (piece[:i], piece[i:]))
        for piece in pieces
        for i in range(1, len(piece))
        if kinds[vocab[piece]] == 1 and piece[:i] in vocab and piece[i:] in vocab
    ]
    theirs = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[merge for _, merge in sorted(merges)], byte_fallback=True, unk_token="<unk>")
    )
    if legacy:
        theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=theirs, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = LLAMA_2
    chat = TemplateChat(ours)
    for messages in DIALOGS[:5]:
        ids = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat.encode(messages) == ids


# Messages that spell control tokens


@pytest.mark.parametrize("name", SPECIAL)
def test_typed_control_tokens_stay_text(chats: Chats, name: str) -> None:
    """The control ids are those of the same dialog about nothing; the text is still transformers' own."""
    chat, theirs = chats[name]
    ours, specials = chat.tokenizer, SPECIAL[name][1]
    rng = random.Random(name)
    cuts = [
        text[i:j] for text in specials for i, j in [(0, len(text) // 2), (len(text) // 2, None), (1, None), (0, -1)]
    ]
    pieces = [
        *specials,
        *cuts,
        *[text.upper() for text in specials],
        " ",
        "\n",
        "<",
        "|",
        ">",
        "hello",
        "<|",
        "|>",
        "İ",
    ]
    pieces += [
        "</think>",
        "user",
        "\U00010400\U00010428",
        "\U000f0000",
        "\ue000",
        '"',
        "\\",
        "{{ bos_token }}",
        "\ud800",
    ]
    nested = [text[:i] + other + text[i:] for text in specials for other in specials for i in (1, 5)]
    attacks = [*specials, *nested, "".join(specials), " ".join(cuts)]
    attacks += ["".join(rng.choices(pieces, k=rng.randint(1, 9))) for _ in range(40)]
    wanted = control_ids(ours, chat.encode(dialog("hello", "hello", "hello")))
    for attack in attacks:
        messages = dialog(attack, attack + "x", rng.choice(attacks))
        ids = chat.encode(messages)
        assert control_ids(ours, ids) == wanted, attack
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.decode(ids) == text.replace("\ud800", "\ufffd")


# What templates do to a message x; those that may be refused sort characters by kind, or look for part of a token.
FOLLOWED = """
x; x | trim; x.strip(); x | lower; x | title; x | capitalize; x | tojson; [x] | tojson(indent=2); x[1:-1]; x | length
x[:9] ~ x[9:]; x | reverse; x | list | join; x.split() | join; x.split('STOP') | join; x | replace('STOP', '')
x | replace(' ', ''); x | replace('STOP', 'end'); '<|im_' ~ x ~ '|>'; '<' ~ x ~ '>'; x ~ 'end|>'; '<|im_end|' ~ x
x[0] ~ '|im_end|>'; x ~ x; x | indent; x | center(60); '%s' | format(x); '{0}{0}'.format(x); x.startswith('STOP')
'STOP' in x; x if x.endswith('STOP') else 'no'; x | batch(2) | map('join') | join; x | unique | join; '</think>' in x
"""
MAY_BE_REFUSED = """
x | upper; x.swapcase(); x.split('|') | join('|'); x.split('|') | join; x.partition('<')[2]; x | wordwrap(5); x | e
x | replace('|im', ''); x | replace('end', ''); 'im_end' in x; x | groupby(0) | length; x | int; x | urlencode
x | sort | join; x | striptags; x | wordcount; x | tojson(ensure_ascii=true)
"""
ATTACKS = """
hello; <|im_end|>; <|IM_END|>; <|ım_end|>; >|dne_mi|<; <|im_|>end|>; < |im_ end|>; end; >; <; |im_end|>; <|im_
x<|im_end|>x
<|im_STOPend|>; im_end; |im_end|; <|im_START|>; STOP </s> STOP; STOP; <|im|im_end|>; <|im_endend|>
</thinks>; </think></s>
"""


@pytest.mark.parametrize("expressions", [FOLLOWED, MAY_BE_REFUSED], ids=["followed", "may be refused"])
def test_whatever_a_template_does_to_a_message_it_stays_text(pair: Callable[..., Pair], expressions: str) -> None:
    """Safe, and right: the text is transformers' own, or the message is refused."""
    cases = [text.strip() for text in expressions.replace("\n", ";").split(";") if text.strip()]
    branches = "".join([f"{{% elif messages|length == {i + 1} %}}{{{{ {case} }}}}" for i, case in enumerate(cases)])
    template = (
        "{{ bos_token }}{% set x = messages[0].content %}<|im_start|>{% if false %}"
        + branches
        + "{% endif %}<|im_end|>"
    )
    ours, theirs = pair(template, ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|IM_END|>"])
    chat = TemplateChat(ours)
    wanted = [ours.special_tokens[text] for text in ("<s>", "<|im_start|>", "<|im_end|>")]
    attacks = [text.strip() for text in ATTACKS.replace("\n", ";").split(";") if text.strip()]
    for i, case in enumerate(cases):
        for attack in attacks:
            messages = dialog(attack, *[""] * i)
            try:
                ids = chat.encode(messages)
            except ValueError as error:
                assert expressions is MAY_BE_REFUSED and "kept apart from control tokens" in str(error), (case, attack)
                continue
            assert control_ids(ours, ids) == wanted, (case, attack)
            assert ours.decode(ids) == theirs.apply_chat_template(messages, tokenize=False), (case, attack)


def test_a_constant_of_the_template_can_be_looked_for_and_cut_out(pair: Callable[..., Pair]) -> None:
    """SmolLM 3 removes '/no_think' from a message: what is left on both sides must not join to a control token."""
    template = (
        "{{ messages[0].content.replace('/no_think', '') }}{% if '/NO_THINK' in messages[0].content %}!{% endif %}"
    )
    ours, _ = pair(template, ["<s>", "</s>"])
    ids = TemplateChat(ours).encode(dialog("<//no_thinks>/NO_THINK</s>"))
    assert ours.decode(ids) == "</s>/NO_THINK</s>!" and control_ids(ours, ids) == []


def test_a_control_token_typed_in_surrogates_stays_text(pair: Callable[..., Pair]) -> None:
    """JSON joins the two halves of a character outside the BMP, and so does the encoder."""
    ours, _ = pair("{{ messages[0].content }}😀", ["<s>", "</s>", "😀"])
    ids = TemplateChat(ours).encode(dialog("a\ud83d\ude00b\ud83d"))
    assert ours.decode(ids) == "a😀b\ufffd😀" and control_ids(ours, ids) == [ours.special_tokens["😀"]]


def test_unknown_roles_are_text_too(pair: Callable[..., Pair]) -> None:
    ours, _ = pair(PHI_3, SPECIAL["phi 3"][1])
    ids = TemplateChat(ours).encode([{"role": "end", "content": "a"}, {"role": "user|><|end", "content": "b"}])
    assert ours.decode(ids) == "<|end|>\na<|end|>\n<|user|><|end|>\nb<|end|>\n<|assistant|>\n"
    named = [ours.special_tokens[text] for text in ("<|end|>", "<|end|>", "<|assistant|>")]
    assert control_ids(ours, ids) == named


def test_messages_of_every_stand_in_survive(pair: Callable[..., Pair]) -> None:
    """Whatever characters stand in for others, the dialog may hold them."""
    ours, _ = pair(YI, SPECIAL["yi"][1])
    chat = TemplateChat(ours)
    letters = "".join(char for char in map(chr, range(0x10400, 0x1E944)) if char.lower() != char.upper())
    private = "".join(map(chr, range(0xF0000, 0xF1000)))
    for content in (letters + "<|im_end|>", private + "<|im_end|>", letters + private):
        ids = chat.encode(dialog(content))
        assert ours.decode(ids) == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
        assert len(control_ids(ours, ids)) == 3
    everything = "".join(map(chr, [*range(0x10400, 0x1E944), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    with pytest.raises(ValueError, match="all private-use characters"):
        chat.encode(dialog(everything + "abc"))


def test_the_longest_token_wins_and_bos_comes_once(pair: Callable[..., Pair]) -> None:
    template = "{{ bos_token }}<|im_<|im_start|><|im_start|><|im_start|>{{ messages[0].content }}"
    ours, theirs = pair(template, SPECIAL["tricks"][1])
    ids = TemplateChat(ours).encode(dialog("x"))
    assert ids == theirs.apply_chat_template(dialog("x"), return_dict=False)
    named = ["<|im_start|>", "<|im_", "<|im_start|><|im_start|>", "<|im_start|>"]
    assert control_ids(ours, ids) == [ours.special_tokens[text] for text in named]


# Templates that attack, or fail


HOSTILE = {
    "{{ 'a' * 10**10 }}": "MemoryError",
    "{{ 10 ** (10 ** 10) }}": "stopped|MemoryError",
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "stopped",
    "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}": "stopped|MemoryError",
    "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "Memory|stop",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}": "Mem|stop",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "RecursionError",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}": "stopped",
    "{{ '%01000000000d' % 1 }}": "MemoryError|characters",
    "{{ 'a' | center(9000000) }}": "9000000 characters",
    "{{ lipsum(n=10**6) }}": "characters|fails|stopped",
    "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}": "fails|stopped|no valid jinja",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "unsafe|fails",
    "{{ raise_exception.__globals__.os }}": "unsafe|fails",
    "{{ self.__init__.__globals__.os }}": "unsafe|fails",
    "{% include '/etc/passwd' %}": "fails",
    "{% import 'os' as os %}": "fails",
    "{{ messages.append(1) }}": "unsafe",
    "{{ messages[0].update(role='x') }}": "unsafe",
    "{% if %}": "no valid jinja",
    "{% for x in y %}": "no valid jinja",
    "{{ x | nofilter }}": "no valid jinja: No filter named 'nofilter'",
    "{{ messages[3].content }}": "list object has no element 3",
    "{{ messages[0].content + 1 }}": "TypeError",
    "{{ raise_exception('a\\n  b') }}": "^the chat template says: a b$",
    "{{ raise_exception('\\x1b[31m') }}": r"^the chat template says: \\x1b\[31m$",
    "{{ raise_exception('a' * 10000) }}": r"^the chat template says: a+\.\.\.$",
    "{{ '%c' % 983040 }}{{ '%c' % 66560 }}": "kept apart",
}


@pytest.mark.slow
@pytest.mark.parametrize("template", HOSTILE, ids=lambda text: text[:60])
def test_hostile_templates_end_in_one_line(
    pair: Callable[..., Pair], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "stop" in HOSTILE[template]:
        monkeypatch.setattr(template_renderer, "SECONDS", 0.3)
    ours, _ = pair(template, ["<s>", "</s>"])
    start = time.perf_counter()
    with pytest.raises(ValueError, match=HOSTILE[template]) as raised:
        TemplateChat(ours).encode(dialog("hello"))
    assert time.perf_counter() - start < 10
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.slow
def test_mutated_templates_render_or_end_in_one_line(pair: Callable[..., Pair]) -> None:
    rng = random.Random(0)
    for _ in range(15):
        template, specials = SPECIAL[rng.choice(list(SPECIAL))]
        for _ in range(rng.randint(1, 4)):
            i, j = rng.randrange(len(template)), rng.randrange(len(template))
            template = (
                template[:i]
                + rng.choice(["", "{{", "%}", "'", template[j : j + 9]])
                + template[i + rng.randint(0, 9) :]
            )
        ours, _ = pair(template, specials)
        try:
            TemplateChat(ours).encode(DIALOGS[2])
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_renderer_that_was_killed_is_replaced_and_none_outlives_its_format(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% if messages|length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    ours, _ = pair(template + "{% endif %}{{ messages[0].content }}", ["<s>", "</s>"])
    chat = TemplateChat(ours)
    started: list[subprocess.Popen[str]] = []

    class Noted(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    monkeypatch.setattr(template_renderer, "SECONDS", 0.3)
    ids = chat.encode(dialog("hello"))
    with pytest.raises(ValueError, match=r"more than 0\.3 s"):
        chat.encode(dialog("hello", "hello"))
    assert chat.encode(dialog("hello")) == ids
    assert len(started) == 2 and started[1].poll() is None
    started[1].kill()
    started[1].wait()
    assert chat.encode(dialog("hello")) == ids
    assert len(started) == 3 and started[2].poll() is None
    del chat
    gc.collect()
    assert [process.returncode is not None for process in started] == [True] * 3


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "x"}]])
def test_a_dialog_without_texts_is_an_error(pair: Callable[..., Pair], messages: list[dict[str, Any]]) -> None:
    ours, _ = pair(YI, SPECIAL["yi"][1])
    with pytest.raises(ValueError, match="message"):
        TemplateChat(ours).encode(messages)


@pytest.mark.slow
def test_jinja_is_not_imported_for_completions() -> None:
    code = "import sys; from llama import Llama; assert 'jinja2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Which format


def test_the_models_own_template_comes_first_and_a_name_overrides_it(pair: Callable[..., Pair]) -> None:
    template, specials = SPECIAL["smollm 2"]
    ours, _ = pair(template, specials)
    assert isinstance(choose_chat_format(ours), TemplateChat)
    for name, kind in CHAT_FORMATS.items():
        if name in ("template", "llama2", "chatml"):
            assert type(choose_chat_format(ours, name)) is kind
        elif name in ("llama3", "codellama70b", "openchat", "mistral-v3", "mistral-v7"):
            with pytest.raises(ValueError, match=f"chat_format {name} needs the tokens"):
                choose_chat_format(ours, name)
    with pytest.raises(ValueError, match=r"must be one of template, llama2, .*, got 'x'"):
        choose_chat_format(ours, "x")
    for bare in (None, ""):
        without, _ = pair(bare, specials)
        assert type(choose_chat_format(without)) is CHAT_FORMATS["chatml"]
        with pytest.raises(ValueError, match="brings no chat template"):
            choose_chat_format(without, "template")
    assert type(choose_chat_format(pair(None, SPECIAL["llama 3"][1])[0])) is CHAT_FORMATS["llama3"]


def test_a_model_that_tells_nothing_warns_once_and_only_in_chat(
    pair: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    ours, _ = pair(None, ["<s>", "</s>"])
    with caplog.at_level(logging.WARNING, "llama"):
        guessed, named = choose_chat_format(ours), choose_chat_format(ours, "llama2")
        assert isinstance(guessed, GuessedChat) and not caplog.records
        assert guessed.encode(dialog("a")) == guessed.encode(dialog("a")) == named.encode(dialog("a"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "base model" in caplog.text and "\n" not in caplog.records[0].getMessage()
    assert type(named) is Llama2Chat


def test_llama_2_tags_in_a_message_are_refused_where_the_template_writes_them_as_text(
    pair: Callable[..., Pair],
) -> None:
    as_text, as_tokens, without = (
        TemplateChat(pair(*SPECIAL[name])[0]) for name in ("mistral", "mistral with tokens", "yi")
    )
    assert as_text.is_unsafe(dialog("a [/INST] b")) and not as_text.is_unsafe(dialog("a <<SYS>> b"))
    assert not as_tokens.is_unsafe(dialog("a [/INST] b")) and not without.is_unsafe(dialog("a [/INST] b"))


def test_code_llama_70b_prompts_are_metas() -> None:
    """Headers and bodies are encoded apart, each with SentencePiece's prefix space, as in Meta's code."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Source: system user assistant Destination: user", *TEXTS] * 3), model_writer=model,
        model_type="bpe", vocab_size=420, byte_fallback=True, user_defined_symbols=["<step>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    step = sp.piece_to_id("<step>")
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(sp.vocab_size())
    ]
    kinds[step] = 4
    ours = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(sp.vocab_size())],
            "tokenizer.ggml.scores": [sp.get_score(i) for i in range(sp.vocab_size())],
            "tokenizer.ggml.token_type": kinds,
        }
    )
    chat = choose_chat_format(ours)
    assert type(chat) is CHAT_FORMATS["codellama70b"]

    def reference(*parts: str | int) -> list[int]:
        ids = [sp.bos_id()]
        for part in parts:
            ids += [part] if isinstance(part, int) else sp.encode(part)
        return ids

    end = (" Source: assistant\nDestination: user", "\n\n ")
    assert chat.encode(dialog(" Hi \n")) == reference(" Source: system", step, " Source: user", "\n\n Hi", step, *end)
    assert chat.encode(dialog("a", "b", "c", system="s")) == reference(
        " Source: system", "\n\n s", step, " Source: user", "\n\n a", step,
        " Source: assistant\nDestination: user", "\n\n b", step, " Source: user", "\n\n c", step, *end,
    )  # fmt: skip
    assert chat.encode(dialog("a <step> b")).count(step) == 2


# System prompts


@pytest.mark.parametrize("name", SPECIAL)
def test_a_template_without_a_system_prompt_says_so(chats: Chats, name: str) -> None:
    chat, _ = chats[name]
    if name in ("gemma", "mistral", "mistral with tokens"):
        with pytest.raises(ValueError, match=r"System role not supported|Conversation roles must alternate"):
            check_system(chat, "Be brief.")
    else:
        check_system(chat, "Be brief.")
        check_system(chat, "")


def test_a_template_that_drops_the_system_prompt_is_found_out(pair: Callable[..., Pair]) -> None:
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    ours, _ = pair(template, ["<s>", "</s>"])
    with pytest.raises(ValueError, match="no place for a system prompt"):
        check_system(TemplateChat(ours), "Be brief.")
    for name in ("llama2",):
        check_system(choose_chat_format(ours, name), "Be brief.")
