"""Tools and arguments of chat templates, and answers that are begun, against transformers' apply_chat_template."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.chat.formats import CHAT_FORMATS, choose_chat_format
from llama.chat.template import TemplateChat
from llama.cli.tools import read_tools
from llama.engine.options import BuildOptions
from llama.jobs.openai_form import line_form
from llama.sampling import SamplingParams
from tests.chat_tokenizers import TEXTS, control_ids, tokenizer_pair
from tests.checkpoints import TINY, chain_state, write_meta
from tests.models import build
from tests.tool_templates import QWEN, TOOL_TEMPLATES
from tests.unit.test_job_runner import Job

TINY_END = 265  # <|eot_id|>
# One letter of each role's name that a prompt of the tests' byte-level vocabulary keeps apart.
LETTERS = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{{ note }}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def weather(text: str = "Tell the weather.", name: str = "weather") -> dict[str, Any]:
    """The description of a tool, with a text in every place that its author fills."""
    properties = {
        "city": {"type": "string", "description": text, "enum": ["Paris", text]},
        "days": {"type": "integer", "description": text},
        "parts": {"type": "array", "items": {"type": "string"}, "description": text},
        text[:20]: {"type": ["string", "null"], "description": "x"},
    }
    parameters = {"type": "object", "properties": properties, "required": ["city", text[:20]]}
    returned = {"type": "string", "description": text}
    function = {"name": name, "description": text, "parameters": parameters, "return": returned}
    return {"type": "function", "function": function}


def call(number: int = 0, name: str = "weather", **arguments: Any) -> dict[str, Any]:
    arguments = arguments or {"city": "Paris"}
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def asked(text: str, *calls: dict[str, Any]) -> list[dict[str, Any]]:
    """A question, calls, what came back, and an answer to continue."""
    return [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": list(calls)},
        *[{"role": "tool", "name": "weather", "tool_call_id": each["id"], "content": text} for each in calls],
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": text},
    ]


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_tools_reach_a_template_as_in_transformers_and_control_tokens_in_them_stay_text(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tools were left out of every prompt. Who describes a tool, or answers for it, must not speak as the system."""
    template, specials = TOOL_TEMPLATES[name]
    ours, theirs = tokenizer_pair(template, specials)
    chat = TemplateChat(ours)
    plain = [weather(), weather(name="forecast")]
    wanted = control_ids(ours, chat.encode(asked("hello", call()), plain))
    for text in ("hello", TEXTS[0], specials[1], "x".join(specials), specials[-1][:-1]):
        tools, dialog = [weather(text), weather(text, "forecast")], asked(text, call())
        ids = chat.encode(dialog, tools)
        assert ours.decode(ids) == theirs.apply_chat_template(
            dialog, tools=tools, tokenize=False, add_generation_prompt=True
        )
        assert control_ids(ours, ids) == wanted, text
    assert not [each for each in caplog.messages if "tool_call_id" in each], "it only says which call a result is of"
    with_tools = ours.decode(chat.encode(asked("hello", call()), plain))
    assert with_tools.count("forecast") and "forecast" not in ours.decode(chat.encode(asked("hello", call())))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("llama 3.1", {"date_string": "<|eot_id|> 1 May 2030", "tools_in_user_message": False}),
        ("llama 3.1", {"builtin_tools": ["brave_search", "code_interpreter"]}),
        ("llama 3.1", {"custom_tools": [weather("<|eot_id|>")]}),
        ("qwen", {"enable_thinking": False}),
        ("qwen", {"enable_thinking": True, "unread": ["<|im_end|>", None, 1.5]}),
        ("documents", {"documents": [{"title": "<|im_end|>", "text": "a & b"}]}),
        ("documents", {"documents": [], "eos_token": "END"}),
    ],
)
def test_arguments_reach_a_template_as_in_transformers(name: str, arguments: dict[str, Any]) -> None:
    documents = "{% for each in documents %}{{ each.title }}: {{ each['text'] | tojson }}{% endfor %}{{ eos_token }}"
    template, specials = TOOL_TEMPLATES.get(name) or (documents + QWEN, TOOL_TEMPLATES["qwen"][1])
    ours, theirs = tokenizer_pair(template, specials)
    chat = choose_chat_format(ours, None, arguments)
    dialog = asked("hello", call(name="brave_search"))
    tools = None if "custom_tools" in arguments else [weather()]
    ids = chat.encode(dialog, tools)
    shown = theirs.apply_chat_template(dialog, tools=tools, tokenize=False, add_generation_prompt=True, **arguments)
    assert ours.decode(ids) == shown
    harmless = {key: "hello" if key == "date_string" else value for key, value in arguments.items()}
    if "<|" in str(arguments) and harmless != arguments:
        same = choose_chat_format(ours, None, harmless).encode(dialog, tools)
        assert control_ids(ours, ids) == control_ids(ours, same)


def test_a_models_template_for_tools_is_read_where_there_are_tools() -> None:
    """Hermes and Command R bring two templates; the plain one has no place for tools."""
    template, specials = TOOL_TEMPLATES["hermes"]
    plain = "\n{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n\n{% endfor %}\n"
    ours, theirs = tokenizer_pair({"default": plain, "tool_use": "\n" + template + "\n"}, specials)
    dialog = [{"role": "user", "content": "Hi"}]
    for tools in (None, [weather()]):
        ids = TemplateChat(ours).encode(dialog, tools)
        assert ours.decode(ids) == theirs.apply_chat_template(
            dialog, tools=tools, tokenize=False, add_generation_prompt=True
        )


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_a_begun_answer_is_continued_as_in_transformers(name: str) -> None:
    ours, theirs = tokenizer_pair(*TOOL_TEMPLATES[name])
    chat = TemplateChat(ours)
    question = {"role": "user", "content": "Hi"}
    closed = control_ids(ours, chat.encode([question, {"role": "assistant", "content": "x"}, question]))
    for text in ("The weather", "  The <|im_end|> weather \n", "x"):
        dialog = [question, {"role": "assistant", "content": text}]
        ids = chat.encode(dialog, continue_final_message=True)
        assert ours.decode(ids) == theirs.apply_chat_template(dialog, tokenize=False, continue_final_message=True)
        begun = control_ids(ours, ids)
        assert begun == closed[: len(begun)] and len(begun) < len(closed)


def test_the_last_text_of_a_begun_answer_in_parts_is_continued() -> None:
    parts = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    template = "{% for m in messages %}<|im_start|>" + parts + "<|im_end|>{% endfor %}"
    ours, theirs = tokenizer_pair(template, TOOL_TEMPLATES["qwen"][1])
    dialog = [{"role": "assistant", "content": [{"type": "text", "text": "One, "}, {"type": "text", "text": "two "}]}]
    ids = TemplateChat(ours).encode(dialog, continue_final_message=True)
    assert ours.decode(ids) == theirs.apply_chat_template(dialog, tokenize=False, continue_final_message=True)


@pytest.mark.parametrize("chat_format", sorted({*CHAT_FORMATS} - {"template"}))
def test_every_format_continues_a_begun_answer(chat_format: str) -> None:
    """The prompt is that of the dialog with the answer in it, up to the end of its text."""
    specials = ["<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    specials += ["<|im_start|>", "<|im_end|>", "<step>", "<|end_of_turn|>", "[INST]", "[/INST]"]
    ours, _ = tokenizer_pair(None, [*specials, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"])
    chat = choose_chat_format(ours, chat_format)
    dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, I"}]
    begun = ours.decode(chat.encode(dialog, continue_final_message=True))
    assert begun.endswith("Well, I")
    assert ours.decode(chat.encode([*dialog, dialog[0]])).startswith(begun)
    with pytest.raises(ValueError, match="needs a dialog that ends with an 'assistant' message, got 'user'"):
        chat.encode(dialog[:1], continue_final_message=True)
    if chat_format not in ("llama3", "chatml"):
        with pytest.raises(ValueError, match="ending with"):
            chat.encode(dialog)
    with pytest.raises(ValueError, match=f"chat format {chat_format} has no place for tools: use a model whose"):
        chat.encode(dialog[:1], [weather()])


def test_what_a_template_has_no_place_for_is_told() -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    chat = TemplateChat(tokenizer_pair(plain, TOOL_TEMPLATES["qwen"][1])[0])
    question = {"role": "user", "content": "Hi"}
    for _ in range(2):
        with pytest.raises(ValueError, match="this model's chat template has no place for tools"):
            chat.encode([question], [weather()])
    begun = {"role": "assistant", "content": "<think>No.</think>Hi"}
    with pytest.raises(ValueError, match="changes or leaves out the last message: it cannot be continued"):
        chat.encode([question, begun], continue_final_message=True)
    for tools in ({"name": "x"}, [7], [{"type": "function"}], [{"name": 3}]):
        with pytest.raises(ValueError, match=r"tools must be a list of descriptions|a tool is described by"):
            chat.encode([question], tools)  # type: ignore[arg-type]


def test_wrong_arguments_are_told_where_they_are_chosen(tmp_path: Path) -> None:
    assert BuildOptions("x", template_kwargs='{"a": [1]}').template_arguments == {"a": [1]}
    for wrong in ("{", "[1]", "7", [1], {1: 2}):
        with pytest.raises(ValueError, match="template_kwargs must be a JSON object"):
            BuildOptions("x", template_kwargs=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chat_format llama3 and a chat_template exclude each other"):
        BuildOptions("x", chat_format="llama3", chat_template="x.jinja")
    ours, _ = tokenizer_pair(*TOOL_TEMPLATES["qwen"])
    for name in ("messages", "tools", "add_generation_prompt"):
        with pytest.raises(ValueError, match=f"template_kwargs cannot have '{name}'"):
            choose_chat_format(ours, None, {name: 1})
    with pytest.raises(ValueError, match="template_kwargs are for a chat template, and chat format llama2 is none"):
        choose_chat_format(ours, "llama2", {"a": 1})


def test_a_template_may_come_from_a_file_or_as_a_text(tmp_path: Path) -> None:
    write_meta(tmp_path, state=chain_state(TINY, {}))
    (tmp_path / "mine.jinja").write_text(LETTERS)
    question = [{"role": "user", "content": "Hi"}]
    for template in (LETTERS, tmp_path / "mine.jinja", str(tmp_path / "mine.jinja")):
        llm = build(tmp_path, chat_template=template, template_kwargs={"note": "!"})
        [ids] = llm.encode_dialogs([question])
        assert bytes(ids) == b"u:Hi;!a:"
    (tmp_path / "data.bin").write_bytes(b"\xff{{")
    for wrong in (tmp_path / "data.bin", tmp_path / "params.json"):
        with pytest.raises(ValueError, match="is no chat template: expected a file of jinja's text"):
            build(tmp_path, chat_template=wrong)
    with pytest.raises(FileNotFoundError, match=r"there is no chat template .*none\.jinja"):
        build(tmp_path, chat_template=tmp_path / "none.jinja")
    with pytest.raises(ValueError, match="the chat template is no valid jinja"):
        build(tmp_path, chat_template="{% if %}")


@pytest.fixture
def caller(tmp_path: Path) -> Llama:
    """A model that says [f()], whatever it is asked, in a format whose template has a place for tools."""
    said = "Q[f()]"
    successors = {ord(a): ord(b) for a, b in itertools.pairwise(said)}
    write_meta(tmp_path, state=chain_state(TINY, {**successors, ord("]"): TINY_END}))
    template = LETTERS.replace("{{ note }}", "{{ tools[0].name if tools }}").replace("a:", "Q")
    return build(tmp_path, chat_template=template + "{# [g(a=1)] #}", max_seq_len=96)


def test_chat_completion_returns_calls_where_there_are_tools(caller: Llama) -> None:
    question = {"role": "user", "content": "Hi"}
    [plain] = caller.chat_completion([[question]], 0)
    assert plain["generation"] == {"role": "assistant", "content": "[f()]"}
    first, second = caller.chat_completion([[question], [question, question]], 0, tools=[{"name": "f"}], n=1)
    [made] = first["generation"]["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {}} and made["type"] == "function"
    assert first["generation"]["content"] == "" and first["tokens"] == list("[f()]")
    assert len(made["id"]) == 9 and made["id"].isalnum() and made["id"] != second["generation"]["tool_calls"][0]["id"]
    with pytest.raises(ValueError, match="echo repeats a prompt"):
        caller.chat_completion([[question]], 0, tools=[{"name": "f"}], echo=True)


def test_an_answer_goes_on_where_its_beginning_ends(caller: Llama) -> None:
    dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Q[f"}]
    [answer] = caller.chat_completion([dialog], 0, continue_final_message=True)
    assert answer["generation"]["content"] == "()]"


def test_lines_of_a_job_have_tools_and_begun_answers(caller: Llama) -> None:
    """OpenAI's have arguments as texts, and the finish_reason tool_calls."""
    messages, tools = [{"role": "user", "content": "Hi"}], [{"name": "f"}]
    begun = [*messages, {"role": "assistant", "content": "Q[f"}]
    openai = {"messages": messages, "tools": tools, "temperature": 0, "parallel_tool_calls": False}
    lines: list[dict[str, Any]] = [
        {"messages": messages, "tools": tools},
        {"messages": begun, "continue_final_message": True},
        {"custom_id": "a", "body": openai},
        {"custom_id": "b", "body": {**openai, "tool_choice": "none"}},
        {"custom_id": "c", "body": {"messages": begun, "continue_final_message": True}},
        {"prompt": "x", "tools": tools},
        {"messages": messages, "tools": tools, "echo": True},
        {"custom_id": "d", "body": {**openai, "tool_choice": "required"}},
    ]
    found = Job(caller, lines, temperature=0).results
    by_flag = Job(caller, [{"messages": messages}, lines[3], "x"], temperature=0, tools=tools).results
    assert by_flag[0]["tool_calls"] and by_flag[2]["completion_tokens"]
    assert by_flag[1]["response"]["body"]["choices"][0]["message"]["content"] == "[f()]"
    assert found[0]["generation"] == "" and found[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert found[1]["generation"] == "()]"
    called, text, went_on = (found[i]["response"]["body"]["choices"][0] for i in (2, 3, 4))
    assert called["finish_reason"] == "tool_calls" and called["message"]["content"] is None
    assert called["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert (text["message"]["content"], text["finish_reason"]) == ("[f()]", "stop")
    assert "tool_calls" not in text["message"] and went_on["message"]["content"] == "()]"
    assert "tools must come with messages" in found[5]["error"] and "echo repeats a prompt" in found[6]["error"]
    assert "tool_choice must be none or auto" in found[7]["error"]["message"]


def test_arguments_of_openais_calls_are_objects_for_templates() -> None:
    """As texts, templates would write them as JSON once more."""
    made = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    line: dict[str, Any] = {"messages": [{"role": "assistant", "content": None, "tool_calls": [made]}]}
    request = line_form(json.dumps({"custom_id": "x", "body": line}).encode(), True, 0, "m").request(SamplingParams())
    assert request.messages is not None
    assert request.messages[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    for wrong in ("{", "[1]"):
        made["function"] = {"name": "f", "arguments": wrong}
        with pytest.raises(ValueError, match="the arguments of a call must be a JSON object, as a text"):
            line_form(json.dumps({"custom_id": "x", "body": line}).encode(), True, 0, "m").request(SamplingParams())


def test_a_file_of_tools_is_a_list_or_one(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    for tools in ([weather()], weather()):
        path.write_text(json.dumps(tools))
        assert read_tools(path) == [weather()]
    assert read_tools(None) is None
    for wrong in ("{", "7", '[{"name": 1}]', '"x"', "[" * 100_000):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"^--tools .*tools\.json(: | is no list of tools as JSON)"):
            read_tools(path)
