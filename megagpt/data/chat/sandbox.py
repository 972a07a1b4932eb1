"""Run chat templates, which are programs from elsewhere, where they reach only their arguments.

jinja2's immutable sandbox with the settings and the functions that templates expect: those of
transformers 5.23 (utils/chat_template_utils.py). There is no loader, so a template cannot read
files. Access to Python's internals is an error at once; jinja2 alone prints an empty text for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import FunctionLoader, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Stand around what a template has between its generation tags. No text can hold them: they are
# not characters (Unicode, section 23.7), and records with them are refused.
BEGIN = "\ufdd0"
END = "\ufdd1"
NOT_FOR_TEMPLATES = ("lipsum", "cycler", "joiner")  # of jinja2's, not of transformers'


class RefusedByTemplateError(TemplateError):
    """A template called raise_exception: it does not write such a conversation."""


class GenerationTags(Extension):
    """The tags `{% generation %}` and `{% endgeneration %}` around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a node that puts marks around the text between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of all templates; raises SecurityError where one leaves it."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTags, loopcontrols],
            loader=FunctionLoader(_refuse_file),
        )
        for name in NOT_FOR_TEMPLATES:
            del self.globals[name]
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": lambda *items, **named: dict(*items, **named),
            "namespace": _namespace,
        }

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse an attribute that leads to Python's internals."""
        raise SecurityError(f"it asks for {attribute!r} of a {type(obj).__name__}")


class _PlainNamespace(Namespace):
    """jinja2's namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _namespace(*items: Any, **named: Any) -> _PlainNamespace:
    attributes = dict(*items, **named)
    for name in attributes:
        _require_plain(name)
    return _PlainNamespace(attributes)


def _require_plain(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it sets {name!r} of a namespace")


def _refuse_file(name: str) -> NoReturn:
    raise SecurityError(f"it asks for the file {name!r}")


def _raise_exception(message: Any) -> NoReturn:
    raise RefusedByTemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers writes it: characters stay as they are, also < and >."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
