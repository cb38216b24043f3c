"""What the report of one training shows."""

from typing import Any

from common.report import Plot, ReportSpec, Table
from udim.algorithms import UDIM, split_name

INTRO = (
  "A classifier trained on some domains and measured on others. `val` is the "
  "mean over the sources' held-out images, by which models are selected; "
  "`target` the mean over the domains that training does not see, "
  "`reference` over images like the sources'. All accuracies are shares of "
  "1, all losses nats."
)


def make_spec(config: Any) -> ReportSpec:
  """The plots that fit a configuration."""
  means = (r"val/accuracy", r"target/accuracy", r"reference/accuracy")
  plots = [
    Plot("Training loss", (r"train/loss", r"train/sam_loss"), ylabel="nats"),
    Plot("Accuracy", means, ylabel="share right"),
    Plot(
      "Accuracy by target domain",
      (r"target_main/accuracy/(.+)",),
      kind="heatmap",
      ylabel="share right",
    ),
    Plot("Validation loss", (r"val/loss", r"target/loss"), ylabel="nats"),
  ]
  if split_name(config.algorithm)[0] in UDIM:
    plots += [
      Plot(
        "Inconsistency",
        (r"train/pen", r"train/gn"),
        yscale="log",
        note="`pen` is the squared distance of the gradients' variances, `gn` "
        "the squared norms of the gradients on the perturbed images.",
      ),
      Plot(
        "Perturbation",
        (r"train/perturbation_rms",),
        ylabel="root mean square of a pixel's change",
      ),
    ]
  plots += [
    Plot("Gradient norm", (r"train/grad_norm",), yscale="log"),
    Plot("Speed", (r"speed/images_per_second",), ylabel="images per second"),
  ]
  tables = (
    Table("Results", (r"(val|target|reference)/.+",)),
    Table("Target domains", (r"target_main/accuracy/.+",)),
    Table("Training", (r"train/(loss|accuracy|penalty|pen|gn|grad_norm)",)),
  )
  return ReportSpec(
    title=f"UDIM bench: {config.algorithm}",
    intro=INTRO,
    plots=tuple(plots),
    tables=tables,
  )
