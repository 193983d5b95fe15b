"""GPT-2 and Llama written by hand in jnp and lax: what the compiler makes of no library at all.

Each function returns `init(key)`, random weights, and `loss(params, tokens)`, the mean over all
predictions; layers are scanned over and computed again in the backward pass. On a GPU attention is
cuDNN's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Model = tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]


def gpt2(sizes: dict[str, int], platform: str, compute: Any) -> Model:
    """Returns GPT-2 with products in `compute`."""
    L, D, H = sizes["num_layers"], sizes["hidden_dim"], sizes["num_heads"]
    V, T = sizes["vocab"], sizes["length"]

    def init(key: Any) -> dict[str, Any]:
        keys = jax.random.split(key, 6)
        layers = {
            "ln1": jnp.ones((L, D)), "ln1b": jnp.zeros((L, D)),
            "ln2": jnp.ones((L, D)), "ln2b": jnp.zeros((L, D)),
            "qkv": jax.random.normal(keys[0], (L, D, 3, H, D // H)) * 0.02,
            "qkvb": jnp.zeros((L, 3, H, D // H)),
            "out": jax.random.normal(keys[1], (L, H, D // H, D)) * 0.02 / (2 * L) ** 0.5,
            "outb": jnp.zeros((L, D)),
            "up": jax.random.normal(keys[2], (L, D, 4 * D)) * 0.02,
            "upb": jnp.zeros((L, 4 * D)),
            "down": jax.random.normal(keys[3], (L, 4 * D, D)) * 0.02 / (2 * L) ** 0.5,
            "downb": jnp.zeros((L, D)),
        }  # fmt: skip
        return {
            "wte": jax.random.normal(keys[4], (V, D)) * 0.02,
            "wpe": jax.random.normal(keys[5], (T, D)) * 0.02,
            "layers": layers, "lnf": jnp.ones(D), "lnfb": jnp.zeros(D),
        }  # fmt: skip

    def norm(x: Any, weight: Any, bias: Any) -> Any:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled.astype(x.dtype) * weight + bias

    mask = jnp.tril(jnp.ones((T, T), bool))

    @jax.checkpoint
    def block(x: Any, p: dict[str, Any]) -> tuple[Any, None]:
        if platform == "gpu":
            qkv = jnp.einsum("btd,dchk->cbthk", norm(x, p["ln1"], p["ln1b"]), p["qkv"])
            q, k, v = qkv + p["qkvb"][:, None, None]
            mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
            x = x + jnp.einsum("bthk,hkd->btd", mixed, p["out"]) + p["outb"]
        else:
            qkv = jnp.einsum("btd,dchk->cbhtk", norm(x, p["ln1"], p["ln1b"]), p["qkv"])
            q, k, v = qkv + p["qkvb"][:, None, :, None]
            scores = jnp.einsum("bhtk,bhsk->bhts", q / (D // H) ** 0.5, k)
            weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
            x = x + jnp.einsum("bhts,bhsk,hkd->btd", weights, v, p["out"]) + p["outb"]
        hidden = jax.nn.gelu(norm(x, p["ln2"], p["ln2b"]) @ p["up"] + p["upb"])
        return x + hidden @ p["down"] + p["downb"], None

    def loss(params: Any, tokens: Any) -> Any:
        p = jax.tree.map(lambda w: w.astype(compute), params)
        x, _ = jax.lax.scan(block, p["wte"][tokens] + p["wpe"], p["layers"])
        x = norm(x, p["lnf"], p["lnfb"])
        return mean_loss(x, p["wte"], tokens)

    return init, loss


def llama(sizes: dict[str, int], platform: str, compute: Any) -> Model:
    """Returns a Llama with a head of its own, products in `compute`."""
    L, D, H, K = (sizes[x] for x in ("num_layers", "hidden_dim", "num_heads", "num_kv_heads"))
    V, T, M, S = sizes["vocab"], sizes["length"], sizes["mlp_dim"], D // H

    def init(key: Any) -> dict[str, Any]:
        keys = jax.random.split(key, 9)

        def normal(index: int, *shape: int, std: float = 0.02) -> Any:
            return jax.random.normal(keys[index], shape) * std

        layers = {
            "ln1": jnp.ones((L, D)), "ln2": jnp.ones((L, D)),
            "q": normal(0, L, D, K, H // K, S), "k": normal(1, L, D, K, S),
            "v": normal(2, L, D, K, S),
            "o": normal(3, L, K, H // K, S, D, std=0.02 / (2 * L) ** 0.5),
            "gate": normal(4, L, D, M), "up": normal(5, L, D, M),
            "down": normal(6, L, M, D, std=0.02 / (2 * L) ** 0.5),
        }  # fmt: skip
        return {"wte": normal(7, V, D), "head": normal(8, V, D), "layers": layers,
                "norm": jnp.ones(D)}  # fmt: skip

    def norm(x: Any, weight: Any) -> Any:
        x32 = x.astype(jnp.float32)
        scaled = x32 * jax.lax.rsqrt((x32**2).mean(-1, keepdims=True) + 1e-5)
        return scaled.astype(x.dtype) * weight

    angles = jnp.arange(T)[:, None] * 10000.0 ** (-jnp.arange(0, S, 2) / S)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def rotated(x: Any) -> Any:
        """Turns pairs of features, over positions in the second and features in the last place."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        c, s = (a.reshape(T, *[1] * (x.ndim - 3), S // 2) for a in (cos, sin))
        turned = jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)
        return turned.astype(x.dtype)

    mask = jnp.tril(jnp.ones((T, T), bool))

    @jax.checkpoint
    def block(x: Any, p: dict[str, Any]) -> tuple[Any, None]:
        normed = norm(x, p["ln1"])
        q = rotated(jnp.einsum("btd,dkgs->btkgs", normed, p["q"]))
        k = rotated(jnp.einsum("btd,dks->btks", normed, p["k"]))
        v = jnp.einsum("btd,dks->btks", normed, p["v"])
        if platform == "gpu":
            mixed = jax.nn.dot_product_attention(
                q.reshape(*x.shape[:2], H, S), k, v, is_causal=True, implementation="cudnn"
            ).reshape(q.shape)
        else:
            scores = jnp.einsum("btkgs,buks->bkgtu", q / S**0.5, k)
            weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
            mixed = jnp.einsum("bkgtu,buks->btkgs", weights, v)
        x = x + jnp.einsum("btkgs,kgsd->btd", mixed, p["o"])
        normed = norm(x, p["ln2"])
        return x + (jax.nn.silu(normed @ p["gate"]) * (normed @ p["up"])) @ p["down"], None

    def loss(params: Any, tokens: Any) -> Any:
        p = jax.tree.map(lambda w: w.astype(compute), params)
        x, _ = jax.lax.scan(block, p["wte"][tokens], p["layers"])
        return mean_loss(norm(x, p["norm"]), p["head"], tokens)

    return init, loss


def mean_loss(x: Any, head: Any, tokens: Any) -> Any:
    """Returns the mean negative log probability of each token but the first of its row."""
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
    targets = jnp.roll(tokens, -1, axis=1)[..., None]
    picked = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked)[:, :-1].mean()
