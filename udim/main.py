"""`python -m udim.main --config=configs/udim.py`."""

from common import app
from common.config import did_you_mean
from common.errors import UserError

MODES = ("train", "compare")


def main(config, workdir: str) -> None:
  """Trains once, or compares algorithms; see `configs/udim.py`."""
  if config.mode not in MODES:
    raise UserError(f"mode={config.mode!r}{did_you_mean(config.mode, MODES)}")
  if config.mode == "compare":
    from udim import compare

    compare.compare(config, workdir)
    return
  from udim import train

  train.train_and_evaluate(config, workdir)


def programs(config):
  """The steps of a run; see `udim.plan`."""
  from udim import plan

  return plan.programs(config)


if __name__ == "__main__":
  app.run(
    main,
    name="udim",
    description="Trains classifiers for domains that nobody has seen.",
    example="python -m udim.main --config=configs/udim.py:smoke",
    needs=("algorithm",),
    programs=programs,
  )
