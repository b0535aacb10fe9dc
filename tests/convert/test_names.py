"""Weights to and from the authors' names and layouts."""

import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.architecture import infer_model


@pytest.fixture
def micro():
  return smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(0))


def test_round_trip_is_exact(micro, named_weights):
  state_dict = named_weights.named_state_dict("micro")
  mismatch = smj.convert.from_torch(micro, state_dict)
  assert mismatch == ((), ())
  back = smj.convert.to_torch(micro)
  assert back.keys() == state_dict.keys()
  for name, tensor in state_dict.items():
    assert back[name].shape == tensor.shape, name
    assert np.array_equal(back[name], tensor), name
    assert back[name].dtype == tensor.dtype, name


@pytest.mark.parametrize(
  ("size", "parameters"),
  [
    ("tiny", 26_748_862),
    ("small", 43_074_280),
    pytest.param("base", 95_745_592, marks=pytest.mark.soak),
  ],
)
def test_names_and_shapes_are_the_authors(named_weights, size, parameters):
  model = smj.create_model(f"spatial_mamba_{size}", rngs=nnx.Rngs(0))
  tensors = smj.convert.to_torch(model)
  expected = named_weights.state_dict_shapes(size)
  assert {name: list(x.shape) for name, x in tensors.items()} == expected
  statistics = ("running_mean", "running_var", "num_batches_tracked")
  learned = [x for name, x in tensors.items() if not name.endswith(statistics)]
  assert sum(x.size for x in learned) == parameters


def test_a_mismatch_is_named_and_changes_nothing(micro, named_weights):
  before = smj.convert.to_torch(micro)
  state_dict = named_weights.named_state_dict("micro")
  del state_dict["head.bias"]
  state_dict["extra"] = np.zeros(3)
  state_dict["norm.weight"] = np.zeros(7)
  with pytest.raises(
    ValueError,
    match=(
      r"1 missing \(head.bias\); 1 unexpected \(extra\); 1 misshapen"
      r" \(norm.weight is \[7\] instead of \[128\]\)"
    ),
  ):
    smj.convert.from_torch(micro, state_dict)
  with pytest.raises(ValueError, match="1 misshapen"):
    smj.convert.from_torch(micro, state_dict, strict=False)
  after = smj.convert.to_torch(micro)
  assert all(np.array_equal(before[name], after[name]) for name in before)


def test_mismatches_are_ignored_if_not_strict(micro, named_weights):
  state_dict = named_weights.named_state_dict("micro")
  bias = smj.convert.to_torch(micro)["head.bias"]
  del state_dict["head.bias"]
  mismatch = smj.convert.from_torch(
    micro, {**state_dict, "extra": bias}, strict=False
  )
  assert mismatch == (("head.bias",), ("extra",))
  after = smj.convert.to_torch(micro)
  assert np.array_equal(after["head.bias"], bias)
  assert np.array_equal(after["head.weight"], state_dict["head.weight"])


def test_linear_layers_may_be_convolutions(each_small):
  """VMamba's authors store either; no other shape is taken for another."""
  expected = smj.convert.to_torch(each_small)
  names = ("in_proj.weight", "out_proj.weight", "fc1.weight", "head.weight")
  tensors = {
    name: x[:, :, None, None] if name.endswith(names) else x
    for name, x in expected.items()
  }
  model = infer_model(tensors)
  assert smj.convert.from_torch(model, tensors) == ((), ())
  for name, x in smj.convert.to_torch(model).items():
    np.testing.assert_array_equal(x, expected[name], strict=True)
  for name in (
    "layers.0.blocks.0.mlp.fc1.weight",
    "layers.0.blocks.0.mlp.fc1.bias",
  ):
    wrong = {**expected, name: expected[name][..., None]}
    with pytest.raises(ValueError, match=r"1 missh.* is \[.*, 1\] instead of"):
      smj.convert.from_torch(model, wrong)
