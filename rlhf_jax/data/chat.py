"""Chats to tokens by a model's own template, and which of the tokens the model said.

A template is Jinja and comes with the model, so it runs in a sandbox. Texts that hold a special
token are refused: they could end a turn that they stand in.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import tokenizers as library
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf_jax.data import DataError, tokenizers
from rlhf_jax.data.tokenizers import Tokenizer

Message = Mapping[str, Any]  # role, content, and what a template makes use of
OPEN, CLOSE = "\ue0f0", "\ue0f1"  # private characters: where {% generation %} begins and ends


class Encoded(NamedTuple):
    """A chat's tokens, and which of them the assistant said, its end of turn included."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template.

    `stops` are the tokens that end a turn: several in many models.
    """

    tokenizer: Tokenizer
    template: str
    specials: Mapping[str, str] = field(default_factory=dict)  # bos_token and the like, for Jinja
    stops: tuple[int, ...] = ()

    @property
    def largest(self) -> int:
        """Largest id of a chat: of its texts, or a special token's that the template writes."""
        found = self.tokenizer
        written = {x for name, x in self.specials.items() if name in self.template}
        names = {i: found.base.id_to_token(i) for i in found.specials}
        ids = [i for i, x in names.items() if x in written or x in self.template]
        return max(found.largest, *ids)

    def render(self, messages: Sequence[Message], *, ask: bool = False, **variables: Any) -> str:
        """The chat as text; `ask` opens the assistant's next turn.

        Raises:
            DataError: if the template refuses the messages, or a message holds a special token.
        """
        return self._rendered(messages, ask, variables).replace(OPEN, "").replace(CLOSE, "")

    def encode(
        self, messages: Sequence[Message], *, ask: bool = False, **variables: Any
    ) -> Encoded:
        """Tokens of the chat, and True where the assistant said them.

        What it said is what the template marks by {% generation %}, or, without such marks, what
        each assistant's message adds to the chat before it with its turn opened, up to a stop.

        Raises:
            DataError: if the template refuses the messages, or tells no place of what was said.
        """
        marked = self._rendered(messages, ask, variables)
        text = marked.replace(OPEN, "").replace(CLOSE, "")
        spans = _marked(marked) if OPEN in marked else self._added(messages, text, variables)
        encoding = _with_specials(self.tokenizer).encode(text, add_special_tokens=False)
        ids, mask = encoding.ids, np.zeros(len(encoding.ids), bool)
        for low, high in spans:
            inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < high and b > low]
            ends = [i for i in inside if ids[i] in self.stops]
            mask[[i for i in inside if not ends or i <= ends[-1]]] = True
        return Encoded(ids, mask.tolist())

    def _rendered(self, messages, ask, variables) -> str:
        for message in messages:
            self._check(message)
        try:
            return _compiled(self.template).render(
                messages=list(messages),
                add_generation_prompt=ask,
                **{"tools": None, "documents": None, **self.specials, **variables},
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error

    def _check(self, message: Message) -> None:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or "role" not in message:
            raise DataError(f"a message must be an object with role and content, not {message!r}")
        if not isinstance(content, str):
            return
        added = self.tokenizer.base.get_added_tokens_decoder().values()
        found = [t.content for t in added if t.special and t.content in content]
        if found or OPEN in content or CLOSE in content:
            raise DataError(
                f"a message of {message['role']!r} holds {found or [OPEN]}, which is a special "
                "token: it could end the turn; take it out of the text"
            )

    def _added(self, messages, text: str, variables) -> list[tuple[int, int]]:
        """Characters that the assistant's messages add."""
        found = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], ask=True, **variables)
            after = self.render(messages[: i + 1], **variables)
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    "this chat template writes earlier turns in another way when later ones follow,"
                    " so that what the assistant said cannot be told apart; mark it by"
                    " {% generation %} … {% endgeneration %} in the template, or give one turn"
                )
            found.append((len(before), len(after)))
        return found


def load(path: str | Path, *, template: str | None = None) -> Chat:
    """The chat of a directory of Hugging Face: tokenizer.json, template, special and stop tokens.

    Raises:
        DataError: if there is no template and none is given, or a file cannot be read.
    """
    path = Path(path).expanduser()
    config = tokenizers.read_json(path / "tokenizer_config.json")
    if template is None and (file := path / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    if template is None:
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {one["name"]: one["template"] for one in template}.get("default")
    if template is None:
        raise DataError(f"{path} has no chat template; give one with template=")
    names = {k: _content(v) for k, v in config.items() if k.endswith("_token")}
    specials = {name: x for name, x in names.items() if isinstance(x, str)}
    tokenizer = tokenizers.load(path)
    return Chat(tokenizer, template, specials, tokenizer.stops)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _marked(text: str) -> list[tuple[int, int]]:
    """Where the marked characters stand once the marks are gone."""
    found, at, start = [], 0, 0
    for char in text:
        if char == OPEN:
            start = at
        elif char == CLOSE:
            found.append((start, at))
        else:
            at += 1
    return found


@functools.lru_cache(maxsize=16)
def _with_specials(tokenizer: Tokenizer) -> library.Tokenizer:
    """The same tokenizer, reading special tokens in a text as such: the template's."""
    found = library.Tokenizer.from_str(tokenizer.base.to_str())
    found.encode_special_tokens = False
    return found


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the model says."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller):
        return f"{OPEN}{caller()}{CLOSE}"


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )

    def stop(message):
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = stop
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template cannot be read: {error}") from error
