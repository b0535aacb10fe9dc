"""Scan and fusion kernels of visual state-space models. They need only JAX.

    import spatial_mamba_kernels as smk

    states = smk.selective_scan(u, delta, A, B)
    y = smk.structure_aware_ssm(u, delta, A, B, C, D, kernels, alpha)

Public are the names of this module, and the modules `activations`,
`normalization`, `shapes` and `typing`. Importing them loads no Pallas: the
module of a kernel is imported while a program is lowered for its platform.

The operators name their results `CHECKPOINT_NAME` for `jax.checkpoint`, except
those of depthwise convolutions and normalisations, which cost less to recompute
than to save.

Derivatives work in reverse mode. Forward mode (`jax.jvp`, `jax.jacfwd`,
`jax.hessian`) raises JAX's TypeError, because every operator is a
`jax.custom_vjp`: its backward pass saves less and takes less time than JAX's
own. JAX has no custom derivative for both modes that works under `jax.vmap` and
`jax.lax.scan` (`jax.custom_derivatives.linear_call` does not). The product of
the Jacobian of `f` with `dx` is the pullback of a pullback:

    y, pullback = jax.vjp(f, x)
    _, push = jax.vjp(lambda dy: pullback(dy)[0], jnp.zeros_like(y))
    (dy,) = push(dx)

Axis letters: B batch, H and W height and width, L = H * W tokens, D channels,
N states a channel.
"""

from spatial_mamba_kernels.depthwise_conv import (
  causal_depthwise_conv,
  depthwise_conv,
  relu_depthwise_conv,
  residual_depthwise_conv,
  silu_depthwise_conv,
)
from spatial_mamba_kernels.dispatch import (
  CHECKPOINT_NAME,
  PLATFORMS,
  keep,
  traced_for,
)
from spatial_mamba_kernels.implementation import IMPLEMENTATIONS
from spatial_mamba_kernels.layer_norm import (
  gated_layer_norm,
  residual_layer_norm,
)
from spatial_mamba_kernels.mlp import mlp
from spatial_mamba_kernels.selective_scan import selective_scan
from spatial_mamba_kernels.selective_ssm import selective_ssm
from spatial_mamba_kernels.sharding import check_only_batch_is_split
from spatial_mamba_kernels.state_fusion import state_fusion
from spatial_mamba_kernels.structure_aware_ssm import structure_aware_ssm

__all__ = [
  "CHECKPOINT_NAME",
  "IMPLEMENTATIONS",
  "PLATFORMS",
  "causal_depthwise_conv",
  "check_only_batch_is_split",
  "depthwise_conv",
  "gated_layer_norm",
  "keep",
  "mlp",
  "relu_depthwise_conv",
  "residual_depthwise_conv",
  "residual_layer_norm",
  "selective_scan",
  "selective_ssm",
  "silu_depthwise_conv",
  "state_fusion",
  "structure_aware_ssm",
  "traced_for",
]
