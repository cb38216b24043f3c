"""`python -m slimsam.main --config=configs/slimsam.py`."""

from common import app


def main(config, workdir: str) -> None:
  """Slims a SAM; see `configs/slimsam.py`."""
  from slimsam import train

  train.train_and_evaluate(config, workdir)


def programs(config):
  """The steps of a run; see `slimsam.plan`."""
  from slimsam import plan

  return plan.programs(config)


if __name__ == "__main__":
  app.run(
    main,
    name="slimsam",
    description="Makes Segment Anything small by pruning and distillation.",
    example="python -m slimsam.main --config=configs/slimsam.py:smoke",
    needs=("teacher", "prune"),
    programs=programs,
  )
