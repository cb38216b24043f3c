"""`python -m udim.evaluate --run runs/udim-train`: a trained run by domain."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from common import app
from common.flags import Parser

EXAMPLE = "python -m udim.evaluate --run runs/udim-train"
_MEANS = {
  "val": "over the sources' held-out parts",
  "target": "over the targets without their held-out parts",
  "reference": "over images like the sources'",
}


def main() -> None:
  """Prints the accuracy on every domain of a run, or of other images."""
  parser = Parser(
    "udim.evaluate",
    description="Accuracy of a trained model by domain.",
    example=EXAMPLE,
  )
  parser.add_argument("--run", required=True, help="a training's folder")
  parser.add_argument(
    "--step",
    default="best",
    help="which checkpoint: best (the default; by the sources' held-out "
    "images), last, or a number",
  )
  parser.add_argument(
    "--folder",
    default="",
    help="images of your own, FOLDER/domain/class/image, in place of the run's "
    "data; domains called like sources of the run count as such",
  )
  parser.add_argument("--batch_size", type=int, default=0, help="0: the run's")
  parser.add_argument("--json", action="store_true", help="print JSON")
  args = parser.parse_args()
  if args.step not in ("best", "last") and not args.step.isdigit():
    parser.error(f"--step={args.step!r} must be best, last or a number")

  run = load_run(args.run, step=args.step)
  if args.batch_size:
    run.config.evaluation.batch_size = args.batch_size
  scores = evaluate_run(run, folder=args.folder)
  print(_json(run, scores) if args.json else _table(run, scores))


class TrainedRun(NamedTuple):
  """A trained classifier, ready to use.

  Attributes:
    step: which checkpoint was read.
    config: of the training.
    classes: names; label k is `classes[k]`.
    image_shape: [height, width, channels] that it was trained on.
    sources: the domains that it was trained on.
    apply_fn: see `udim.models.make_apply_fn`.
    params, batch_stats: its variables.
  """

  step: int
  config: Any
  classes: tuple[str, ...]
  image_shape: list[int]
  sources: tuple[str, ...]
  apply_fn: Any
  params: Any
  batch_stats: Any


def load_run(run_dir: str | os.PathLike, *, step: str = "best") -> TrainedRun:
  """Reads a training's folder.

  Args:
    run_dir: what training was given as `--workdir`.
    step: "best" (of the checkpoints kept, by the sources' held-out images; of
      averaged weights the last), "last", or a number.

  Raises:
    UserError: when the folder is missing or holds no such checkpoint.
  """
  import jax
  import jax.numpy as jnp

  from common.checkpoint import load_params
  from common.config import load_config
  from common.errors import UserError
  from udim.models import make_apply_fn, make_model

  config = load_config(run_dir)
  if "algorithm" not in config:
    raise UserError(f"{run_dir} holds a run of another kind, not of udim.main")
  if (_path(run_dir) / "runs").exists():
    raise UserError(
      f"{run_dir} holds a comparison, not a training: name one of its runs, "
      "whose models --config.compare.keep_checkpoints=true keeps"
    )
  facts = json.loads((_path(run_dir) / "facts.json").read_text())
  folder = os.path.join(run_dir, "checkpoints")
  chosen = None if step == "last" else int(step) if step.isdigit() else None
  if step == "best" and not config.algorithm.endswith("+swad"):
    chosen = _best_step(run_dir, folder)
  found, params = load_params(folder, step=chosen)
  _, state = load_params(folder, step=found, item="state")
  stats = state["extra"].get("batch_stats") or {}
  model = make_model(config.model, len(facts["classes"]))
  params, stats = jax.tree.map(jnp.asarray, (params, stats))
  return TrainedRun(
    found, config, tuple(facts["classes"]), facts["image_shape"],
    tuple(facts["sources"]), make_apply_fn(model), params, stats,
  )  # fmt: skip


def _path(run_dir: str | os.PathLike) -> Any:
  from etils import epath

  return epath.Path(run_dir)


def _best_step(run_dir: str | os.PathLike, folder: str) -> int | None:
  """Of the checkpoints that are there; None without evaluations."""
  from common.checkpoint import checkpoint_steps
  from common.metrics import read_metrics
  from udim.selection import best, source_view

  kept = set(checkpoint_steps(folder))
  lines = [
    line
    for line in read_metrics(run_dir)
    if line["step"] in kept and source_view(line)
  ]
  return int(lines[best(lines, source_view)]["step"]) if lines else None


def evaluate_run(run: TrainedRun, *, folder: str = "") -> dict[str, Any]:
  """Scores on all parts of the run's data, or on a folder of images.

  Args:
    run: from `load_run`.
    folder: a tree domain/class/image with the run's classes. A domain that is
      called like a source of the run counts as one, not as a target.

  Returns:
    `role_part/domain` -> `udim.scores.Score`; see `udim.scores.make_parts`.

  Raises:
    UserError: for data that is missing, or of other classes.
  """
  from udim.scores import Evaluator, make_parts
  from udim.splits import RunSplits, Split, split_run
  from udim.train import chosen_run

  config = run.config
  if folder:
    domains = _own_images(run, folder).domains
    # Nothing of them is held out.
    parts = tuple(Split(d.name, d, d.select([])) for d in domains)
    seen = tuple(part for part in parts if part.name in run.sources)
    new = tuple(part for part in parts if part.name not in run.sources)
    splits = RunSplits(sources=seen, targets=new, references=())
  else:
    from udim.domains import load_domains

    domain_set = load_domains(config.data.source)
    splits = split_run(
      domain_set,
      chosen_run(config, domain_set),
      trial_seed=config.trial_seed,
      holdout=config.data.holdout,
    )
  evaluator = Evaluator(run.apply_fn, make_parts(config, splits))
  return evaluator(run.params, run.batch_stats)


def _own_images(run: TrainedRun, folder: str) -> Any:
  from common.errors import UserError
  from udim.augment import make_transform
  from udim.domains import load_domains

  source = run.config.data.source.copy_and_resolve_references()
  source.update({"kind": "folder", "path": folder, "duplicates": ""})
  found = load_domains(source)
  if found.classes != run.classes:
    raise UserError(
      f"--folder={folder}: the classes are {', '.join(found.classes)}, but the "
      f"model knows {', '.join(run.classes)}: name the folders like these"
    )
  first = found.domains[0][0]["image"]
  shape = list(make_transform(run.config.data).evaluate(first).shape)
  if shape != run.image_shape:
    raise UserError(
      f"--folder={folder}: an image is {shape} to the network, which was "
      f"trained on {run.image_shape}: set data.image_size in training, and "
      "bring as many channels"
    )
  return found


def _table(run: TrainedRun, scores: Mapping[str, Any]) -> str:
  from udim.scores import summary

  means = summary(scores)
  lines = [f"checkpoint of step {run.step}", ""]
  width = max(map(len, scores))
  lines.append(f"{'part':{width}s}  accuracy    loss  images")
  for name, one in scores.items():
    lines.append(
      f"{name:{width}s}  {100 * one.accuracy:6.2f} %  {one.loss:6.3f}  "
      f"{one.count:6d}"
    )
  for title in _MEANS:
    if f"{title}/accuracy" in means:
      value = 100 * means[f"{title}/accuracy"]
      lines.append(f"mean {title}: {value:.2f} % ({_MEANS[title]})")
  return "\n".join(lines)


def _json(run: TrainedRun, scores: Mapping[str, Any]) -> str:
  parts = {
    name: {"accuracy": one.accuracy, "loss": one.loss, "count": one.count}
    for name, one in scores.items()
  }
  return json.dumps({"step": run.step, "parts": parts}, indent=2)


if __name__ == "__main__":
  app.run_alone(main)
