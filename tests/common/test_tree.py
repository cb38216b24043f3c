import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import tree
from common.errors import UserError

TREE = {
  "layers": {
    "norm": {"scale": jnp.ones((3, 4))},
    "mlp": {"kernel": jnp.zeros((3, 4, 5))},
  },
  "head": [jnp.ones(2, jnp.bfloat16), jnp.ones((), jnp.int32)],
}


def test_names_are_paths():
  assert tree.names(TREE) == {
    "layers": {
      "norm": {"scale": "layers/norm/scale"},
      "mlp": {"kernel": "layers/mlp/kernel"},
    },
    "head": ["head/0", "head/1"],
  }


@pytest.mark.parametrize(
  ("patterns", "expected"),
  [
    ((), []),
    (("kernel$",), ["layers/mlp/kernel"]),
    (("^norm",), []),
    (("norm",), ["layers/norm/scale"]),
    (("^layers/", "0$"), ["head/0", "layers/mlp/kernel", "layers/norm/scale"]),
  ],
)
def test_mask(patterns, expected):
  flags = jax.tree.leaves(tree.mask(TREE, patterns))
  paths = jax.tree.leaves(tree.names(TREE))
  assert [path for path, flag in zip(paths, flags) if flag] == expected


@pytest.mark.parametrize(
  ("patterns", "words"),
  [
    (("kernel$", "kernal$"), ["optim.frozen", "'kernal$'", "head/0"]),
    (("(",), ["'('", "no regex"]),
  ],
)
def test_mask_refuses_in_one_line(patterns, words):
  with pytest.raises(UserError) as error:
    tree.mask(TREE, patterns, must_match="optim.frozen")
  assert all(word in str(error.value) for word in words)
  assert "\n" not in str(error.value)


def test_global_norm():
  norm = tree.global_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])})
  assert (norm.dtype, float(norm)) == (jnp.float32, 5.0)
  assert float(tree.global_norm({})) == 0.0


def test_global_norm_of_bfloat16_is_summed_in_float32():
  # In bfloat16 a sum of ones stops at 256.
  assert float(tree.global_norm(jnp.ones(10_000, jnp.bfloat16))) == 100.0


def test_sizes_of_arrays_and_of_shapes():
  shapes = jax.eval_shape(lambda: TREE)
  for it in (TREE, shapes):
    assert tree.count_params(it) == 12 + 60 + 2 + 1
    assert tree.bytes_of(it) == 4 * 12 + 4 * 60 + 2 * 2 + 4
  assert tree.bytes_of(np.zeros(3)) == 24
  assert tree.bytes_of(jax.random.key(0)) == 8


@pytest.mark.parametrize("word", ["norm", "layers", "head", "nothing", ""])
def test_combine_undoes_partition(word):
  kept, rest = tree.partition(TREE, lambda path: word in path)
  names = jax.tree.leaves(tree.names(kept))
  assert all(word in name for name in names)
  assert len(names) + len(jax.tree.leaves(rest)) == 4
  joined = tree.combine(kept, rest)
  assert jax.tree.structure(joined) == jax.tree.structure(TREE)
  same = jax.tree.map(lambda a, b: a is b, joined, TREE)
  assert all(jax.tree.leaves(same))


def test_half_a_tree_can_be_differentiated():
  kept, rest = tree.partition(
    {"a": jnp.array(2.0), "b": jnp.array(3.0)}, lambda path: path == "a"
  )
  grads = jax.grad(
    lambda half: (lambda t: t["a"] ** 2 * t["b"])(tree.combine(half, rest))
  )(kept)
  assert float(grads["a"]) == 12.0
  assert grads["b"] is None
