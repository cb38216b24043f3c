"""`python -m birdie.main --config=configs/birdie.py`."""

from common import app


def main(config, workdir: str) -> None:
  """Trains; see `birdie.train.train_and_evaluate`."""
  from birdie import train

  train.train_and_evaluate(config, workdir)


if __name__ == "__main__":
  app.run(
    main,
    name="birdie",
    description="Trains a state-space language model under Birdie's mixture.",
    example="python -m birdie.main --config=configs/birdie.py:smoke",
  )
