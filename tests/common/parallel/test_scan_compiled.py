"""The kernels, compiled to the end for devices that are not there.

Needs jax's plugin for CUDA (`pip install 'jax[cuda13]'`) or `libtpu`; nothing
is run.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
"""
SCRIPT = """
import json, sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from common.parallel import linear_scan

impl, platform, topology = json.loads(sys.argv[1])
chips = topologies.get_topology_desc(platform=platform, **topology).devices
place = NamedSharding(Mesh([chips[0]], ("chip",)), jax.P())

def compile(dtype, shape, **options):
  def loss(x, a, h0, reset):
    h, last = linear_scan(x, a, h0, reset=reset, impl=impl, **options)
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
  traced.lower(lowering_platforms=(platform,)).compile()

compile("float32", (8, 4096, 2048))
compile("float32", (1, 7, 3), reverse=True, log_gates=True)
compile("bfloat16", (1, 1300, 200), reverse=True)
compile("complex64", (1, 300, 1200), log_gates=True)
if impl == "triton":
  compile("float16", (1, 7, 3))
"""


def compile_for(impl, platform, topology, **environment):
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", SCRIPT,
     json.dumps([impl, platform, topology])],
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
  importlib.util.find_spec("jax_plugins") is None
  or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
  reason="no plugin for CUDA",
)
def test_triton_for_an_h100():
  compile_for(
    "triton",
    "cuda",
    {"topology_name": "1x1x1", "topology": "1x1x1", "target_config": H100},
  )


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="no libtpu"
)
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_mosaic_for_tpus(name):
  compile_for(
    "mosaic",
    "tpu",
    {"topology_name": name},
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
  )
