"""Settings and functions that make no sense: one line that says so."""

import jax.numpy as jnp
import optax
import pytest

from common.errors import UserError
from common.optim import esam, gam, gsam, look_sam, sam


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: sam(optax.sgd(1), -1), "rho=-1 must be a number from 0"),
    (lambda: gsam(optax.sgd(1), alpha=-1), "alpha=-1 must be"),
    (lambda: gam(optax.sgd(1), rho_prime=-1), "rho_prime=-1 must be"),
    (lambda: gam(optax.sgd(1), beta1=1.5), "beta1=1.5 must be .* from 0 to 1"),
    (lambda: look_sam(optax.sgd(1), k=0), "k=0 must be a whole number from 1"),
    (lambda: look_sam(optax.sgd(1), k=1.5), "k=1.5 must be a whole number"),
    (lambda: look_sam(optax.sgd(1), alpha=-1), "alpha=-1 must be"),
    (lambda: esam(optax.sgd(1), 0.1, 0.0), "weight_fraction=0.0 must be above"),
    (lambda: esam(optax.sgd(1), 0.1, 0.5, 1.1), "data_fraction=1.1 must be"),
    (
      lambda: esam(optax.sgd(1), data_fraction=lambda n: 0.5),
      "data_fraction must be a number",
    ),
    (lambda: sam(optax.sgd(1), "0.1"), "rho='0.1' must be a number"),
    (lambda: sam(optax.sgd(1), every="2"), "every='2' must be a whole number"),
    (lambda: esam(optax.sgd(1), 0.1, "1"), "weight_fraction='1' must be"),
    (
      lambda: sam(optax.sgd(1), mask={"b": True}).update(
        {"a": jnp.ones(2)},
        sam(optax.sgd(1)).init({"a": jnp.ones(2)}),
        {"a": jnp.ones(2)},
        grad_fn=lambda p: p,
      ),
      r"mask of \{'b': \(\)\} does not fit parameters of \{'a': \(2,\)\}",
    ),
    (
      lambda: esam(optax.identity()).update(
        jnp.ones(2),
        esam(optax.identity()).init(jnp.ones(2)),
        jnp.ones(2),
        grad_fn=lambda p, chosen: p,
        losses_fn=jnp.sum,
      ),
      r"losses_fn must return \[B\], not shape \(\)",
    ),
  ],
)
def test_what_makes_no_sense_is_refused(call, message):
  with pytest.raises(UserError, match=message):
    call()
