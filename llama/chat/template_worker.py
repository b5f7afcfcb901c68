"""Renders chat templates in a process of its own, started and ended by `TemplateChat`; imports jinja2 alone.

Templates come in files from strangers. Jinja's sandbox keeps a template from Python's internals, but not from using all
memory or running forever; a process can be limited in memory, and killed when it takes too long (see D14).
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES = 512 << 20  # of address space
MAX_PROMPT_CHARS = 4 << 20  # of a prompt: about a million tokens
MAX_CONSTANTS = 300  # of a template, in an answer
MAX_CONSTANT_CHARS = 100
MAX_ERROR_CHARS = 300


class Refusal(TemplateError):
    """An error that a template raises by raise_exception, such as that roles must alternate."""


class Generation(Extension):
    """The tag {% generation %}, which marks an assistant's text for training: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  # as Extension declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def raise_exception(message: str) -> NoReturn:
    """Raise Refusal: the function of this name in templates."""
    raise Refusal(message)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON without jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def new_environment() -> Environment:
    """Return an environment like that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


@functools.lru_cache(maxsize=1)
def compile_template(source: str) -> tuple[Template, list[str]]:
    """Return the template, and the texts that it spells as constants or names of keys, which it may look for."""
    environment = new_environment()
    parsed = environment.parse(source)
    constants = {node.value for node in parsed.find_all(nodes.Const)}
    constants |= {node.attr for node in parsed.find_all(nodes.Getattr)}
    texts = [text for text in constants if isinstance(text, str) and 0 < len(text) <= MAX_CONSTANT_CHARS]
    return environment.from_string(source), sorted(texts)[:MAX_CONSTANTS]


def render(template: Template, context: dict[str, Any], now: datetime) -> str:
    """Render a prompt from what a template may read; raise OverflowError where it is over MAX_PROMPT_CHARS."""
    given = {"tools": None, "documents": None, "add_generation_prompt": True, "strftime_now": now.strftime}
    text = template.render(given | context)
    if len(text) > MAX_PROMPT_CHARS:
        raise OverflowError(f"the prompt has {len(text)} characters, the most is {MAX_PROMPT_CHARS}")
    return text


def render_all(request: dict[str, Any]) -> dict[str, Any]:
    """Return the prompts of all contexts, None for a later one that fails, or the error of the first."""
    now = datetime.now()  # the same for all
    prompts: list[str | None] = []
    constants: list[str] = []
    try:
        template, constants = compile_template(request["source"])
        for context in request["contexts"]:
            try:
                prompts.append(render(template, context, now))
            except Exception:
                if not prompts:
                    raise
                prompts.append(None)
    except Refusal as error:
        return {"error": shorten(f"the chat template says: {error}")}
    except TemplateSyntaxError as error:
        return {"error": shorten(f"the chat template is no valid jinja: {error.message} (line {error.lineno})")}
    except Exception as error:
        return {"error": shorten(f"the chat template fails with {type(error).__name__}: {error}")}
    return {"prompts": prompts, "constants": constants}


def shorten(message: str) -> str:
    """Join a message's lines, and cut it to MAX_ERROR_CHARS."""
    message = " ".join(message[: 10 * MAX_ERROR_CHARS].split()).rstrip(": ")
    return message if len(message) <= MAX_ERROR_CHARS else message[:MAX_ERROR_CHARS] + "..."


def limit_process() -> None:
    """Limit memory to MAX_BYTES and open files to none. macOS does not enforce the first, Windows neither of them."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))


def main() -> None:
    """Answer a JSON object on each line of stdin by one on stdout; a first line there says "ready"."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    # Load what Python and jinja2 read from files when it is first needed; this template ends in an error, too.
    first = "{{ lipsum() | wordwrap | striptags | pprint }}{{ strftime_now('%c') }}{{ undefined.name }}"
    render_all({"source": first, "contexts": [{"messages": []}]})
    limit_process()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(render_all(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
