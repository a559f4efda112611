"""Chat templates render as in transformers, and whatever goes wrong in one becomes InvalidRequest."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import InvalidRequest
from services.tokenizer.chat_template import ChatTemplate, NamedTemplate
from services.tokenizer.tokenizer import Tokenizer

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and tools %}{%- continue %}{%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last_query %}
            {{- '<think>\\n' + message.reasoning_content.strip() + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA = """\
{{ bos_token }}
{% if documents is defined and documents %}
<documents>
    {% for document in documents %}
    {{ loop.index }}. {{ document.title | upper }}: {{ document.text | tojson(indent=2) }}
    {% endfor %}
</documents>
{% endif %}
{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = messages[0]['content'] | trim %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.first and system_message is not false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ content | trim }}{{ eos_token }}{{ pad_token }}
{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}
"""
USER = {"role": "user", "content": "What is 1 < 2 & 'é' > \"日本\"? 😀 "}
TURNS = [{"role": "system", "content": " Be brief. "}, USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"query": "größer <b>", "limit": 3, "exact": None}}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "enum": ["é", "<"]}}}]
DOCUMENTS = [{"title": "a", "text": "one\n<two>"}, {"title": "b", "text": ""}]
CONVERSATIONS: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    ("chatml", [USER], {}),
    ("chatml", TURNS, {}),
    ("chatml", TURNS, {"tools": TOOLS}),
    ("chatml", [USER], {"tools": TOOLS, "enable_thinking": False}),
    ("chatml", [USER, {"role": "assistant", "content": "", "reasoning": " hm ", "tool_calls": [CALL]}], {"tools": TOOLS}),
    ("chatml", [USER, {"role": "assistant", "content": "a", "reasoning_content": None, "tool_calls": None}], {}),
    ("llama", [USER], {}),
    ("llama", TURNS, {}),
    ("llama", TURNS, {"documents": DOCUMENTS, "eos_token": "<|eot|>", "pad_token": "<pad>"}),
]
CASES: list[dict[str, Any]] = [
    {"template": template, "messages": messages, "add_generation_prompt": prompt, **more}
    for template, messages, more in CONVERSATIONS
    for prompt in (True, False)
]
RENDER_WITH_TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
directories, cases = json.load(sys.stdin)
tokenizers = {name: AutoTokenizer.from_pretrained(path) for name, path in directories.items()}
rendered = [tokenizers[case.pop("template")].apply_chat_template(case.pop("messages"), tokenize=False, **case) for case in cases]
json.dump(rendered, sys.stdout)
"""


@pytest.fixture(scope="module")
def template_checkpoints(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One template in a file of its own, one inside tokenizer_config.json."""
    directories = {}
    for name in ("chatml", "llama"):
        directories[name] = tmp_path_factory.mktemp("templates") / name
        shutil.copytree(checkpoints["byte_level"], directories[name])
    (directories["chatml"] / "chat_template.jinja").write_text(CHATML)
    config = directories["llama"] / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": LLAMA}))
    return directories


@pytest.fixture(scope="module")
def rendered_by_transformers(template_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # In a process of its own, away from the repository: transformers imports an optional package `kernels` if it sees one.
    directories = {name: str(path) for name, path in template_checkpoints.items()}
    run = subprocess.run(
        [sys.executable, "-I", "-c", RENDER_WITH_TRANSFORMERS],
        input=json.dumps([directories, CASES]),
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    rendered: list[str] = json.loads(run.stdout)
    return rendered


@pytest.mark.parametrize("index", range(len(CASES)))
def test_apply_chat_template_when_compared_then_it_renders_what_transformers_renders(
    template_checkpoints: dict[str, Path], rendered_by_transformers: list[str], index: int
) -> None:
    case = dict(CASES[index])
    tokenizer = Tokenizer.from_checkpoint(template_checkpoints[case.pop("template")])
    arguments = {name: case.pop(name) for name in ("messages", "add_generation_prompt", "tools", "documents") if name in case}
    rendered = tokenizer.apply_chat_template(**arguments, variables=case)
    assert rendered == rendered_by_transformers[index]
    # That the two agree says little if the cases do not reach the parts that differ between settings of jinja2.
    assert arguments["messages"][-1]["content"].strip() in rendered


def _render(source: str, messages: Any = (USER,), **arguments: Any) -> str:
    defaults: dict[str, Any] = {"add_generation_prompt": True, "variables": {}}
    return ChatTemplate({"default": source}).render(messages, **{**defaults, **arguments})


def test_render_when_the_template_asks_the_time_then_it_is_that_of_the_clock() -> None:
    template = ChatTemplate({"default": "{{ strftime_now('%d %b %Y') }}"}, now=lambda: datetime(2024, 7, 26, tzinfo=UTC))
    assert template.render([USER], add_generation_prompt=True, variables={}) == "26 Jul 2024"


def test_from_checkpoint_when_there_are_several_templates_then_tools_choose(tmp_path: Path) -> None:
    named = [NamedTemplate(name="default", template="plain"), NamedTemplate(name="tool_use", template="tools")]
    template = ChatTemplate.from_checkpoint(tmp_path, named)
    assert template.render([USER], add_generation_prompt=True, variables={}) == "plain"
    assert template.render([USER], add_generation_prompt=True, variables={}, tools=TOOLS) == "tools"


def test_from_checkpoint_when_there_are_template_files_then_they_win_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tool file")
    template = ChatTemplate.from_checkpoint(tmp_path, "config")
    assert template.render([USER], add_generation_prompt=True, variables={}) == "file"
    assert template.render([USER], add_generation_prompt=True, variables={}, tools=TOOLS) == "tool file"


def test_apply_chat_template_when_the_config_has_a_list_then_the_default_is_used(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints["metaspace"], tmp_path / "checkpoint")
    listed = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "{{ bos_token }}|{{ unk_token }}|{{ x }}"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": listed}))
    assert Tokenizer.from_checkpoint(directory).apply_chat_template([USER], variables={"x": 1}) == "<s>||1"


def test_apply_chat_template_when_there_is_no_template_then_invalid_request_says_so(tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizers_by_kind["byte_level"].apply_chat_template([USER])


@pytest.mark.parametrize(
    ("source", "messages", "says"),
    [
        ("x", [], "at least one"),
        ("x", ["hello"], "object"),
        ("{% for %}", [USER], "line 1"),
        ("{{ raise_exception('Roles must alternate') }}", [USER], "refused them: Roles must alternate"),
        ("{{ messages[0].images.first }}", [USER], "refused them: .*no attribute 'images'"),
        ("{{ messages[0].content + 1 }}", [USER], r"failed on them \(TypeError\)$"),
        ("{{ messages[0].nothing | tojson }}", [USER], r"failed on them \(TypeError\)$"),
        ("{{ ''.__class__.__mro__ }}", [USER], "refused them: .*unsafe"),
        ("{{ messages.append(1) }}", [USER], "refused them: .*(not safe|unsafe)"),
        ("{% for i in range(10**9) %}{% endfor %}", [USER], "OverflowError"),
    ],
)
def test_render_when_template_or_messages_are_wrong_then_invalid_request(source: str, messages: list[Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as raised:
        _render(source, messages)
    assert raised.value.field == "messages"


def test_render_when_a_variable_would_replace_the_messages_then_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="variables: messages, tools"):
        _render("x", variables={"tools": [], "messages": [], "x": 1})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name", "thinking", "reasoning"]) | st.text(max_size=8), VALUES)
    | st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": VALUES}),
    max_size=4,
)


@given(messages=MESSAGES, tools=st.none() | st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=2), max_size=2))
def test_render_when_messages_are_anything_gives_text_or_refuses_them(messages: list[dict[str, object]], tools: Any) -> None:
    with contextlib.suppress(InvalidRequest):
        template = ChatTemplate({"default": CHATML})
        assert isinstance(template.render(messages, add_generation_prompt=True, tools=tools, variables={}), str)


def test_render_when_messages_are_nested_beyond_all_bounds_refuses_them() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    template = ChatTemplate({"default": "{{ messages | tojson }}"})
    with pytest.raises(InvalidRequest):
        template.render([{"role": "user", "content": deep}], add_generation_prompt=True, variables={})
    while isinstance(deep, list):  # taken apart by hand, or its end would be a recursion as well
        deep = deep.pop()
