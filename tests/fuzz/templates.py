"""Chat templates: whole ones, and what damaged and hostile ones are made of."""

from __future__ import annotations

from random import Random

from tests.fuzz.damage import damage_bytes

TEMPLATES = {
    "llama3": "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system %}{% set content = "
    "'<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}"
    "{% endif %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% endfor %}",
    "macros": "{%- macro turn(m) -%}<s>{{ m.role | upper }}: {{ m.content | tojson }}</s>{%- endmacro -%}"
    "{%- set ns = namespace(n=0) -%}{%- for m in messages if m.content is string -%}{%- set ns.n = ns.n + 1 -%}"
    "{{ turn(m) }}{%- endfor -%}{{ strftime_now('%d %b %Y')[:0] }}{{ ns.n }}{{ messages | length * '\n' }}",
}
HOSTILE = (
    "{{ messages }}",
    "{{ 1 / 0 }}",
    "{{ x.y.z }}",
    "{{ messages[9].content }}",
    "{{ bos_token * 100000 }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 10**10**9 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as x %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception(messages) }}",
    "{{ raise_exception('\x1b[31m\n') }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ '%c' | format(1114112) }}",
    "{{ '\\ud800' }}",
    "{% break %}",
    "{{ range }}",
    "{% set messages = 5 %}",
    "{{ caller() }}",
    "{% generation %}x{% endgeneration %}",
    "{{ strftime_now(5) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ messages | map(attribute='content') | list }}",
    "{% if messages[0].content == 'Hello' %}a{% endif %}",
    "{% if messages[0].content | int > 5 %}a{% endif %}",
    "\x00",
    "{#",
    "{% raw %}",
)


def damage_template(rng: Random, data: bytes) -> bytes:
    """Take one of the templates; change its characters, put other code in, or drop or repeat a part of it."""
    text = rng.choice((data.decode(), *TEMPLATES.values()))
    start, stop = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
    kind = rng.randrange(4)
    if kind == 0:
        return damage_bytes(rng, text.encode())
    if kind == 1:
        seams = [i for i in range(len(text)) if text.startswith(("{{", "{%"), i)] + [len(text)]
        start = stop = rng.choice(seams)
        return (text[:start] + rng.choice(HOSTILE) + text[stop:]).encode()
    if kind == 2:
        return (text[:start] + text[stop:]).encode()
    return (text[:start] + text[start:stop] * 2 + text[stop:]).encode()
