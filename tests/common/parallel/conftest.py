"""What the tests of the recurrence are measured with."""

from types import SimpleNamespace

import numpy as np
import pytest


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


@pytest.fixture(scope="session")
def oracle():
  return SimpleNamespace(loop=loop, gradients=gradients)
