"""Draws what a network looks at.

    python -m spatial_mamba_jax.visualize erf --weights=runs/digits
    python -m spatial_mamba_jax.visualize states --image=cat.jpg --stage=1
    python -m spatial_mamba_jax.visualize mixing --out=mixing.svg
    python -m spatial_mamba_jax.visualize mixers

`erf` draws the effective receptive field with random weights, and with the
given ones. `states` draws the states of a block before and after fusion.
`mixing` draws rows of a block's mixing matrix as maps over the image. `mixers`
draws a receptive field and a row of the matrix for every mixer that there is.
Without --weights the weights are random. Without --image the images are two
photographs of scikit-learn. It needs `pip install ".[train]"`.
"""

from spatial_mamba_jax.visualize.maps import (
  StateMaps,
  mixing_maps,
  receptive_field,
  state_maps,
)

__all__ = ["StateMaps", "mixing_maps", "receptive_field", "state_maps"]
