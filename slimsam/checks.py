"""What a configuration may say; refused before any data are read."""

from collections.abc import Iterable
from typing import Any

from common.config import did_you_mean, flatten
from common.errors import UserError
from common.optim import make_optimizer
from common.weights import check_safetensors
from slimsam.encoder import DTYPES
from slimsam.evaluation import CHOICES, PROMPTS
from slimsam.importance import needs_gradients
from slimsam.prune import REL_POS
from slimsam.select import NORMALIZATIONS, SCOPES, kept_width
from slimsam.stages import Stage, stage_of
from slimsam.weights import FORMS

ORDERS = (("step_1", "step_2"), ("one_step",), ("step_1",), ("step_2",))
_LEAST = {
  "teacher.num_steps": 1, "teacher.rows": 1, "teacher.prompts": 1,
  "teacher.every": 1, "data.rows": 1, "data.images": 0, "data.workers": 0,
  "data.threads": 0, "data.prefetch": 0, "data.memory": 0,
  "importance.images": 1, "importance.rows": 1, "prune.min_keep": 1,
  "distill.epochs": 1, "distill.patience": 0, "distill.accum": 1,
  "evaluation.images": 0, "evaluation.every": 1, "log.every": 1,
  "checkpoint.every": 1, "checkpoint.keep": 1, "profile.start": 0,
  "profile.count": 0,
}  # fmt: skip
_KNOWN = {
  "distill.dtype": tuple(DTYPES),
  "distill.teacher_dtype": tuple(DTYPES),
  "prune.scope": SCOPES,
  "prune.normalization": NORMALIZATIONS,
  "prune.rel_pos": REL_POS,
}


def check(config: Any) -> list[Stage]:
  """The stages of a configuration.

  Raises:
    UserError: names the key.
  """
  flat = flatten(config)
  for key, least in _LEAST.items():
    if flat[key] < least:
      raise UserError(f"{key}={flat[key]} must be at least {least}")
  for key, known in _KNOWN.items():
    _one_of(key, [flat[key]], known)
  needs_gradients(config.importance.kind)
  if not config.importance.sigma > 0:
    raise UserError(
      f"importance.sigma={config.importance.sigma} must be above 0: without "
      "noise every score is 0"
    )
  cfg = config.distill
  if config.data.rows % cfg.accum:
    raise UserError(
      f"distill.accum={cfg.accum} must divide data.rows={config.data.rows}"
    )
  make_optimizer(config.teacher.optim.to_dict(), config.teacher.num_steps)
  make_optimizer(cfg.optim.to_dict(), 2**31)  # how many steps, the data say
  _check_widths(config)
  _check_evaluation(config)
  stages = _stages(cfg)
  _check_export(config)
  return stages


def check_local(workdir: Any) -> None:
  """Refuses an address: models and records are files of this machine.

  Raises:
    UserError: names it.
  """
  if "://" in str(workdir):
    raise UserError(
      f"{workdir}: SlimSAM's runs need a folder; mount the bucket, or copy the "
      "run there when it has finished"
    )


def _one_of(key: str, given: Iterable[str], known: Iterable[str]) -> None:
  for name in given:
    if name not in known:
      raise UserError(f"{key}={name!r}{did_you_mean(str(name), known)}")


def _check_widths(config: Any) -> None:
  teacher = config.teacher
  widths = () if teacher.path else (teacher.width, teacher.mlp_width)
  for width in widths or (2**20,):
    try:
      kept_width(width, config.prune.ratio, teacher.heads)
    except UserError as error:
      raise UserError(f"prune.{error}") from None


def _check_evaluation(config: Any) -> None:
  cfg = config.evaluation
  _one_of("evaluation.prompts", cfg.prompts, PROMPTS)
  _one_of("evaluation.choices", cfg.choices, CHOICES)
  measured = [f"miou/gt/{p}/{c}" for p in cfg.prompts for c in cfg.choices]
  if "single" in cfg.choices:
    measured += [f"miou/teacher/{p}/single" for p in cfg.prompts]
  if cfg.best not in measured:
    raise UserError(
      f"evaluation.best={cfg.best!r} is not measured"
      f"{did_you_mean(cfg.best, measured)}"
    )


def _stages(cfg: Any) -> list[Stage]:
  if not cfg.stages:
    raise UserError("distill.stages is empty: name step_1, step_2 or one_step")
  made = [
    stage_of(name, cfg.preset, intermediate=cfg.intermediate)
    for name in cfg.stages
  ]
  if tuple(cfg.stages) not in ORDERS:
    orders = ", ".join(map(str, ORDERS))
    raise UserError(f"distill.stages={tuple(cfg.stages)}: one of {orders}")
  return made


def _check_export(config: Any) -> None:
  _one_of("export", config.export, FORMS)
  if "hf" in config.export:
    check_safetensors("export='hf'")
  for form in ("hf", "pth"):
    if form not in config.export:
      continue
    for key, value, fits in (
      ("prune.scope", config.prune.scope, ("local",)),
      ("distill.stages", tuple(config.distill.stages), ORDERS[:2]),
    ):
      if value not in fits:
        raise UserError(
          f"export={form!r} holds blocks of one width, that of the embedding, "
          f"and {key}={value!r} leaves others: export 'native' alone, and pad "
          "it afterwards with slimsam.convert --pad"
        )
