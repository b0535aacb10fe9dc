"""A residual branch: a linear layer, GELU, and a linear layer."""

from spatial_mamba_kernels.mlp.api import mlp as mlp
