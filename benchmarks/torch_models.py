"""GPT-2 and Llama in PyTorch, ours and of `transformers`: modules that give the loss of rows."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def gpt2(sizes: dict[str, int]) -> Any:
    """Returns GPT-2 with torch's fused attention, as nanoGPT writes it."""
    D, H, V, T = sizes["hidden_dim"], sizes["num_heads"], sizes["vocab"], sizes["length"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x: Any) -> Any:
            q, k, v = (
                part.view(*x.shape[:2], H, D // H).transpose(1, 2)
                for part in self.qkv(self.ln_1(x)).split(D, dim=2)
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))

    class Gpt2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(T, D)
            self.blocks = nn.ModuleList(Block() for _ in range(sizes["num_layers"]))
            self.ln_f = nn.LayerNorm(D)

        def forward(self, rows: Any) -> Any:
            x = self.wte(rows) + self.wpe(torch.arange(T, device=rows.device))
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.ln_f(x), self.wte.weight)
            return F.cross_entropy(logits[:, :-1].reshape(-1, V), rows[:, 1:].reshape(-1))

    return Gpt2()


def llama(sizes: dict[str, int]) -> Any:
    """Returns a Llama with torch's fused attention and a head of its own."""
    D, H, K, V, T, M = (
        sizes[x] for x in ("hidden_dim", "num_heads", "num_kv_heads", "vocab", "length", "mlp_dim")
    )
    S = D // H

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
            self.qkv = nn.Linear(D, (H + 2 * K) * S, bias=False)
            self.out = nn.Linear(D, D, bias=False)
            self.gate, self.up = (nn.Linear(D, M, bias=False) for _ in range(2))
            self.down = nn.Linear(M, D, bias=False)

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            q, k, v = (
                part.view(*x.shape[:2], -1, S).transpose(1, 2)
                for part in self.qkv(self.ln_1(x)).split((H * S, K * S, K * S), dim=2)
            )
            q, k = (rotated(part, cos, sin) for part in (q, k))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
            normed = self.ln_2(x)
            return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
            self.blocks = nn.ModuleList(Block() for _ in range(sizes["num_layers"]))
            self.norm = nn.RMSNorm(D, eps=1e-5)
            angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, S, 2) / S))
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, rows: Any) -> Any:
            x = self.wte(rows)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            logits = self.head(self.norm(x))
            return F.cross_entropy(logits[:, :-1].reshape(-1, V), rows[:, 1:].reshape(-1))

    return Llama()


def rotated(x: Any, cos: Any, sin: Any) -> Any:
    """Returns `x` with pairs of its features turned."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def of_transformers(sizes: dict[str, int]) -> Any:
    """Returns the model of `transformers`, with torch's fused attention."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    if "num_kv_heads" in sizes:
        inner: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes["vocab"], max_position_embeddings=sizes["length"],
                hidden_size=sizes["hidden_dim"], intermediate_size=sizes["mlp_dim"],
                num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_heads"],
                num_key_value_heads=sizes["num_kv_heads"], **ids,
            )
        )  # fmt: skip
    else:
        inner = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=sizes["vocab"], n_positions=sizes["length"],
                n_embd=sizes["hidden_dim"], n_layer=sizes["num_layers"],
                n_head=sizes["num_heads"], embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, **ids,
            )
        )  # fmt: skip

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, rows: Any) -> Any:
            return self.inner(rows, labels=rows).loss

    return Loss()
