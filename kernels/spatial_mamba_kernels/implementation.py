"""The names a caller can give as `implementation`, and what they mean.

`None` is the best one for the platform a program is lowered for. It is chosen
while lowering and not while tracing, so that one jitted function serves the
CPU it was traced on, the accelerator it runs on, and an ahead-of-time compile.
"""

from typing import Literal, get_args

Implementation = Literal[
  "sequential", "associative", "mosaic_tpu", "mosaic_gpu"
]


def check_implementation(name: str | None, op: str) -> None:
  """Raises where `op` cannot be served by the implementation `name`.

  Args:
    name: what the caller asked for; None always works.
    op: the operator's public name, for the message.

  Raises:
    ValueError: `name` is no implementation at all.
  """
  names = get_args(Implementation)
  if name is None or name in names:
    return
  raise ValueError(
    f"{op}: implementation={name!r} is unknown: use None, or one of"
    f" {', '.join(names)}"
  )
