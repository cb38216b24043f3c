"""What the tests of the recurrence are measured with."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType


def gates_of(a, channels, log_gates, reset):
  """The numbers that states are multiplied with, [B T N] in double."""
  wide = np.complex128 if np.iscomplexobj(a) else np.float64
  gates = np.asarray(a, wide)
  with np.errstate(divide="ignore"):
    gates = np.exp(gates) if log_gates else gates
  gates = np.repeat(gates, channels // a.shape[-1], axis=-1)
  if reset is not None:
    gates = np.where(reset[..., None], 0, gates)
  return gates


def loop(x, a, h0, *, reverse=False, reset=None, log_gates=False):
  """The definition, step by step in double: (h, h_last)."""
  gates = gates_of(a, x.shape[-1], log_gates, reset)
  wide = np.result_type(x, gates) if np.iscomplexobj(x) else np.float64
  h, state = np.zeros(x.shape, wide), np.asarray(h0, wide)
  steps = range(x.shape[1])
  for t in reversed(steps) if reverse else steps:
    h[:, t] = state = gates[:, t] * state + np.asarray(x[:, t], wide)
  return h, state


def gradients(
  x, a, h0, g, g_last, *, reverse=False, reset=None, log_gates=False
):
  """Those of sum(h g) + sum(h_last g_last), step by step in double."""
  options = {"reverse": reverse, "reset": reset, "log_gates": log_gates}
  h, _ = loop(x, a, h0, **options)
  channels, count = x.shape[-1], a.shape[-1]
  gates = gates_of(a, channels, log_gates, reset)
  dx, d_gates = np.zeros_like(h), np.zeros_like(h)
  decayed = np.asarray(g_last, h.dtype)
  steps, before = range(x.shape[1]), 1 if reverse else -1
  for t in steps if reverse else reversed(steps):
    dx[:, t] = lam = decayed + np.asarray(g[:, t], h.dtype)
    inside = 0 <= t + before < x.shape[1]
    d_gates[:, t] = lam * (h[:, t + before] if inside else h0)
    decayed = gates[:, t] * lam
  if reset is not None:
    d_gates = np.where(reset[..., None], 0, d_gates)
  if log_gates:
    d_gates = d_gates * gates
  da = d_gates.reshape(*a.shape, channels // count).sum(-1)
  return dx, da, decayed


def plain(x, a, h0, reset=None):
  """The definition in jax, for jax to differentiate."""
  if reset is not None:
    a = jnp.where(reset[:, :, None], 0.0, a)

  def step(state, xa):
    state = xa[1] * state + xa[0]
    return state, state

  rows = jnp.swapaxes(x, 0, 1), jnp.swapaxes(a, 0, 1)
  last, h = jax.lax.scan(step, h0, rows)
  return jnp.swapaxes(h, 0, 1), last


@pytest.fixture(scope="session")
def oracle():
  return SimpleNamespace(loop=loop, gradients=gradients, plain=plain)


@pytest.fixture(scope="session")
def make_mesh():
  """`make_mesh(data=2, model=2)`: of the first devices, with Auto axes."""

  def make(**sizes):
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
      tuple(sizes.values()),
      tuple(sizes),
      axis_types=(AxisType.Auto,) * len(sizes),
      devices=jax.devices()[:count],
    )

  return make
