"""Work that crashes or hangs, as the device benchmark's processes may."""

import os
import time

LABELS = ("first", "crash", "hang", "last")


def work(send, *, machine, begun, together, **rest):
  """Stands in for `benchmarks.sections.work`."""
  del rest
  if not machine:
    send(("machine", {"device": "none"}))
  if together:
    os._exit(2)  # Crashes while programs are compiled together.
  for label in LABELS:
    if label in begun:
      continue
    send(("begin", label))
    if label == "crash":
      os._exit(3)
    if label == "hang":
      time.sleep(1000)
    send(("row", {"label": label}))
    send(("end", label))


def never_begins(send, **rest):
  """Stands in for a device that is lost after it was described."""
  del rest
  send(("machine", {"device": "none"}))
  os._exit(5)


def dead(send, **rest):
  """Stands in for a machine without a device."""
  del send, rest
  os._exit(4)
