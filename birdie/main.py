"""`python -m birdie.main --config=configs/birdie.py`."""

from common import app
from common.config import did_you_mean
from common.errors import UserError

MODES = ("train", "data_report")


def main(config, workdir: str) -> None:
  """Trains, or reports on the data; see `configs/birdie.py`."""
  if config.mode not in MODES:
    raise UserError(f"mode={config.mode!r}{did_you_mean(config.mode, MODES)}")
  if config.mode == "data_report":
    from birdie import data_report

    print(data_report.of_config(config))
    return
  from birdie import train

  train.train_and_evaluate(config, workdir)


def programs(config):
  """The steps of a run; see `birdie.plan`."""
  from birdie import plan

  return plan.programs(config)


if __name__ == "__main__":
  app.run(
    main,
    name="birdie",
    description="Trains a state-space language model under Birdie's mixture.",
    example="python -m birdie.main --config=configs/birdie.py:smoke",
    needs=("mixture",),
    programs=programs,
  )
