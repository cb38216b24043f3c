"""The variants of configs/slimsam.py: published settings, steps on meshes.

Nothing is compiled and no array is made: shapes are traced and lowered for
meshes of 8 and of 64 devices, of which there need be none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from common.optim import make_optimizer
from common.parallel import bytes_per_device, shardings
from common.parallel.mesh import AXES
from common.rngs import RngStreams
from common.state import TrainState
from common.step import make_train_step
from common.tree import count_params
from configs.slimsam import VARIANTS, get_config
from slimsam.checks import check
from slimsam.data import rows_sharding
from slimsam.encoder import DTYPES, Compute
from slimsam.groups import encoder_groups, of_kind
from slimsam.importance import disturbed_loss, make_accumulate, zero_sums
from slimsam.init import abstract_params
from slimsam.model import RULES
from slimsam.plateau import scale_by_factor
from slimsam.prune import pruned_settings
from slimsam.select import select_bottlenecks, select_embedding
from slimsam.settings import preset
from slimsam.stages import Roles, make_steps, stage_of, teachers_of

# The image encoder's parameters: at first, and after each step.
PARAMS = {
  "vit_b_50": (89_670_912, 45_209_472, 23_897_216),
  "vit_b_77": (89_670_912, 20_199_912, 5_658_968),
  "vit_h_77": (637_026_048, 144_167_712, 34_376_928),
}
# Devices along data, fsdp and model.
MESHES = [
  (8, 1, 1), (1, 8, 1), (2, 2, 2), (64, 1, 1), (8, 8, 1), (8, 4, 2), (2, 8, 4),
]  # fmt: skip


@pytest.mark.parametrize(
  "name", ["", *VARIANTS, "smoke,one_step", "vit_b_77,paper,global",
           "vit_h_77,reference"]
)  # fmt: skip
def test_every_variant_is_complete(name):
  """All that can be refused before data are read is not."""
  config = get_config(name)
  stages = check(config)
  assert [stage.name for stage in stages] == list(config.distill.stages)
  paper = name.startswith(("vit", "small"))
  truth = "gt" if paper else "teacher"
  assert config.evaluation.best == f"miou/{truth}/point/single"


@pytest.mark.parametrize("name", PARAMS)
def test_the_published_settings(name):
  """Section 4.1: 10,000 images, 1,000 for importance, Adam, 1e-4, 20 or 40
  epochs of 4 images a batch; no decay.
  """
  config = get_config(name)
  ratio, epochs = (0.5, 20) if name.endswith("50") else (0.77, 40)
  assert (config.prune.ratio, config.distill.epochs) == (ratio, epochs)
  assert (config.data.images, config.data.rows) == (10_000, 4)
  cfg = config.importance
  assert (cfg.kind, cfg.images, cfg.sigma) == ("disturbed", 1000, 0.01)
  cfg = config.distill.optim
  assert (cfg.name, cfg.lr, cfg.weight_decay) == ("adamw", 1e-4, 0.0)
  assert (cfg.schedule, cfg.clip_norm) == ("constant", 0.0)
  assert config.distill.stages == ("step_1", "step_2")
  steps = check(config)
  assert [step.feature_epochs for step in steps] == [10, 10]
  once = get_config(f"{name},one_step").distill
  assert (once.stages, once.epochs) == (("one_step",), 2 * epochs)


@functools.cache
def sizes(name):
  """Settings: the original's, and after each step."""
  config = get_config(name)
  whole = preset("vit_h" if name.startswith("vit_h") else "vit_b")
  found, heads = [whole], whole.encoder.heads
  for stage in check(config):
    groups, ratio = encoder_groups(found[-1]), config.prune.ratio
    keep = {}
    for kind in stage.kinds:
      own = {n: np.zeros(groups[n].size) for n in of_kind(groups, kind)}
      if kind == "embedding":
        keep[kind] = select_embedding(own[kind], ratio, heads)
      else:
        keep |= select_bottlenecks(own, ratio, heads)
    found.append(pruned_settings(found[-1], keep))
  return found


@functools.cache
def encoder_shapes(settings):
  return abstract_params(settings)["image_encoder"]


def mesh_of(shape):
  return AbstractMesh(
    (*shape, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def placed(tree, mesh):
  """Shapes, where the rules put them."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    tree,
    shardings(tree, mesh, RULES),
  )


class Shapes:
  """A stage of a variant on a mesh: state, teachers, batch and steps.

  Args:
    name: the variant's.
    mesh: devices along data, fsdp and model.
    step: 1 or 2.
  """

  def __init__(self, name, mesh, step):
    self.config, self.step = get_config(name), step
    self.mesh = mesh_of(mesh)
    self.sizes = sizes(name)
    cfg = self.config.distill
    self.stage = stage_of(f"step_{step}", cfg.preset)
    self.compute = Compute(DTYPES[cfg.dtype], cfg.remat)
    tx, _ = make_optimizer(cfg.optim.to_dict(), 1000)
    self.tx = optax.chain(tx, scale_by_factor())
    params = encoder_shapes(self.sizes[step])
    self.state = placed(
      jax.eval_shape(lambda tree: TrainState.create(tree, self.tx), params),
      self.mesh,
    )
    teachers = {"original": self.sizes[0], "first": self.sizes[1]}
    self.given = {
      teacher: placed(encoder_shapes(own), self.mesh)
      for teacher, own in list(teachers.items())[:step]
    }
    # As published, or an image for each shard of a larger mesh.
    self.rows = max(self.config.data.rows, mesh[0] * mesh[1])

  def batch(self, **dtypes):
    """Rows of numbers, besides images."""
    place = rows_sharding(self.mesh)
    shapes = {"images": (1024, 1024, 3), **dict.fromkeys(dtypes, ())}
    return {
      name: jax.ShapeDtypeStruct(
        (self.rows, *shape), dtypes.get(name, jnp.float32), sharding=place
      )
      for name, shape in shapes.items()
    }

  def lowered(self, epoch):
    """The step of an epoch."""
    cfg, (original, first, _) = self.config.distill, self.sizes
    roles = Roles(
      self.sizes[self.step].encoder,
      original.encoder,
      first.encoder if self.step == 2 else None,
      self.compute,
      Compute(DTYPES[cfg.teacher_dtype]),
    )

    def make_step(loss):
      step = make_train_step(loss, self.tx, RngStreams(0), accum=cfg.accum)
      return functools.partial(lower, step)

    steps = make_steps(
      self.stage, make_step, roles, self.given, steps_per_epoch=7
    )
    chosen: Any = steps.choose(7 * epoch)
    with jax.sharding.use_abstract_mesh(self.mesh):
      return chosen(self.state, self.batch())


def lower(program, *arguments):
  return program.trace(*arguments).lower(lowering_platforms=("cpu",))


def expected_bytes(name, step, mesh):
  """Of an encoder's float32 parameters on one device, from its widths.

  Kernels of linear layers in blocks are cut twice, biases over hidden units
  and heads once; all else is whole.
  """
  cfg, (_, fsdp, model) = sizes(name)[step].encoder, mesh
  qkv, hidden = sum(cfg.qkv_widths), sum(cfg.mlp_widths)
  twice = cfg.width * (4 * qkv + 2 * hidden)
  once = 3 * qkv + hidden
  whole = PARAMS[name][step] - twice - once
  return 4 * (twice // (fsdp * model) + once // model + whole)


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes_are_what_is_left(name):
  widths = {"vit_b_50": (384, 384, 1536), "vit_b_77": (168, 168, 696),
            "vit_h_77": (288, 288, 1168)}[name]  # fmt: skip
  found = sizes(name)
  for settings, params in zip(found, PARAMS[name]):
    assert count_params(encoder_shapes(settings)) == params
  cfg = found[2].encoder
  assert (cfg.width, cfg.qkv_widths[0], cfg.mlp_widths[0]) == widths


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", PARAMS)
def test_what_a_device_holds(name, mesh):
  """Parameters, two moments of each, and those of the teachers that run."""
  for step in (1, 2):
    shapes = Shapes(name, mesh, step)
    params, state = shapes.state.params, shapes.state
    student = expected_bytes(name, step, mesh)
    assert bytes_per_device(params) == student
    scalars = [leaf for leaf in jax.tree.leaves(state) if not leaf.shape]
    assert bytes_per_device(state) == 3 * student + 4 * len(scalars)
    for kept in (False, True):
      # Step 1 follows the original's bottlenecks, whatever was kept.
      at_least = step - 1 if kept else 0
      expected = [expected_bytes(name, i, mesh) for i in range(at_least, step)]
      teachers = teachers_of(shapes.stage, with_features=True, kept=kept)
      held = {teacher: shapes.given[teacher] for teacher in teachers}
      assert bytes_per_device(held) == sum(expected)


LOWERED = [
  ("vit_b_50", (2, 2, 2), 2, 19), ("vit_b_77", (8, 4, 2), 2, 9),
  ("vit_b_77", (8, 8, 1), 1, 10),
  ("vit_h_77", (8, 4, 2), 1, 9),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mesh", "step", "epoch"), LOWERED)
def test_published_steps_fit_meshes(name, mesh, step, epoch):
  """The whole update: student, teachers, gradients, AdamW."""
  shapes = Shapes(name, mesh, step)
  state, metrics = shapes.lowered(epoch).out_info
  like = jax.tree.map(lambda leaf: leaf.shape, shapes.state)
  assert jax.tree.map(lambda leaf: leaf.shape, state) == like
  features = {1: "qkv_windowed", 2: "features"}[step]
  assert (features in metrics) == (epoch < 10)


@pytest.mark.parametrize(
  ("name", "mesh"), [("vit_b_50", (2, 2, 2)), ("vit_b_77", (8, 8, 1))]
)
def test_published_importance_fits_meshes(name, mesh):
  """The gradient against the disturbed embedding, added up for all groups."""
  shapes = Shapes(name, mesh, 1)
  settings = shapes.sizes[0]
  groups = encoder_groups(settings)
  params = {"image_encoder": shapes.given["original"]}
  sums = placed(
    jax.eval_shape(functools.partial(zero_sums, groups=groups), params),
    shapes.mesh,
  )
  add = make_accumulate(disturbed_loss(settings, shapes.compute), groups)
  batch = shapes.batch(ids=jnp.int32, weights=jnp.float32)
  with jax.sharding.use_abstract_mesh(shapes.mesh):
    found = lower(add, sums, params, batch, jax.eval_shape(jax.random.key, 0))
  assert found.out_info.grads.keys() == sums.grads.keys()
  # 74 matrices of the embedding; queries, keys and values are one parameter.
  assert len(sums.grads) == 2 + 4 * 12
