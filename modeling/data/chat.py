"""Chats as pieces of text and special tokens, by a template, with what the assistant wrote marked.

Templates are Jinja as Hugging Face runs them: sandboxed and immutable, `trim_blocks` and
`lstrip_blocks`, `raise_exception`, `tojson`, loop controls, and `{% generation %}` around what
counts in the loss (`tokenizer.apply_chat_template`).

A special token is one only where the *template* writes it; a message that spells `<|im_end|>` ends
no turn. So each special token in the template's own literals, and in the variables that name one
(`bos_token`), is replaced, before the template is compiled, by its id between two marks: a
noncharacter of Unicode (U+FDD0 to U+FDEF) that the document does not hold. What the template gives
is cut at the marks. A token that the template puts together from parts is an error, since nothing
tells it from one that a message spells.

A document depends on nothing but itself: a template that asks for the time is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser

_MARKS = [chr(code_point) for code_point in range(0xFDD0, 0xFDF0)]
_OPEN, _CLOSE = "(", ")"
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template's own expressions may raise on a document that it does not fit."""


class Piece(NamedTuple):
    """A run of text, or one special token."""

    content: str | int
    counts: bool
    """Whether its tokens are to be predicted."""


class TemplateProblem(ValueError):
    """A template cannot be applied to a document, or not at all."""


def free_mark(*texts: str) -> str:
    """Returns a noncharacter that no text holds.

    Raises:
        TemplateProblem: together they hold all.
    """
    mark = next((mark for mark in _MARKS if not any(mark in text for text in texts)), None)
    if mark is None:
        raise TemplateProblem("the document holds every noncharacter from U+FDD0 to U+FDEF")
    return mark


class ChatTemplate:
    """Renders the documents of a chat format."""

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, int],
        variables: Mapping[str, Any],
        *,
        counts_all: bool = False,
    ) -> None:
        """Compiles `template`.

        Args:
            template: Jinja.
            special_tokens: the id of each token that the template may write.
            variables: what it may read beside the document's own fields.
            counts_all: counts every piece, whatever the template marks.

        Raises:
            TemplateProblem: it is not Jinja, or marks nothing that counts.
        """
        self._template = template
        self._variables = dict(variables)
        self._counts_all = counts_all
        longest_first = sorted(special_tokens, key=lambda token: (-len(token), token))
        self._tokens = [(token, special_tokens[token]) for token in longest_first]
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._compiled: dict[str, _Compiled] = {}
        if not self._marked_for("").has_generation and not counts_all:
            raise TemplateProblem(
                "the chat template has no `{% generation %}` block, so that no token would be "
                "learned. Put `{% generation %}` and `{% endgeneration %}` around what the "
                "assistant writes, or set `format.loss: all`."
            )

    def render(self, document: str) -> list[Piece]:
        """Returns the pieces of a document as `modeling.data.records` writes chats.

        Raises:
            TemplateProblem: the template refuses the document, fails on it, or puts a special token
                together from parts.
        """
        compiled = self._marked_for(document)
        try:
            text = compiled.template.render(compiled.variables | json.loads(document))
        except _FAILURES as error:
            raise TemplateProblem(f"the chat template fails: {error}") from error
        pieces = list(self._pieces(text, compiled.mark))
        for piece in pieces:
            if isinstance(piece.content, str):
                self._refuse_assembled(piece.content, document)
        return pieces

    def _marked_for(self, document: str) -> "_Compiled":
        """Returns the template with a mark that neither it nor the document holds."""
        mark = free_mark(document, self._template)
        if mark not in self._compiled:
            self._compiled[mark] = _Compiled(self, mark)
        return self._compiled[mark]

    def _marked(self, literal: str, mark: str) -> str:
        numbers = {token: str(index) for index, (token, _) in enumerate(self._tokens)}
        return self._spelled.sub(lambda found: mark + numbers[found[0]] + mark, literal)

    def _pieces(self, text: str, mark: str) -> Iterator[Piece]:
        counts = self._counts_all
        for index, part in enumerate(text.split(mark)):
            if index % 2 == 0:
                if part:
                    yield Piece(part, counts)
            elif part in (_OPEN, _CLOSE):
                if counts == (part == _OPEN):
                    raise TemplateProblem("the chat template has one generation block in another")
                counts = part == _OPEN
            else:
                yield Piece(self._id(part), counts)
        if text.count(mark) % 2:
            raise TemplateProblem(_CUT)

    def _id(self, number: str) -> int:
        if not number.isdecimal() or int(number) >= len(self._tokens):
            raise TemplateProblem(_CUT)
        return self._tokens[int(number)][1]

    def _refuse_assembled(self, text: str, document: str) -> None:
        for found in self._spelled.finditer(text):
            as_json = json.dumps(found[0], ensure_ascii=False)[1:-1]
            if as_json not in document:
                raise TemplateProblem(
                    f"the chat template puts {found[0]!r} together from parts, which nothing tells "
                    f"from a message that spells it. Write the token out whole in the template, "
                    f"e.g. once for each role."
                )


_CUT = "the chat template cuts a special token, or a generation block, into parts"


class _Compiled:
    """A template whose special tokens are marked with one mark."""

    def __init__(self, owner: ChatTemplate, mark: str) -> None:
        self.mark = mark

        def marked(value: str) -> str:
            return owner._marked(value, mark)

        self.variables = {
            name: marked(value) if isinstance(value, str) else value
            for name, value in owner._variables.items()
        }
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=_Unprintable,
            extensions=[_Generation, _MarkedLiterals, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.extend(
            marked=marked,
            opening="" if owner._counts_all else mark + _OPEN + mark,
            closing="" if owner._counts_all else mark + _CLOSE + mark,
            has_generation=False,
        )
        try:
            self.template = environment.from_string(owner._template)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateProblem(f"the chat template, line {error.lineno}: {error}") from error
        self.has_generation: bool = environment.has_generation  # pyright: ignore[reportAttributeAccessIssue]


class _MarkedLiterals(jinja2.ext.Extension):
    """Marks special tokens in whatever text the template itself holds."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        for token in stream:
            if token.type in ("data", "string"):
                value = self.environment.marked(token.value)  # pyright: ignore[reportAttributeAccessIssue]
                yield Token(token.lineno, token.type, value)
            else:
                yield token


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: puts marks around what it holds."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        environment: Any = self.environment
        environment.has_generation = True
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opening, closing = (
            nodes.Output([nodes.TemplateData(mark)])
            for mark in (environment.opening, environment.closing)
        )
        return nodes.Scope([opening, *body, closing], lineno=lineno)


class _Unprintable(jinja2.Undefined):
    """May be tested for, but not written: a misspelled field must not vanish in silence."""

    def __str__(self) -> str:
        self._fail_with_undefined_error()
        return ""

    def __iter__(self) -> Iterator[Any]:
        self._fail_with_undefined_error()
        return iter(())


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    raise jinja2.TemplateError(
        "it asks for the time, but a document's tokens may depend on the document alone; set what "
        "the template reads instead (such as `date_string`) in `format.variables`"
    )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys
    )
