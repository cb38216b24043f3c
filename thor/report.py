"""What a run's report shows."""

from typing import Any

from common.report import Plot, ReportSpec, Table
from thor.translations import PAGE

INTRO = (
  "A Transformer for translation: {what}. Losses are in nats per target token. "
  "The training loss is what is minimized, all passes and their disagreement "
  "together; validation is the likelihood of one pass, without label smoothing."
)
KINDS = {
  "dense": "without experts",
  "thor": "experts drawn at random",
  "random_switch": "each token's expert drawn at random",
  "switch": "each token's expert chosen by a gate",
  "hash": "each word's expert fixed",
}
NATS = "nats per token"


def make_spec(config: Any, setup: Any) -> ReportSpec:
  """The plots and tables that fit a configuration.

  Args:
    config: see `configs/thor.py`.
    setup: see `thor.train.Setup`.
  """
  two = config.objective.passes == 2
  what = KINDS[setup.routing.kind]
  if two:
    what += f", two passes with alpha {config.objective.alpha:g}"
  plots = [
    Plot("Training loss", (r"train/loss",), ylabel=NATS),
    Plot("Negative log-likelihood", (r"train/nll1", r"eval/loss"), ylabel=NATS),
    Plot("Validation loss by language", (r"eval_loss/(.+)",), ylabel=NATS),
  ]
  if two:
    plots.append(
      Plot(
        "Disagreement of the two passes",
        (r"train/skl",),
        ylabel=NATS,
        note="Symmetric divergence in training, with dropout.",
      )
    )
  if setup.routing.experts > 1:
    plots += _expert_plots(setup)
  if config.translation.modes:
    plots.append(
      Plot(
        "Quality by dispatch",
        (r"mode/chrf/(.+)",),
        kind="bars",
        ylabel="chrF, mean over languages",
      )
    )
  plots += [
    Plot(
      "Test BLEU by language", (r"test/bleu/(.+)",), kind="bars", ylabel="BLEU"
    ),
    Plot("Gradient norm", (r"train/grad_norm",), yscale="log"),
    Plot("Learning rate", (r"train/learning_rate",)),
    Plot(
      "Speed",
      (r"speed/target_tokens_per_second",),
      ylabel="target tokens per second",
    ),
  ]
  tables = (Table("Results", (r"train/loss", r"eval/.+", r"agreement/.+")),)
  return ReportSpec(
    title="THOR",
    intro=INTRO.format(what=what),
    plots=tuple(plots),
    tables=tables,
    pages=(PAGE,),
  )


def _expert_plots(setup: Any) -> list[Plot]:
  made = [
    Plot(
      "Share of tokens by expert",
      (r"train/experts/(\d+/\d+)",),
      kind="heatmap",
      ylabel="share of tokens",
      note="One row a layer and expert, the encoder's layers first.",
    ),
    Plot(
      "Gradient norm by expert",
      (r"train/expert_grad_norm/(\d+)",),
      yscale="log",
    ),
  ]
  if setup.routing.kind in ("thor", "random_switch"):
    made += [
      Plot(
        "Agreement between experts",
        (r"agreement/top1",),
        ylabel="share of target tokens",
        note="How often the paths of expert 0 and of expert 1 prefer the same "
        "next token of held-out text.",
      ),
      Plot("Disagreement between experts", (r"agreement/skl",), ylabel=NATS),
    ]
  if setup.routing.kind == "switch":
    made.append(Plot("Balance", (r"train/balance", r"train/kept")))
  return made
