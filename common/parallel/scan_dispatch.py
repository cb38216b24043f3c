"""Which function computes a form of the recurrence."""

import functools

import jax

from common.parallel import scan_forms as xla
from common.parallel.scan_forms import Form, Saved

Array = jax.Array
KERNELS = ("triton", "mosaic")
IMPLEMENTATIONS = ("auto", "sequential", "associative", "chunked", *KERNELS)


@functools.partial(jax.jit, static_argnums=0)
def forward(
  form: Form, x: Array, a: Array, h0: Array, reset: Array | None
) -> tuple[Array, Array, Saved]:
  """All states in the dtype of x, the last one, and what to save."""
  if form.impl == "chunked":
    h, last, starts = xla.chunked(form, x, a, h0, reset)
    return h, last, Saved(a, reset, x, None, starts)
  if form.impl in KERNELS:
    from common.parallel import scan_kernel

    h, last = scan_kernel.forward(form, x, a, h0, reset)
  elif form.impl == "associative":
    h, last = xla.associative(form, x, a, h0, reset)
  else:
    h, last = xla.sequential(form, x, a, h0, reset)
  return h, last, Saved(a, reset, None, h, h0)


@functools.partial(jax.jit, static_argnums=0)
def backward(
  form: Form, saved: Saved, g: Array, g_last: Array
) -> tuple[Array, Array, Array]:
  """The cotangents of x, a and h0."""
  if form.impl in KERNELS:
    from common.parallel import scan_kernel

    run = scan_kernel.backward
  elif form.impl == "chunked":
    run = xla.chunked_bwd
  elif form.impl == "associative":
    run = xla.associative_bwd
  else:
    run = xla.sequential_bwd
  return run(form, saved, g, g_last)


@functools.partial(jax.jit, static_argnums=(0, 1))
def reduced(
  form: Form, reverse: bool, x: Array, a: Array, reset: Array | None
) -> tuple[Array, Array]:
  """What all steps make of a zero state, and the product of their gates.

  Args:
    form: how it is computed.
    reverse: the direction, which is not always the form's.
    x: [b t n], in the carry's dtype.
    a: [b t k], likewise.
    reset: [b t] or None.

  Returns:
    Two arrays [b n].
  """
  if form.impl in KERNELS:
    from common.parallel import scan_kernel

    return scan_kernel.reduced(form, reverse, x, a, reset)
  if form.impl == "associative":
    return xla.associative_reduce(form, reverse, x, a, reset)
  return xla.sequential_reduce(form, reverse, x, a, reset)
