"""Measures the speed of PyTorch networks of the same size.

These are ConvNeXt-T and Swin-T of timm, channels last, compiled by
`torch.compile`, in autocast for bfloat16. They train on float images by AdamW,
without this project's augmentations and drop path. `timing` has the protocol.

    python -m benchmarks.peers --batch-size 8 --device cpu --dtype float32
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from benchmarks import timing

MODELS = ("convnext_tiny", "swin_tiny_patch4_window7_224")


def main() -> None:
  """Prints a line of JSON for each network and program."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
  parser.add_argument("--batch-size", type=int, default=128)
  parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
  parser.add_argument(
    "--dtype", default="bfloat16", choices=("bfloat16", "float32")
  )
  parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
  arguments = parser.parse_args()
  try:
    for record in measure(**vars(arguments)):
      print(json.dumps(record), flush=True)
  except ImportError as error:
    parser.error(f"pip install torch timm ({error})")


def measure(
  batch_size: int, device: str, dtype: str, models: Any = MODELS
) -> Iterator[dict[str, Any]]:
  """Measures images a second of inference and of the training step, at 224.

  Raises:
    ImportError: torch or timm is not installed.
  """
  import timm  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]

  torch.set_float32_matmul_precision("high")
  # It selects the fastest algorithms by trial, as XLA does.
  torch.backends.cudnn.benchmark = True
  images = torch.randn(batch_size, 3, 224, 224, device=device)
  images = images.to(memory_format=torch.channels_last)
  labels = torch.arange(batch_size, device=device) % 1000
  precision = torch.autocast(
    device, getattr(torch, dtype), enabled=dtype != "float32"
  )

  def wait(result):
    del result
    if device == "cuda":
      torch.cuda.synchronize()

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
      measured = timing.time_calls(call, wait)
      yield {
        "model": name,
        "program": program,
        "batch_size": batch_size,
        "dtype": dtype,
        "images_per_second": batch_size / measured.seconds,
        "spread": measured.spread,
        "torch": torch.__version__,
        "timm": timm.__version__,
      }


if __name__ == "__main__":
  main()
