"""The chat template of a tokenizer, or one of ours: a conversation becomes one text.

A model has its template in `chat_template.jinja`, or in `tokenizer_config.json` as a text or as a
list of named ones; further named ones may lie in `additional_chat_templates/`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError

from megagpt.data.byte_level_bpe import END_OF_DOCUMENT
from megagpt.data.chat.named import NAMED
from megagpt.data.chat.sandbox import BEGIN, END, RefusedByTemplateError, Sandbox
from megagpt.data.columns import BadRowError
from megagpt.data.manifest import TOKENIZER_FILE
from megagpt.data.model_tokenizer.files import is_of_a_model, read_settings, text_of
from megagpt.utils import UserError, did_you_mean

TEMPLATE_FILE = "chat_template.jinja"
FURTHER_TEMPLATES = "additional_chat_templates"
DEFAULT = "default"  # the name of the one to take from several
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKS = str.maketrans("", "", BEGIN + END)

Messages = Sequence[Mapping[str, Any]]


class TemplateUnusableError(UserError):
    """A template that no record can make usable: it leaves its sandbox, or hides the answers."""


@dataclass(frozen=True)
class ChatTokens:
    """What a template and its records must know of a tokenizer.

    `named`: bos_token, eos_token and so on, which a template may write. `special`: the names of
    all special tokens, which no message may hold. `known`: all added tokens.
    """

    named: Mapping[str, str]
    special: frozenset[str]
    known: frozenset[str]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds a special token in a text."""
        return re.compile("|".join(map(re.escape, sorted(self.special))) or r"(?!)")

    @classmethod
    def of_directory(cls, directory: Path | None) -> ChatTokens:
        """Read the files of a tokenizer; None: one of ours that is not written yet."""
        if directory is None or not is_of_a_model(directory):
            only = frozenset({END_OF_DOCUMENT})
            return cls({"eos_token": END_OF_DOCUMENT}, only, only)
        named = {
            key: text
            for key, value in read_settings(directory).items()
            if key.endswith("_token") and (text := text_of(value)) is not None
        }
        path = directory / TOKENIZER_FILE
        added = _added_tokens(path) if path.is_file() else []
        special = {token["content"] for token in added if token.get("special")}
        every = frozenset({token["content"] for token in added} | set(named.values()))
        return cls(named, frozenset(special | set(named.values())), every)


def _added_tokens(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(path.read_bytes()).get("added_tokens") or []
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from error
    return found


class ChatTemplate:
    """A compiled template with the tokens that it may write."""

    def __init__(self, name: str, source: str, tokens: ChatTokens) -> None:
        """Raise UserError if the template cannot be compiled."""
        self.name = name
        self.source = source
        self.tokens = tokens
        self.has_tags = GENERATION.search(source) is not None
        try:
            self._template: Template = Sandbox().from_string(source)
        except TemplateSyntaxError as error:
            raise UserError(
                f"chat template {name}: line {error.lineno}: {error.message}; correct it, or name "
                f"another with --chat_template"
            ) from None
        except (TemplateError, RecursionError) as error:
            raise UserError(f"chat template {name}: cannot be read ({error})") from None

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def marked_text(self, messages: Messages, tools: Any = None, *, prompt: bool = False) -> str:
        """Return the text of a conversation with marks at the generation tags.

        `prompt`: and the beginning of the assistant's next answer. Raises BadRowError if the
        template cannot write it, TemplateUnusableError if it leaves its sandbox.
        """
        try:
            return self._template.render(
                {
                    **self.tokens.named,
                    "messages": list(messages),
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": prompt,
                }
            )
        except SecurityError as error:
            raise TemplateUnusableError(
                f"chat template {self.name} reaches outside its sandbox: {_line(error)}; use one "
                "that you trust: --chat_template NAME"
            ) from None
        except RefusedByTemplateError as error:
            raise BadRowError(f"refused by chat template {self.name}: {_line(error)}") from None
        # A template is a program: whatever its operations raise on this record.
        except Exception as error:
            raise BadRowError(
                f"chat template {self.name} cannot write it ({type(error).__name__}: "
                f"{_line(error)})"
            ) from None

    def text(self, messages: Messages, tools: Any = None, *, prompt: bool = False) -> str:
        """Return the text of a conversation; raises as `marked_text`."""
        return self.marked_text(messages, tools, prompt=prompt).translate(MARKS)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def choose_template(chosen: str | None, directory: Path | None) -> ChatTemplate:
    """Return the template that `--chat_template` names, by default the tokenizer's own.

    `directory` holds the tokenizer; None: one of ours. Raises UserError if there is none.
    """
    tokens = ChatTokens.of_directory(directory)
    own = own_templates(directory) if directory is not None else {}
    if chosen is None:
        if DEFAULT not in own:
            raise UserError(_none_of(directory, own))
        return ChatTemplate(f"{directory}", own[DEFAULT], tokens)
    if chosen in NAMED:
        _require_tokens(chosen, tokens)
        return ChatTemplate(chosen, NAMED[chosen].source, tokens)
    if chosen in own:
        return ChatTemplate(chosen, own[chosen], tokens)
    path = Path(chosen)
    if not path.is_file():
        names = (*NAMED, *own)
        raise UserError(
            f"--chat_template {chosen}: no such template{did_you_mean(chosen, names)}; use "
            f"{', '.join(names)}, or a file of jinja2"
        )
    return ChatTemplate(chosen, _read(path), tokens)


def own_templates(directory: Path) -> dict[str, str]:
    """Return the templates of a tokenizer by name, as transformers finds them."""
    found: dict[str, str] = {}
    if (directory / "tokenizer_config.json").is_file():
        stated = read_settings(directory).get("chat_template")
        if isinstance(stated, str):
            found[DEFAULT] = stated
        elif isinstance(stated, list):
            found |= {
                str(item["name"]): str(item["template"])
                for item in stated
                if isinstance(item, dict) and {"name", "template"} <= item.keys()
            }
    if (directory / TEMPLATE_FILE).is_file():
        found[DEFAULT] = _read(directory / TEMPLATE_FILE)
    for path in sorted((directory / FURTHER_TEMPLATES).glob("*.jinja")):
        found[path.stem] = _read(path)
    return found


def default_template(directory: Path) -> str | None:
    """Return the template that a tokenizer's directory has by default, None if it has none."""
    return own_templates(directory).get(DEFAULT)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a chat template ({error})") from None


def _none_of(directory: Path | None, own: Mapping[str, str]) -> str:
    whose = f"{directory}: its tokenizer" if directory is not None else "this tokenizer"
    others = f" (it has {', '.join(own)})" if own else ""
    names = ", ".join((*NAMED, *own))
    return (
        f"{whose} has no chat template{others}; name one: --chat_template NAME ({names}, or a "
        "file of jinja2)"
    )


def _require_tokens(name: str, tokens: ChatTokens) -> None:
    """Raise UserError if the tokenizer lacks a token of one of our templates."""
    missing = [token for token in NAMED[name].tokens if token not in tokens.known]
    if missing:
        raise UserError(
            f"--chat_template {name}: the tokenizer has no token {missing[0]}; use --chat_template "
            "plain, or the tokenizer of a model that has it"
        )
    if name == "plain" and "eos_token" not in tokens.named:
        raise UserError("--chat_template plain: the tokenizer has no eos_token; name another")
