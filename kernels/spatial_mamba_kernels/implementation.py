"""The names a caller can give as `implementation`, and what they mean.

`None` is the best one for the platform a program is lowered for. It is chosen
while lowering, so that one jitted function serves the CPU it was traced on, the
accelerator it runs on, and an ahead-of-time compile.

Tracing must know the device where the choice decides what the forward pass
saves for the backward pass: the GPU kernels of norms, of the MLP, and of
convolutions with an activation are candidates only where JAX's default device
is a GPU (`gpu_device.is_default`). A program that was traced with another
default device has the same values, by XLA. To compile ahead of time, make the
GPU the default device.

"xla" is the best one without a kernel; "sequential" and "associative" are the
two forms of a scan that XLA compiles, and "xla" for operators without a scan.
"""

from typing import Literal, get_args

Implementation = Literal[
  "xla", "sequential", "associative", "mosaic_tpu", "mosaic_gpu"
]
IMPLEMENTATIONS = get_args(Implementation)


def check_implementation(name: str | None, op: str) -> None:
  """Raises where `op` cannot be served by the implementation `name`.

  Args:
    name: what the caller asked for; None always works.
    op: the operator's public name, for the message.

  Raises:
    ValueError: `name` is no implementation at all.
  """
  if name is None or name in IMPLEMENTATIONS:
    return
  raise ValueError(
    f"{op}: implementation={name!r} is unknown: use None, or one of"
    f" {', '.join(IMPLEMENTATIONS)}"
  )
