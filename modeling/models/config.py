"""Hyperparameters of the model architectures, each built by the file of its name. No JAX here."""

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag

from modeling.canonical import NOT_IDENTITY, added_later
from modeling.fields import STRICT, Positive, type_or

_COMMON_AXES = frozenset(
    {"batch", "position", "vocab", "layers", "embed", "heads", "head_size", "mlp"}
)
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Derived:
    """What follows from the fields of any transformer here; it has none of its own."""

    hidden_dim: int
    num_layers: int
    num_heads: int
    initializer_range: float
    vocab_pad_multiple: int

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.hidden_dim // self.num_heads

    @property
    def residual_range(self) -> float:
        """Keeps the variance of the residual stream, a sum of 2 `Layers` branches, from growing."""
        return self.initializer_range / math.sqrt(2 * self.num_layers)

    def vocab_rows(self, vocab_size: int) -> int:
        """Returns how many rows the embedding, and a head of its own, of so many ids has."""
        return -(-vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple

    @property
    def execution(self) -> dict[str, Any]:
        """How the same sums are computed: what may change bits, and no science."""
        return {name: getattr(self, name) for name in _EXECUTION}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config(_Derived):
    """GPT-2 (Radford et al. 2019): pre-LN blocks, learned positions, biases, tied head."""

    type: Literal["gpt2"] = "gpt2"
    hidden_dim: Positive = 768
    num_layers: Positive = 12
    num_heads: Positive = 12
    mlp_scale: Positive = 4
    layer_norm_epsilon: Annotated[float, Field(gt=0.0)] = 1e-5
    initializer_range: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of initial weights; residual projections get it over sqrt(2 layers)."""
    embed_pdrop: Probability = 0.0
    resid_pdrop: Probability = 0.0
    attn_pdrop: Probability = 0.0
    scale_attn_by_inverse_layer_idx: bool = False
    """Divides attention scores by (layer + 1), for stability in low precision (Mistral)."""
    upcast_attn: bool = False
    """Scores and softmax in float32; Hugging Face calls it `reorder_and_upcast_attn`."""
    gradient_checkpointing: bool | Literal["products", "nested", "offload"] = dataclasses.field(
        default=True, metadata=NOT_IDENTITY
    )
    """What of a block is computed again in the backward pass instead of kept. True: all of it, for
    about a third more work; False: nothing; `products`: what is cheap, matrix products are kept;
    `nested`: of most layers their input too; `offload`: layer inputs wait in host memory."""
    unroll_layers: Positive = dataclasses.field(default=1, metadata=NOT_IDENTITY)
    """Layers in one turn of the loop over layers: more take longer to compile, and may run faster
    where turns are short."""
    attention: Literal["auto", "xla", "cudnn"] = dataclasses.field(
        default="auto", metadata=NOT_IDENTITY
    )
    """Which program attends: cuDNN's fused one, which keeps no scores, or XLA's products. `auto` is
    cuDNN's on a GPU in 16 bits where it can do what is asked."""
    vocab_pad_multiple: Positive = dataclasses.field(default=1, metadata=added_later(1))
    """The embedding gets zero rows up to a multiple of this, so that devices can share it evenly.
    No id changes: these rows are no ids, have the probability 0 and the gradient 0, and are left
    out of exports."""

    identity_tag: ClassVar[str] = "model.gpt2/1"
    axis_names: ClassVar[frozenset[str]] = _COMMON_AXES | {"qkv"}
    """Of all arrays of the model and of the rows that it takes: what a mesh can split."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} is not a multiple of num_heads {self.num_heads}; "
                f"each head takes hidden_dim / num_heads features."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(_Derived):
    """Llama (Touvron et al. 2023): RMS norms, rotary positions, gated MLP, shared key heads."""

    type: Literal["llama"]
    hidden_dim: Positive = 1024
    num_layers: Positive = 24
    num_heads: Positive = 16
    num_kv_heads: Positive = 8
    """Heads of keys and values, each shared by num_heads / num_kv_heads heads of queries."""
    mlp_dim: Positive = 2816
    rms_norm_epsilon: Annotated[float, Field(gt=0.0)] = 1e-5
    rope_theta: Annotated[float, Field(gt=0.0)] = 10000.0
    """The slowest pair of features turns by a radian in almost so many positions."""
    initializer_range: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of initial weights; residual projections get it over sqrt(2 layers)."""
    tie_word_embeddings: bool = False
    """Whether the embedding is the head as well."""
    gradient_checkpointing: bool | Literal["products", "nested", "offload"] = dataclasses.field(
        default=True, metadata=NOT_IDENTITY
    )
    """As in `Gpt2Config`, like the next three."""
    unroll_layers: Positive = dataclasses.field(default=1, metadata=NOT_IDENTITY)
    attention: Literal["auto", "xla", "cudnn"] = dataclasses.field(
        default="auto", metadata=NOT_IDENTITY
    )
    vocab_pad_multiple: Positive = 1

    identity_tag: ClassVar[str] = "model.llama/1"
    axis_names: ClassVar[frozenset[str]] = _COMMON_AXES | {"group"}
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.hidden_dim % (2 * self.num_heads):
            raise ValueError(
                f"hidden_dim {self.hidden_dim} is not a multiple of twice num_heads "
                f"{self.num_heads}; each head takes hidden_dim / num_heads features, in pairs."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; each of these is shared by equally many of the former."
            )


_EXECUTION = ("gradient_checkpointing", "unroll_layers", "attention")


ModelConfig = Annotated[
    Annotated[Gpt2Config, Tag("gpt2")] | Annotated[LlamaConfig, Tag("llama")], type_or("gpt2")
]
"""Of which architecture a model is, by `type`; GPT-2 where none is written."""

MODEL_PRESETS: dict[str, Gpt2Config | LlamaConfig] = {
    "gpt2-nano": Gpt2Config(hidden_dim=128, num_layers=4, num_heads=4),
    "gpt2-small": Gpt2Config(hidden_dim=768, num_layers=12, num_heads=12),
    "gpt2-medium": Gpt2Config(hidden_dim=1024, num_layers=24, num_heads=16),
    "gpt2-large": Gpt2Config(hidden_dim=1280, num_layers=36, num_heads=20),
    "gpt2-xl": Gpt2Config(hidden_dim=1600, num_layers=48, num_heads=25),
    "llama-nano": LlamaConfig(
        type="llama", hidden_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=352
    ),
    "llama-350m": LlamaConfig(type="llama"),
}
"""Named sizes, for `levanter train --model NAME` and `model: NAME` in an experiment file."""
