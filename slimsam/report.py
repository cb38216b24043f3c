"""What a run and its trainings report."""

from common import files
from common.metrics import read_metrics
from common.report import FILE_NAME, Plot, ReportSpec, Table, markdown_table
from common.tree import count_params
from slimsam import pictures
from slimsam.cost import encoder_macs
from slimsam.run import MODEL, Model, Run, alone

MASKS = "masks.png"
_PICTURES = 4  # images whose masks are drawn
PRUNED = "pruned.json"  # how a model was judged when it had just been pruned
_SHOWN = (
  ("valid/mse", "embedding MSE", "{:.4f}"),
  ("miou/gt/point/single", "point", "{:.1f}"),
  ("miou/gt/box/single", "box", "{:.1f}"),
  ("miou/gt/point/oracle", "point, best of three", "{:.1f}"),
  ("miou/teacher/point/single", "teacher, point", "{:.1f}"),
  ("miou/teacher/box/single", "teacher, box", "{:.1f}"),
)
_INTROS = {
  "teacher": "A small SAM, trained on images with masks.",
  "step_1": "The embedding was pruned; the student follows the bottlenecks of "
  "the original.",
  "step_2": "The bottlenecks were pruned; the student follows what flows "
  "between the blocks of the student of step 1.",
  "one_step": "Everything was pruned at once; the student follows the image "
  "embedding.",
}


def part_report(name: str, terms: tuple[str, ...]) -> ReportSpec:
  """The report of one training.

  Args:
    name: of the training.
    terms: of its loss.
  """
  losses = tuple(f"train/{term}" for term in terms)
  plots = [Plot("Training loss", (r"train/loss",), yscale="log")]
  if losses:
    plots.append(Plot("Terms of the loss", losses, yscale="log"))
    plots.append(
      Plot(
        "Embedding error on validation images", (r"valid/mse",), yscale="log"
      )
    )
  plots += [
    Plot("Mean IoU with true masks", (r"miou/gt/(.+)",), ylabel="mean IoU"),
    Plot("Mean IoU with the teacher", (r"miou/teacher/(.+)",),
         ylabel="mean IoU"),
    Plot("Gradient norm", (r"train/grad_norm",), yscale="log"),
    Plot("Speed", (r"speed/images_per_second",), ylabel="images per second"),
  ]  # fmt: skip
  return ReportSpec(
    title=f"SlimSAM: {name}",
    intro=_INTROS[name],
    plots=tuple(plots),
    tables=(Table("Results", (r"train/loss", r"valid/.+", r"miou/.+")),),
  )


def write_page(
  run: Run, original: Model, stages: list[str], scores: dict[str, float]
) -> str:
  """Writes the page of the whole run: sizes, work and quality at each stage.

  Args:
    run: whose folder holds the trainings.
    original: the model that was slimmed.
    stages: that were run, in their order.
    scores: of the original.

  Returns:
    Its path.
  """
  rows = [_row("original", original, scores)]
  models = {"original": original}
  for name in stages:
    model = models[name] = Model.load(run.folder / name / MODEL)
    pruned = files.read_json(run.folder / name / PRUNED)
    rows.append(_row(f"{name}, pruned", model, pruned))
    best, last = _best(run, name)
    title = f"{name}, trained, update {best['step']:.0f} of {last:.0f}"
    rows.append(_row(title, model, best))
  header = (
    "model", "encoder parameters", "conv and linear, G MAC", "all, G MAC",
    *(title for _, title, _ in _SHOWN),
  )  # fmt: skip
  links = [f"* [{name}]({name}/{FILE_NAME})" for name in _parts(run, stages)]
  text = "\n\n".join(
    [
      "# SlimSAM",
      f"A ratio of {run.config.prune.ratio:g} of every width, importance "
      f"`{run.config.importance.kind}`, losses `{run.config.distill.preset}`. "
      f"Mean IoU in percent, over {run.config.evaluation.images or 'all'} "
      "validation images at most: of one mask for a point or a box with the "
      "true mask, of the best of three, and with the mask that the original "
      "finds. The same images chose each training's best checkpoint by "
      f"`{run.config.evaluation.best}`: `slimsam.evaluate` judges by others.",
      markdown_table(header, rows),
      "## Masks",
      "The first validation images, of each the largest object, found by the "
      "point drawn; numbers are the IoU with the true mask, in percent.",
      f"![Masks side by side]({MASKS})",
      "## Trainings",
      "\n".join(links),
    ]
  )
  _draw_masks(run, models)
  files.replace(run.folder / FILE_NAME, text + "\n")
  return str(run.folder / FILE_NAME)


def _draw_masks(run: Run, models: dict[str, Model]) -> None:
  asked = pictures.questions(run.valid, _PICTURES)
  with alone():
    found = {name: pictures.answers(own, asked) for name, own in models.items()}
  files.replace(run.folder / MASKS, pictures.draw(asked, found))


def _parts(run: Run, stages: list[str]) -> list[str]:
  return [*([] if run.config.teacher.path else ["teacher"]), *stages]


def _best(run: Run, name: str) -> tuple[dict[str, float], float]:
  """What was measured of the checkpoint that became the model, and the last
  update.
  """
  best = run.config.evaluation.best
  lines = [line for line in read_metrics(run.folder / name) if best in line]
  chosen = max(lines, key=lambda line: (line[best], -line["step"]))
  return chosen, lines[-1]["step"]


def _row(name: str, model: Model, found: dict[str, float]) -> tuple[str, ...]:
  macs = encoder_macs(model.settings.encoder)
  cells = []
  for key, _, form in _SHOWN:
    scale = 100 if key.startswith("miou") else 1
    cells.append(form.format(scale * found[key]) if key in found else "–")
  return (
    name,
    f"{count_params(model.encoder):,}",
    f"{macs.conv_linear / 1e9:.4g}",
    f"{macs.true / 1e9:.4g}",
    *cells,
  )
