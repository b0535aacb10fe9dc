"""Maps an instruction of a compiled program to the kind of its layer."""

from spatial_mamba_jax.forecast import hlo

# {prefix: kind of layer}. The innermost scope or function with one of these
# prefixes decides.
_KINDS = {
  "structure_aware_ssm": "structure-aware SSM",
  "depthwise_conv": "depthwise convolutions",
  "residual_depthwise_conv": "depthwise convolutions",
  "silu_depthwise_conv": "depthwise convolutions",
  "projected_depthwise_conv": "depthwise convolutions",
  "relu_depthwise_conv": "depthwise convolutions",
  "DepthwiseConv.": "depthwise convolutions",
  "operator.": "depthwise convolutions",
  "relu_operator.": "depthwise convolutions",
  "grouped_convolution": "depthwise convolutions",
  "activated": "depthwise convolutions",
  "project": "linear layers",
  "residual_layer_norm": "LayerNorm, BatchNorm",
  "gated_layer_norm": "LayerNorm, BatchNorm",
  "layer_norm": "LayerNorm, BatchNorm",
  "gated": "LayerNorm, BatchNorm",
  "normalize": "LayerNorm, BatchNorm",
  "_normalized": "LayerNorm, BatchNorm",
  "LayerNorm.": "LayerNorm, BatchNorm",
  "BatchNorm.": "LayerNorm, BatchNorm",
  "Linear.": "linear layers",
  "promote_dtype.": "linear layers",
  "Conv.": "convolutions",
  "mlp": "linear layers",
  "_linear": "linear layers",
  "Mlp.": "linear layers",
  "gelu": "gates, residuals, GELU",
  "silu": "gates, residuals, GELU",
  "StructureAwareSSM._project": "linear layers",
  "StructureAwareSSM.": "gates, residuals, GELU",
  "Block.": "gates, residuals, GELU",
  "drop_path": "gates, residuals, GELU",
  "Stage.": "kept for the backward pass",
  "Stem.": "stem and downsampling, rest",
  "DownSampling._expanded": "linear layers",
  "DownSampling.": "stem and downsampling, rest",
  "scale_by_": "weights, optimizer",
  "_unstacked": "weights, optimizer",
  "_moving_average": "weights, optimizer",
  "tree_": "weights, optimizer",
  "flatten.": "weights, optimizer",
}


def kind(program: hlo.Program, instruction: hlo.Instruction) -> str:
  """Returns the kind of layer for tables; "other" if no layer made it."""
  for function in program.functions(instruction):
    for beginning, name in _KINDS.items():
      if function.startswith(beginning):
        return name
  if instruction.opcode in hlo.COPY_STARTS:
    return "copies to and from a TPU's vector memory"
  return "other"
