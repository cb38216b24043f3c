"""What a Birdie run's report shows."""

from typing import Any

from common.report import Plot, ReportSpec, Table

INTRO = (
  "A state-space language model trained under Birdie's mixture of objectives. "
  "Losses are in nats per target token; validation is on held-out documents, "
  "in the format of training."
)
NATS = "nats per token"


def make_spec(config: Any) -> ReportSpec:
  """The plots that fit a configuration."""
  plots = [
    Plot("Training loss", (r"train/loss",), ylabel=NATS),
    Plot("Training loss by class", (r"train/loss_of/(.+)",), ylabel=NATS),
    Plot("Validation loss", (r"eval/loss",), ylabel=NATS),
    Plot("Validation loss by class", (r"eval_class/loss/(.+)",), ylabel=NATS),
    Plot(
      "Validation accuracy by class",
      (r"eval_class/accuracy/(.+)",),
      ylabel="share of target tokens",
    ),
  ]
  if config.controller.enabled:
    plots += _controller_plots()
  plots += [
    Plot("Retrieval", (r"retrieval/(.+)",), ylabel="share right"),
    Plot("Gradient norm", (r"train/grad_norm",), yscale="log"),
    Plot("Speed", (r"speed/tokens_per_second",), ylabel="tokens per second"),
  ]
  tables = (
    Table("Results", (r"train/loss", r"eval/.+")),
    Table(
      "Retrieval",
      (r"retrieval/.+",),
      note="Phone books, answered by greedy generation; `chance` is what a "
      "guessed digit gives.",
    ),
    Table("Validation loss by class", (r"eval_class/loss/.+",)),
  )
  return ReportSpec(
    title="Birdie", intro=INTRO, plots=tuple(plots), tables=tables
  )


def _controller_plots() -> list[Plot]:
  return [
    Plot(
      "Mixture over time",
      (r"mixture/(.+)",),
      kind="area",
      ylabel="sampling probability",
      note="A mixture stands at the step it was chosen at.",
    ),
    Plot(
      "Reward by class",
      (r"reward/(.+)",),
      ylabel="reward",
      note="What the mixture before this step has earned.",
    ),
    Plot(
      "Predicted and realized reward",
      (r"predicted/(.+)", r"reward/(.+)"),
      kind="scatter",
      xlabel="predicted",
      ylabel="realized",
      note="Predicted when the mixture was chosen, realized at the next "
      "evaluation; by class.",
    ),
  ]
