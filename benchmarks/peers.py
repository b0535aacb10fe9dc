"""The speed of PyTorch's networks of the same size, where it is installed.

ConvNeXt-T and Swin-T of timm, in bfloat16 autocast, channels last, compiled by
`torch.compile`; training by AdamW. The protocol is that of `timing`.

    python -m benchmarks.peers --batch-size 8 --device cpu --dtype float32
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

MODELS = ("convnext_tiny", "swin_tiny_patch4_window7_224")
GROUPS = 5
GROUP_SECONDS = 0.2


def main() -> None:
  """Prints a line of JSON for each network and program."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
  parser.add_argument("--batch-size", type=int, default=128)
  parser.add_argument("--device", default="cuda")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--models", nargs="+", default=MODELS)
  arguments = parser.parse_args()
  for record in measure(**vars(arguments)):
    print(json.dumps(record), flush=True)


def measure(
  batch_size: int, device: str, dtype: str, models: Any = MODELS
) -> Iterator[dict[str, Any]]:
  """Images a second of inference and of the training step, at 224.

  Raises:
    ImportError: torch or timm is not installed.
  """
  import timm  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]

  torch.set_float32_matmul_precision("high")
  images = torch.randn(batch_size, 3, 224, 224, device=device)
  images = images.to(memory_format=torch.channels_last)
  labels = torch.arange(batch_size, device=device) % 1000
  precision = torch.autocast(
    device, getattr(torch, dtype), enabled=dtype != "float32"
  )
  for name in models:
    model = timm.create_model(name, num_classes=1000).to(device)
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    network = torch.compile(model)

    def infer(model=model, network=network):
      model.eval()
      with torch.inference_mode(), precision:
        return network(images)

    def train(model=model, network=network, optimizer=optimizer):
      model.train()
      optimizer.zero_grad(set_to_none=True)
      with precision:
        loss = torch.nn.functional.cross_entropy(network(images), labels)
      loss.backward()
      optimizer.step()

    for program, call in (("inference", infer), ("train", train)):
      seconds, spread = _time(call, torch, device)
      yield {
        "model": name,
        "program": program,
        "batch_size": batch_size,
        "dtype": dtype,
        "images_per_second": batch_size / seconds,
        "spread": spread,
        "torch": torch.__version__,
        "timm": timm.__version__,
      }


def _time(call, torch, device):
  def seconds(count):
    start = time.perf_counter()
    for _ in range(count):
      call()
    if device == "cuda":
      torch.cuda.synchronize()
    return (time.perf_counter() - start) / count

  for _ in range(3):
    seconds(1)
  count = max(1, round(GROUP_SECONDS / seconds(1)))
  first, second = (
    statistics.median(seconds(count) for _ in range(GROUPS)) for _ in range(2)
  )
  middle = (first + second) / 2
  return middle, abs(first - second) / middle


if __name__ == "__main__":
  main()
