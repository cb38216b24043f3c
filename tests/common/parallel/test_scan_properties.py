"""Laws that hold for any numbers: splitting, reversal, linearity."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.parallel import linear_scan
from common.parallel.scan import IMPLEMENTATIONS

TIME = 6
FORMS = ("sequential", "associative", "chunked")
forms = pytest.mark.parametrize("form", FORMS)
few = settings(max_examples=25, deadline=None, derandomize=True)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@functools.partial(jax.jit, static_argnames=("form", "reverse"))
def scan(form, x, a, h0, reset, reverse=False):
  return linear_scan(x, a, h0, reset=reset, reverse=reverse, impl=form, chunk=4)


def arrays(low, high, *shape):
  return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32))


numbers = st.tuples(
  arrays(-4, 4, 2, TIME, 3),
  arrays(-1, 1, 2, TIME, 3),
  arrays(-4, 4, 2, 3),
  hnp.arrays(bool, (2, TIME)),
)


@forms
@few
@given(numbers, st.integers(0, TIME), st.booleans())
def test_a_scan_splits_anywhere(form, values, at, reverse):
  x, a, h0, reset = values
  whole, whole_last = scan(form, x, a, h0, reset, reverse)
  parts = [slice(0, at), slice(at, None)]
  halves, state = {}, h0
  for i in (1, 0) if reverse else (0, 1):
    own = parts[i]
    halves[i], state = scan(
      form, x[:, own], a[:, own], state, reset[:, own], reverse
    )
  close(np.concatenate([halves[0], halves[1]], axis=1), whole)
  close(state, whole_last)


@pytest.mark.parametrize("form", IMPLEMENTATIONS[1:])
@few
@given(numbers)
def test_reverse_is_the_flipped_scan_of_the_flipped(form, values):
  x, a, h0, reset = values
  h, last = scan(form, x, a, h0, reset, reverse=True)
  flipped, flipped_last = scan(form, x[:, ::-1], a[:, ::-1], h0, reset[:, ::-1])
  np.testing.assert_array_equal(h, flipped[:, ::-1])
  np.testing.assert_array_equal(last, flipped_last)


@forms
@few
@given(numbers, numbers, st.floats(-2, 2, width=32))
def test_it_is_linear_in_drive_and_start(form, values, others, factor):
  (x, a, h0, reset), (y, _, k0, _) = values, others
  factor = np.float32(factor)
  h, last = scan(form, x + factor * y, a, h0 + factor * k0, reset)
  (h_x, last_x), (h_y, last_y) = (
    scan(form, drive, a, start, reset) for drive, start in ((x, h0), (y, k0))
  )
  close(h, h_x + factor * h_y, atol=1e-3)
  close(last, last_x + factor * last_y, atol=1e-3)


@forms
@few
@given(numbers)
def test_a_reset_forgets(form, values):
  x, a, h0, reset = values
  reset[:, 3] = True
  h, _ = scan(form, x, a, h0, reset)
  x[:, :3], h0 = 7, 0 * h0
  others, _ = scan(form, x, a, h0, reset)
  np.testing.assert_array_equal(h[:, 3:], others[:, 3:])
