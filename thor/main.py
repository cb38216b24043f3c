"""`python -m thor.main --config=configs/thor.py`."""

from common import app


def main(config, workdir: str) -> None:
  """Trains, and translates the test sets; see `configs/thor.py`."""
  from thor import train

  train.train_and_evaluate(config, workdir)


def programs(config):
  """The steps of a run; see `thor.plan`."""
  from thor import plan

  return plan.programs(config)


if __name__ == "__main__":
  app.run(
    main,
    name="thor",
    description="Trains Transformers whose experts are drawn at random.",
    example="python -m thor.main --config=configs/thor.py:smoke",
    needs=("routing",),
    programs=programs,
  )
