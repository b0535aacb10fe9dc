"""Work that crashes or hangs, as the device benchmark's processes may."""

import os
import time

LABELS = ("first", "crash", "hang", "last")


def work(send, *, machine, begun, together, **rest):
  """Like `benchmarks.sections.work`."""
  del rest
  if not machine:
    send(("machine", {"device": "none"}))
  if together:
    os._exit(2)  # What is compiled at once, before anything is begun.
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
  """Where the device is lost, and cannot be had again."""
  del rest
  send(("machine", {"device": "none"}))
  os._exit(5)


def dead(send, **rest):
  """Where there is no device."""
  del send, rest
  os._exit(4)
