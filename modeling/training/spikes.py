"""Which updates to leave out: those whose loss or gradient norm stands out from the last ones.

An update is left out if either figure is more than `sigmas` standard deviations above its mean over
the last `window` updates. Both figures count from then on, left out or not: a loss that stays high
is the new normal once it fills the window. All is decided on the device, from the state.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from modeling.training.config import SkipStepConfig


class SpikeHistory(eqx.Module):
    """The figures of the last updates, in a ring, and how many updates were left out."""

    losses: Float32[Array, " window"]
    gradient_norms: Float32[Array, " window"]
    skipped: Int32[Array, ""]

    @classmethod
    def empty(cls, config: SkipStepConfig) -> "SpikeHistory":
        """Returns the history before the first update."""
        zeros = jnp.zeros(config.window, jnp.float32)
        return cls(zeros, jnp.zeros(config.window, jnp.float32), jnp.zeros((), jnp.int32))

    def judge(
        self,
        config: SkipStepConfig,
        updates_made: Int32[Array, ""],
        loss: Float32[Array, ""],
        gradient_norm: Float32[Array, ""],
    ) -> tuple[Bool[Array, ""], "SpikeHistory"]:
        """Returns whether to leave an update out, and the history with it taken in."""
        stands_out = _stands_out(self.losses, loss, config.sigmas) | _stands_out(
            self.gradient_norms, gradient_norm, config.sigmas
        )
        is_spike = stands_out & (updates_made >= config.window)
        place = updates_made % config.window
        history = SpikeHistory(
            self.losses.at[place].set(loss),
            self.gradient_norms.at[place].set(gradient_norm),
            self.skipped + is_spike,
        )
        return is_spike, history


def _stands_out(
    figures: Float32[Array, " window"], figure: Float32[Array, ""], sigmas: float
) -> Bool[Array, ""]:
    mean = jnp.mean(figures)
    deviation = jnp.sqrt(jnp.mean(jnp.square(figures - mean)))
    return figure > mean + sigmas * deviation
