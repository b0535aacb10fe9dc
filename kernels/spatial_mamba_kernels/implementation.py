"""The names a caller can give as `implementation`, and what they mean.

`None` is the best one for the platform a program is lowered for; `dispatch`
says when it is chosen.

"xla" is the best one without a kernel; "sequential" and "associative" are the
two forms of a scan that XLA compiles, and "xla" for operators without a scan.
"""

from typing import Literal, get_args

Implementation = Literal[
  "xla", "sequential", "associative", "mosaic_tpu", "mosaic_gpu"
]
IMPLEMENTATIONS = get_args(Implementation)


def check_implementation(name: str | None, op: str) -> None:
  """Raises a ValueError if `name` is no implementation.

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
