"""Bytes and launches of small programs, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import traffic
from spatial_mamba_jax.forecast import hlo

# A loop of three iterations: each reads a row of [3, 8] float32 and writes one
# row of the result in place. Then a conditional, one branch of which copies.
LOOP = """\
HloModule loop, is_scheduled=true

FileNames
1 "model.py"

FunctionNames
1 "gelu"
2 "main"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=0 end_column=0}
2 {file_name_id=1 function_name_id=2 line=9 end_line=9 column=0 end_column=0}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}

%row (p.0: f32[3,8], p.1: s32[], p.2: f32[3,8]) -> f32[3,8] {
  %p.0 = f32[3,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[3,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %twice = f32[3,8]{1,0} add(%p.0, %p.0)
  %cut = f32[1,8]{1,0} dynamic-slice(%twice, %p.1, %zero), dynamic_slice_sizes={1,8}
  ROOT %put = f32[3,8]{1,0} dynamic-update-slice(%p.2, %cut, %p.1, %zero)
}

%body (state: (s32[], f32[3,8], f32[3,8])) -> (s32[], f32[3,8], f32[3,8]) {
  %state = (s32[], f32[3,8]{1,0}, /*index=2*/f32[3,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[3,8]{1,0} get-tuple-element(%state), index=1
  %y = f32[3,8]{1,0} get-tuple-element(%state), index=2
  %new = f32[3,8]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%row, metadata={op_name="outer/inner" stack_frame_id=2}
  ROOT %out = (s32[], f32[3,8]{1,0}, f32[3,8]{1,0}) tuple(%i, %x, %new)
}

%condition (state: (s32[], f32[3,8], f32[3,8])) -> pred[] {
  %state = (s32[], f32[3,8]{1,0}, f32[3,8]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

%copies (a: f32[3,8]) -> f32[3,8] {
  %a = f32[3,8]{1,0} parameter(0)
  ROOT %copied = f32[3,8]{1,0} copy(%a)
}

%keeps (b: f32[3,8]) -> f32[3,8] {
  ROOT %b = f32[3,8]{1,0} parameter(0)
}

ENTRY %main (x: f32[3,8], which: s32[]) -> f32[3,8] {
  %x = f32[3,8]{1,0} parameter(0)
  %which = s32[] parameter(1)
  %start = (s32[], f32[3,8]{1,0}, f32[3,8]{1,0}) tuple(%which, %x, %x)
  %loop = (s32[], f32[3,8]{1,0}, f32[3,8]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %z = f32[3,8]{1,0} get-tuple-element(%loop), index=2
  ROOT %end = f32[3,8]{1,0} conditional(%which, %z, %z), branch_computations={%keeps, %copies}
}
"""  # noqa: E501


# The same with the row copied while the next instructions run.
ASYNCHRONOUS = LOOP.replace(
  "%new = f32[3,8]{1,0} fusion(",
  "%copy = ((f32[3,8]{1,0}, s32[], f32[3,8]{1,0}), f32[3,8]{1,0}, u32[])"
  " fusion-start(",
).replace(
  "  ROOT %out",
  "  %new = f32[3,8]{1,0} fusion-done(%copy)\n  ROOT %out",
)

# The same in a TPU's program, which has no trip count.
COUNTED = LOOP.replace("known_trip_count", "unknown").replace(
  "  ROOT %go = pred[] constant(true)",
  "  %i = s32[]{:T(128)} get-tuple-element(%state), index=0\n"
  "  %n = s32[]{:T(128)} constant(3), metadata={}\n"
  "  ROOT %go = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={}",
)


# The same with a fusion inside a fusion.
NESTED = LOOP.replace("%row (", "%inner (").replace(
  "%body (state",
  """\
%row (q.0: f32[3,8], q.1: s32[], q.2: f32[3,8]) -> f32[3,8] {
  %q.0 = f32[3,8]{1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %q.2 = f32[3,8]{1,0} parameter(2)
  ROOT %put = f32[3,8]{1,0} fusion(%q.0, %q.1, %q.2), kind=kLoop, calls=%inner
}

%body (state""",
)


@pytest.mark.parametrize("text", [LOOP, ASYNCHRONOUS, COUNTED, NESTED])
def test_loops_slices_and_branches(text):
  program = hlo.Program(text)
  launches = program.launches()
  row, index, whole = 8 * 4, 4, 3 * 8 * 4
  assert hlo.total_launches(launches) == 3 + 1
  assert hlo.total_bytes(launches) == 3 * (2 * row + index) + 2 * whole
  assert program.functions(launches[0].instruction) == (
    "inner",
    "outer",
    "gelu",
    "main",
  )
  kinds = traffic.by_kind(program)
  assert kinds["gates, residuals, GELU"] == (3 * (2 * row + index), 3)
  assert kinds["other"] == (2 * whole, 1)


def test_a_loop_without_an_end_is_refused():
  endless = LOOP.replace("known_trip_count", "unknown")
  with pytest.raises(ValueError, match="how often loop runs"):
    hlo.Program(endless).launches()


def test_an_operand_given_twice_is_read_once():
  """x has 12 elements, and its product 16."""
  program = hlo.Program(
    "ENTRY %main (x: f32[4,3]) -> f32[4,4] {\n"
    "  %x = f32[4,3]{1,0} parameter(0)\n"
    "  ROOT %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}\n"
    "}\n"
  )
  assert hlo.total_bytes(program.launches()) == (12 + 16) * 4


def test_an_asynchronous_copy_counts_its_operand():
  """A copy into a TPU's own memory, S(1), reads HBM and does not write it."""
  program = hlo.Program(
    "ENTRY %main (x: f32[8,4]) -> f32[8,4] {\n"
    "  %x = f32[8,4]{1,0} parameter(0)\n"
    "  %all = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)})"
    " copy-start(%x)\n"
    "  %here = f32[8,4]{1,0:S(1)} copy-done(%all)\n"
    "  %part = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)})"
    " slice-start(%x), slice={[0:2], [0:4]}\n"
    "  %rows = f32[2,4]{1,0:S(1)} slice-done(%part)\n"
    "  %back = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%x)\n"
    "  ROOT %y = f32[8,4]{1,0} copy-done(%back)\n"
    "}\n"
  )
  sizes = [launch.size for launch in program.launches()]
  assert sizes == [8 * 4 * 4, 2 * 4 * 4, 2 * 8 * 4 * 4]


def test_a_slice_that_goes_to_a_tpus_own_memory_is_read():
  """Two of eight rows of four elements are read; HBM is not written."""
  program = hlo.Program(
    "%rows (p: f32[8,4], i: s32[]) -> f32[2,4] {\n"
    "  %p = f32[8,4]{1,0} parameter(0)\n"
    "  %i = s32[]{:S(6)} parameter(1)\n"
    "  %zero = s32[] constant(0)\n"
    "  ROOT %cut = f32[2,4]{1,0:S(1)} dynamic-slice(%p, %i, %zero)\n"
    "}\n"
    "ENTRY %main (x: f32[8,4], i: s32[]) -> f32[2,4] {\n"
    "  %x = f32[8,4]{1,0} parameter(0)\n"
    "  %i = s32[]{:S(6)} parameter(1)\n"
    "  ROOT %y = f32[2,4]{1,0:S(1)} fusion(%x, %i), kind=kLoop, calls=%rows\n"
    "}\n"
  )
  index = 4
  assert hlo.total_bytes(program.launches()) == 2 * 4 * 4 + index


def test_an_allocation_moves_nothing():
  """Only the four of eight rows that are read and written count."""
  program = hlo.Program(
    "ENTRY %main (x: f32[8,4]) -> (f32[8,4], f32[4,4]) {\n"
    "  %x = f32[8,4]{1,0} parameter(0)\n"
    "  %new = f32[8,4]{1,0} custom-call(),"
    ' custom_call_target="AllocateBuffer"\n'
    "  %half = f32[4,4]{1,0} slice(%x), slice={[0:4], [0:4]}\n"
    "  ROOT %y = (f32[8,4]{1,0}, f32[4,4]{1,0}) tuple(%new, %half)\n"
    "}\n"
  )
  launches = program.launches()
  assert hlo.total_launches(launches) == 1
  assert hlo.total_bytes(launches) == 2 * 4 * 4 * 4


def test_a_real_program():
  """A matrix product and a sum over each of its rows."""

  def function(a, b):
    return jnp.sum(jnp.tanh(a @ b), axis=1)

  a, b = jnp.ones((64, 32)), jnp.ones((32, 48))
  text = jax.jit(function).lower(a, b).compile().as_text()
  size = hlo.total_bytes(hlo.Program(text).launches())
  product = 64 * 48 * 4
  least = a.nbytes + b.nbytes + 2 * product + 64 * 4
  # Without a fusion, the product is written and read.
  assert least <= size <= least + 3 * product
