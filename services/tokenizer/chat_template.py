"""Finds the chat template of a checkpoint and renders messages with it, character for character as transformers does.

Does not know token ids, and which special tokens exist: they come in as variables. A template is code from the checkpoint,
so it runs in the sandbox of jinja2.
Source: https://huggingface.co/docs/transformers/chat_templating and transformers/utils/chat_template_utils.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.core.errors import CheckpointError, InvalidRequest

# Names under which clients send the reasoning of an earlier answer; templates read the first.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class NamedTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the list form of `chat_template` in tokenizer_config.json."""

    name: str
    template: str


class ChatTemplate:
    """The templates of one checkpoint by name, compiled at first use; `now` is what `strftime_now` formats."""

    def __init__(self, sources: Mapping[str, str], *, now: Callable[[], datetime] = datetime.now) -> None:
        self._sources = dict(sources)
        self._environment = _environment(now)
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_checkpoint(cls, directory: Path, configured: str | Sequence[NamedTemplate] | None) -> "ChatTemplate":
        """The templates in files of their own if there are any, else those that tokenizer_config.json gave (`configured`).

        Raises CheckpointError if a template file cannot be read. A checkpoint without any template is fine until it is used.
        """
        files = {path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
        if (directory / "chat_template.jinja").exists():
            files["default"] = directory / "chat_template.jinja"
        if files:
            return cls({name: _read_text(path) for name, path in files.items()})
        if isinstance(configured, str):
            return cls({"default": configured})
        return cls({named.name: named.template for named in configured or ()})

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object],
    ) -> str:
        """The prompt for these messages.

        The template sees the arguments under their own names, and `variables` (special tokens, options like
        `enable_thinking`) next to them. Message fields that are None are left out: templates test for presence.
        Raises InvalidRequest if there is no template, if it refuses the messages, or if it fails on them.
        """
        if not messages:
            raise InvalidRequest("messages", "need at least one message")
        if not all(isinstance(message, Mapping) for message in messages):
            raise InvalidRequest("messages", "every message must be an object")
        inputs = {
            "messages": [_as_templates_expect(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        if reserved := sorted(inputs.keys() & variables.keys()):
            raise InvalidRequest("variables", f"{', '.join(reserved)} cannot be set as a template variable")
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise InvalidRequest("messages", "this checkpoint has no chat template")
        try:
            return self._template(name).render({**variables, **inputs})
        except jinja2.TemplateSyntaxError as error:
            raise InvalidRequest("messages", f"the chat template is broken in line {error.lineno}: {error.message}") from error
        except jinja2.TemplateError as error:
            # Also what the template says itself with raise_exception: it is about the messages and meant to be read.
            raise InvalidRequest("messages", f"the chat template refused them: {error}") from error
        except Exception as error:
            # A template may fail with any exception (a str plus None, a recursion); its text is not for the client.
            raise InvalidRequest("messages", f"the chat template failed on them ({type(error).__name__})") from error

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            self._compiled[name] = self._environment.from_string(self._sources[name])
        return self._compiled[name]


class _Generation(Extension):
    """{% generation %}…{% endgeneration %} marks what the assistant wrote, for training; here it renders its body.

    The body is a call block, as in transformers, so that a `set` in it stays in it.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it without ClassVar)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Macro) -> str:
        return caller()


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: now().strftime(format)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # The filter that jinja2 has by default escapes <, > and & for HTML, which a model would then read.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _as_templates_expect(message: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in message.items() if value is not None}
    for name in REASONING_FIELDS:
        if name in fields:
            return {"thinking": fields[name], **fields, "reasoning_content": fields[name]}
    return fields


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError("cannot read the chat template", path=str(path)) from error
