"""The kernel for TPUs, compiled to the end for chips that are not there.

Needs `libtpu` (`pip install libtpu`); nothing is run.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")

SCRIPT = """
import sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from common.parallel import linear_scan

name, = sys.argv[1:]
chips = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
place = NamedSharding(Mesh([chips[0]], ("chip",)), jax.P())

def compile(dtype, shape, **options):
  def loss(x, a, h0, reset):
    h, last = linear_scan(x, a, h0, reset=reset, impl="mosaic", **options)
    return jnp.sum(h.real.astype(jnp.float32) ** 2) + jnp.sum(last.real)

  batch, time, channels = shape
  carry = jnp.promote_types(dtype, jnp.float32)
  x, h0, reset = (
    jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for shape, dtype in (
      (shape, dtype), ((batch, channels), carry), ((batch, time), bool)
    )
  )
  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, h0, reset)
  traced.lower(lowering_platforms=("tpu",)).compile()

for dtype in ("float32", "bfloat16", "complex64"):
  for shape in ((2, 4096, 2048), (1, 300, 200), (1, 7, 3)):
    compile(dtype, shape)
compile("float32", (2, 4096, 2048), reverse=True, log_gates=True)
"""


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_it_compiles(topology):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
  }
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, topology],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
