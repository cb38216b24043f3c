"""Batches, heads and models that do not fit: one line that says so."""

import jax
import jax.numpy as jnp
import pytest

from common.errors import UserError
from udim import UdimConfig, udim_grads


def problem():
  params = {
    "hidden": jnp.ones((5, 4)),
    "head": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)},
  }
  batch = {"image": jnp.ones((1, 6, 5)), "label": jnp.zeros((1, 6), jnp.int32)}
  return params, batch


def apply_fn(variables, images, *, train, rngs):
  del train, rngs
  params = variables["params"]
  features = images @ params["hidden"]
  logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
  return features, logits, {}


BAD = [
  ({"image": (6, 5), "label": (6,)}, "head", 1, ["[6, 5]", "[None]"]),
  ({"image": (1, 6, 5), "label": (2, 3)}, "head", 1, ["[2, 3]", "domain"]),
  ({"image": (1, 6, 5), "label": (1, 6)}, "top/head", 1, ["'top/head'"]),
  ({"image": (1, 6, 5), "label": (1, 6)}, "hidden", 1, ["'hidden'", "kernel"]),
  ({"image": (1, 6, 5), "label": (1, 6)}, "head", 4, ["accum=4", "6 images"]),
  *(
    ({"image": (1, 6, 5), "label": (1, 6)}, "head", bad, [f"accum={bad}"])
    for bad in (0, -1, 1.5)
  ),
]


@pytest.mark.parametrize(("shapes", "head", "accum", "words"), BAD)
def test_mistakes_are_one_line(shapes, head, accum, words):
  batch = {
    "image": jnp.zeros(shapes["image"]),
    "label": jnp.zeros(shapes["label"], jnp.int32),
  }

  def call():
    grads_of = udim_grads(apply_fn, head, UdimConfig(), accum=accum)
    jax.eval_shape(grads_of, problem()[0], batch, None, 0)

  with pytest.raises(UserError) as error:
    call()
  assert all(word in str(error.value) for word in words)
  assert "\n" not in str(error.value)


def test_a_model_without_statistics_says_so():
  def pair(variables, images, *, train, rngs):
    return apply_fn(variables, images, train=train, rngs=rngs)[:2]

  with pytest.raises(UserError, match=r"\{\} for a model .* a tuple of 2"):
    udim_grads(pair, "head", UdimConfig())(*problem(), None, 0)


def test_integer_images_are_refused():
  params, batch = problem()
  batch["image"] = batch["image"].astype(jnp.uint8)
  with pytest.raises(UserError, match="uint8"):
    udim_grads(apply_fn, "head", UdimConfig())(params, batch, None, 0)
