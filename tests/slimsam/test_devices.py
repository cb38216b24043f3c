"""Both stages on eight devices: loss and gradients are those of one."""

import jax
import numpy as np
import pytest

from common.parallel import from_host, make_mesh, shardings
from slimsam.data import rows_sharding
from slimsam.encoder import PLAIN
from slimsam.model import RULES
from slimsam.prune import prune_model
from slimsam.stages import Roles, make_loss, stage_of

KEPT = {
  "step_1": {"embedding": range(0, 24, 2)},
  "step_2": {"qkv/0": range(6), "mlp/1": range(0, 40, 4)},
}


@pytest.fixture(scope="module", params=KEPT)
def case(request, tiny, draw, images_of):
  """A stage's gradient, its student, what it is given, and a batch.

  The students have moved on from what was pruned: nothing is zero.
  """
  stage = stage_of(request.param, "fixed")
  # A block with windows and one without.
  settings = tiny.with_widths(qkv_widths=(24,) * 2, mlp_widths=(40,) * 2)
  params = draw(settings)
  trees, sizes = [], []
  for keep in KEPT.values():
    trees.append(params["image_encoder"])
    sizes.append(settings.encoder)
    params, settings = prune_model(params, settings, keep)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * 1.02, params)
    if keep is KEPT[stage.name]:
      break
  first = sizes[1] if stage.name == "step_2" else None
  roles = Roles(settings.encoder, sizes[0], first, PLAIN, PLAIN)
  loss = make_loss(stage, roles, with_features=True)
  given = dict(zip(("original", "first"), trees))
  weights = stage.weights(4)
  assert np.all(weights)

  def run(params, batch, given):
    return loss(params, batch, {}, {**given, "weights": weights})

  gradient = jax.value_and_grad(run, has_aux=True)
  batch = {"images": images_of(tiny, 8)}
  return gradient, params["image_encoder"], batch, given


@pytest.fixture(scope="module")
def alone(case):
  """Loss, terms and gradients on one device."""
  gradient, *arguments = case
  return jax.jit(gradient)(*arguments)


@pytest.mark.parametrize(
  "axes", [{"data": 8}, {"data": 2, "fsdp": 2, "model": 2}],
  ids=["data", "data_fsdp_model"],
)  # fmt: skip
def test_eight_devices_are_one(case, alone, axes):
  gradient, params, batch, given = case
  mesh = make_mesh(axes)

  def place(tree):
    like = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      tree,
      shardings(tree, mesh, RULES),
    )
    return from_host(tree, like)

  with jax.set_mesh(mesh):
    (loss, metrics), grads = jax.jit(gradient)(
      place(params), jax.device_put(batch, rows_sharding(mesh)), place(given)
    )
  (expected, terms), slopes = alone
  assert len(loss.sharding.device_set) == 8
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  for name, own in terms.items():
    np.testing.assert_allclose(metrics[name].total, own.total, rtol=1e-5)
    assert metrics[name].count == own.count == 8
  assert jax.tree.structure(grads) == jax.tree.structure(slopes)

  def same(path, found, slope):
    scale = np.abs(slope).max()
    assert scale > 0, path
    np.testing.assert_allclose(
      found, slope, rtol=0, atol=1e-5 * scale, err_msg=str(path)
    )

  jax.tree_util.tree_map_with_path(same, grads, slopes)
