"""Conversion of weights: the authors' PyTorch files, safetensors, directories.

`python -m spatial_mamba_jax.convert SRC DST` converts one into another.
"""

from spatial_mamba_jax.convert.names import Mismatch, from_torch, to_torch
from spatial_mamba_jax.convert.torch_checkpoint import read_torch_checkpoint

__all__ = ["Mismatch", "from_torch", "read_torch_checkpoint", "to_torch"]
