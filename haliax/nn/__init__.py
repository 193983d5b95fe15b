"""Layers, activations, losses and attention on named arrays; what few models use, on first use."""

import importlib
from typing import TYPE_CHECKING

from haliax.nn import activations as activations
from haliax.nn import attention as attention
from haliax.nn import embedding as embedding
from haliax.nn import linear as linear
from haliax.nn import loss as loss
from haliax.nn import normalization as normalization
from haliax.nn import scan as scan
from haliax.nn.activations import celu as celu
from haliax.nn.activations import elu as elu
from haliax.nn.activations import gelu as gelu
from haliax.nn.activations import glu as glu
from haliax.nn.activations import hard_sigmoid as hard_sigmoid
from haliax.nn.activations import hard_silu as hard_silu
from haliax.nn.activations import hard_swish as hard_swish
from haliax.nn.activations import hard_tanh as hard_tanh
from haliax.nn.activations import leaky_relu as leaky_relu
from haliax.nn.activations import log_sigmoid as log_sigmoid
from haliax.nn.activations import mish as mish
from haliax.nn.activations import one_hot as one_hot
from haliax.nn.activations import quick_gelu as quick_gelu
from haliax.nn.activations import relu as relu
from haliax.nn.activations import relu6 as relu6
from haliax.nn.activations import relu_squared as relu_squared
from haliax.nn.activations import selu as selu
from haliax.nn.activations import sigmoid as sigmoid
from haliax.nn.activations import silu as silu
from haliax.nn.activations import soft_sign as soft_sign
from haliax.nn.activations import softplus as softplus
from haliax.nn.activations import swish as swish
from haliax.nn.activations import tanh as tanh
from haliax.nn.attention import dot_product_attention as dot_product_attention
from haliax.nn.attention import dot_product_attention_weights as dot_product_attention_weights
from haliax.nn.dropout import Dropout as Dropout
from haliax.nn.dropout import dropout as dropout
from haliax.nn.embedding import Embedding as Embedding
from haliax.nn.linear import Linear as Linear
from haliax.nn.loss import binary_cross_entropy_loss as binary_cross_entropy_loss
from haliax.nn.loss import cross_entropy_loss as cross_entropy_loss
from haliax.nn.loss import (
    cross_entropy_loss_and_log_normalizers as cross_entropy_loss_and_log_normalizers,
)
from haliax.nn.loss import maybe_reduce_loss as maybe_reduce_loss
from haliax.nn.loss import reduce_loss as reduce_loss
from haliax.nn.moe import MoELinear as MoELinear
from haliax.nn.normalization import LayerNorm as LayerNorm
from haliax.nn.normalization import RmsNorm as RmsNorm
from haliax.nn.normalization import log_softmax as log_softmax
from haliax.nn.normalization import logsumexp as logsumexp
from haliax.nn.normalization import softmax as softmax
from haliax.nn.normalization import standardize as standardize
from haliax.nn.scan import BlockSeq as BlockSeq
from haliax.nn.scan import Stacked as Stacked

if TYPE_CHECKING:
    from haliax.nn.conv import Conv as Conv
    from haliax.nn.conv import ConvTranspose as ConvTranspose
    from haliax.nn.mlp import MLP as MLP
    from haliax.nn.pool import max_pool as max_pool
    from haliax.nn.pool import mean_pool as mean_pool
    from haliax.nn.pool import min_pool as min_pool

_LAZY_NAMES = {
    "conv": ("Conv", "ConvTranspose"),
    "mlp": ("MLP",),
    "pool": ("max_pool", "mean_pool", "min_pool"),
}


def __getattr__(name: str) -> object:
    for module, names in _LAZY_NAMES.items():
        if name == module:
            return importlib.import_module(f"haliax.nn.{module}")
        if name in names:
            return getattr(importlib.import_module(f"haliax.nn.{module}"), name)
    raise AttributeError(f"module 'haliax.nn' has no attribute '{name}'")
