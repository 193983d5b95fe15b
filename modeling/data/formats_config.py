"""What a record is: a text, messages, a prompt and its completion, or ids. Imports no JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from modeling.fields import STRICT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFormat:
    """A record is a text, every token of which is learned."""

    type: Literal["text"] = "text"

    identity_tag: ClassVar[str] = "format.text/1"
    __pydantic_config__ = STRICT

    @property
    def learns_all(self) -> bool:
        """Whether every token of a document is to be predicted."""
        return True

    def reading(self) -> Mapping[str, Any]:
        """What of this decides which documents a corpus holds."""
        return {}

    def rendering(self) -> Mapping[str, Any]:
        """What of this decides which tokens a document becomes."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A record is a list of messages; a template says how they are written."""

    type: Literal["chat"]
    messages_field: str = "messages"
    """The field with the list of `{"role": ..., "content": ...}`."""
    context_fields: tuple[str, ...] = ()
    """Fields that the template reads beside the messages, such as `tools`; a record may lack them.
    """
    template: str | None = None
    """Jinja, as in a Hugging Face `chat_template`; None takes the tokenizer's own. A file is named
    by `template_file: PATH` instead, relative to the dataset's file."""
    variables: Mapping[str, str | int | float | bool] = dataclasses.field(default_factory=dict)
    """What else the template may read, the same for every document."""
    loss: Literal["assistant", "all"] = "assistant"
    """Learns what the template puts between `{% generation %}` and `{% endgeneration %}`, or all.
    """

    identity_tag: ClassVar[str] = "format.chat/1"
    __pydantic_config__ = STRICT

    @property
    def learns_all(self) -> bool:
        """Whether every token of a document is to be predicted."""
        return self.loss == "all"

    def reading(self) -> Mapping[str, Any]:
        """What of this decides which documents a corpus holds."""
        return {"type": "chat", "fields": [self.messages_field, *self.context_fields]}

    def rendering(self) -> Mapping[str, Any]:
        """What of this decides which tokens a document becomes."""
        return {
            "type": "chat",
            "template": self.template,
            "variables": dict(self.variables),
            "loss": self.loss,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedFormat:
    """A record is a prompt and its completion, of which the completion alone is learned."""

    type: Literal["supervised"]
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    separator: str = ""
    """Text between the two; it belongs to the prompt."""

    identity_tag: ClassVar[str] = "format.supervised/1"
    __pydantic_config__ = STRICT

    @property
    def learns_all(self) -> bool:
        """Whether every token of a document is to be predicted."""
        return False

    def reading(self) -> Mapping[str, Any]:
        """What of this decides which documents a corpus holds."""
        return {"type": "supervised", "fields": [self.prompt_field, self.completion_field]}

    def rendering(self) -> Mapping[str, Any]:
        """What of this decides which tokens a document becomes."""
        return {"type": "supervised", "separator": self.separator}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdsFormat:
    """A record is a list of ids, tokenized elsewhere; it takes `tokenizer: {type: passthrough}`."""

    type: Literal["ids"]
    field: str = "input_ids"
    """The field or column with the list, where the source has records."""
    separator_id: Annotated[int, Field(ge=0)] | None = None
    """The id that ends each document of a flat file of ids; it is no part of the document."""
    dtype: Literal["uint16", "uint32"] | None = None
    """Of a flat file without a header, little endian; `.npy` files say it themselves."""

    identity_tag: ClassVar[str] = "format.ids/1"
    __pydantic_config__ = STRICT

    @property
    def learns_all(self) -> bool:
        """Whether every token of a document is to be predicted."""
        return True

    def reading(self) -> Mapping[str, Any]:
        """What of this decides which documents a corpus holds."""
        return {
            "type": "ids",
            "fields": [self.field],
            "separator_id": self.separator_id,
            "dtype": self.dtype,
        }

    def rendering(self) -> Mapping[str, Any]:
        """What of this decides which tokens a document becomes."""
        return {"type": "ids"}


Format = Annotated[
    TextFormat | ChatFormat | SupervisedFormat | IdsFormat, Field(discriminator="type")
]
