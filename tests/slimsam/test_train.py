"""Runs: what they leave, how they go on, other devices, what they refuse."""

import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from common.checkpoint import checkpoint_steps, load_params
from common.errors import RunError, UserError
from common.places import taken
from configs.slimsam import get_config
from slimsam import parts, weights
from slimsam.data import PromptedExample, train_loader
from slimsam.evaluation import encode_image
from slimsam.keep import kept_units
from slimsam.model import Sam
from slimsam.preprocess import preprocess
from slimsam.run import Model, Run
from slimsam.settings import DecoderSettings, uniform
from slimsam.sources import make_source
from slimsam.stages import stage_of
from slimsam.teacher import make_loss_fn
from slimsam.train import check, train_and_evaluate

pytestmark = pytest.mark.usefixtures("compile_once")
CLOCK = ("time", "seconds", "speed/")


def tiny():
  """On all eight devices."""
  config = get_config("smoke")
  config.compile_cache = ""
  config.teacher.update({"num_steps": 2, "every": 1, "rows": 8})
  # A schedule would be compiled into the update of each parameter.
  config.teacher.optim.update({"schedule": "constant", "warmup_steps": 0})
  config.data.source.update({"length": 16})
  config.data.source.valid.length = 3
  config.importance.update({"images": 8, "rows": 8})
  config.evaluation.update({"images": 3, "prompts": ("point",)})
  config.evaluation.choices = ("single",)
  config.distill.epochs = 2  # of two updates
  config.checkpoint.update({"every": 3, "keep": 9})
  config.log.every = 1
  return config


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight")
  train_and_evaluate(tiny(), workdir)
  return workdir


def metrics(folder):
  """Every line but what the clock wrote, by step."""
  lines = {}
  for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().split("\n"):
    if line:
      values = json.loads(line)
      kept = {k: v for k, v in values.items() if not k.startswith(CLOCK)}
      lines.setdefault(kept.pop("step"), {}).update(kept)
  return lines


class Stopped(BaseException):
  """Ends a run between two steps, past everything that handles errors."""


class Stop:
  """A hook that stops after a step."""

  def __init__(self, step):
    self.every = {step}.__contains__

  def __call__(self, info):
    raise Stopped


def stop_after(monkeypatch, step, steps):
  """Stops the training that has so many steps after one of them."""
  real = parts.train

  def train(*args, hooks, num_steps, **kwargs):
    chosen = [*hooks, Stop(step)] if num_steps == steps else hooks
    return real(*args, hooks=chosen, num_steps=num_steps, **kwargs)

  monkeypatch.setattr(parts, "train", train)


def test_a_run_leaves_models_and_reports(straight):
  """Each training by itself, and the whole."""
  page = (straight / "report.md").read_text()
  rows = [line.split("|")[1].split(", update")[0].strip()
          for line in page.splitlines() if line.startswith("|")]  # fmt: skip
  assert rows[2:] == [
    "original", "step_1, pruned", "step_1, trained", "step_2, pruned",
    "step_2, trained",
  ]  # fmt: skip
  for name in ("teacher", "step_1", "step_2"):
    assert (straight / name / "report.md").exists()
    assert (straight / name / "model" / "params.npz").exists()
    assert f"({name}/report.md)" in page
  params, settings = weights.load_model(straight / "model")
  cfg = settings.encoder
  assert (cfg.width, set(cfg.qkv_widths), set(cfg.mlp_widths)) == (8, {8}, {16})
  chex.assert_trees_all_equal(weights.load_model(straight)[0], params)
  assert (straight / "masks.png").exists()
  hf, found = weights.load_model(straight / "model_hf")
  assert found.encoder == cfg
  chex.assert_trees_all_equal(hf, params)


def test_only_the_image_encoder_is_slimmed(straight):
  teacher, _ = weights.load_model(straight / "teacher" / "model")
  for name in ("step_1", "step_2"):
    params, _ = weights.load_model(straight / name / "model")
    for part in ("prompt_encoder", "mask_decoder"):
      chex.assert_trees_all_equal(params[part], teacher[part])


def test_what_was_measured_is_so(straight):
  """The embedding's error on held-out images, written out."""
  teacher, settings = weights.load_model(straight / "teacher" / "model")
  _, encoder = load_params(straight / "step_2" / "checkpoints", step=4)
  _, small = weights.load_model(straight / "step_2" / "model")
  errors = []
  for sample in make_source(tiny().data.source, "valid"):
    image = preprocess(sample.image, 32)[None]
    student = {**teacher, "image_encoder": encoder}
    a = encode_image(Sam(small), student, image)
    b = encode_image(Sam(settings), teacher, image)
    errors.append(np.mean(np.square(a - b)))
  found = metrics(straight / "step_2")[4]["valid/mse"]
  np.testing.assert_allclose(found, np.mean(errors[:3]), rtol=1e-4)


def test_the_best_checkpoint_becomes_the_model(straight):
  for name in ("teacher", "step_1", "step_2"):
    lines = metrics(straight / name)
    truth = "gt" if name == "teacher" else "teacher"
    key = f"miou/{truth}/point/single"
    best = max(
      (step for step in lines if key in lines[step]),
      key=lambda step: (lines[step][key], -step),
    )
    _, params = load_params(straight / name / "checkpoints", step=best)
    model, _ = weights.load_model(straight / name / "model")
    if name != "teacher":
      model = model["image_encoder"]
    chex.assert_trees_all_equal(model, params)


def test_stopped_twice_in_step_2_and_started_again(
  straight, tmp_path, monkeypatch
):
  """Bit for bit: state, plateau and metrics; what had finished is kept."""
  for name in ("teacher", "step_1"):
    shutil.copytree(straight / name, tmp_path / name)
  (tmp_path / "config.json").write_text((straight / "config.json").read_text())
  before = (tmp_path / "step_1" / "metrics.jsonl").stat().st_mtime_ns
  config = tiny()
  config.checkpoint.every = 1
  for step in (1, 3):
    with monkeypatch.context() as patch:
      stop_after(patch, step, steps=4)
      with pytest.raises(Stopped):
        train_and_evaluate(config, tmp_path)
    checkpoints = tmp_path / "step_2" / "checkpoints"
    assert checkpoint_steps(checkpoints)[-1] == step
    assert not (tmp_path / "step_2" / "model").exists()
  train_and_evaluate(config, tmp_path)
  for part in ("params", "state"):
    ours, theirs = (
      load_params(folder / "step_2" / "checkpoints", step=4, item=part)
      for folder in (straight, tmp_path)
    )
    chex.assert_trees_all_equal(ours, theirs)
  assert metrics(tmp_path / "step_2") == metrics(straight / "step_2")
  after = (tmp_path / "step_1" / "metrics.jsonl").stat().st_mtime_ns
  assert before == after
  assert (tmp_path / "report.md").read_text() == (
    straight / "report.md"
  ).read_text()


def write_coco(folder, name, counts):
  """Images with so many rectangles each; None: an annotation without mask."""
  rng = np.random.default_rng(len(counts))
  images, annotations = [], []
  for i, count in enumerate(counts):
    file = f"{name}{i}.png"
    images.append({"id": i, "file_name": file, "height": 24, "width": 32})
    pixels = rng.integers(0, 255, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / file)
    own = {"image_id": i, "iscrowd": 0}
    for k in range(count or 0):
      x, y = (int(n) for n in rng.integers(0, 12, 2))
      corners = [x, y, x + 9, y, x + 9, y + 8, x, y + 8]
      annotations.append(
        own | {"id": 9 * i + k, "segmentation": [corners], "bbox": [x, y, 9, 8]}
      )
    if count is None:
      annotations.append(own | {"id": 9 * i, "bbox": [1, 1, 5, 5]})
  path = folder / f"{name}.json"
  path.write_text(json.dumps({"images": images, "annotations": annotations}))
  return str(path)


def test_true_masks_may_rank_units(draw, tmp_path):
  """Of eight images four have masks; the others do not count."""
  settings = uniform(
    width=16, depth=1, heads=2, mlp_width=32, image_size=32, patch=8, window=2,
    global_blocks=(), out=16,
    decoder=DecoderSettings(
      heads=2, mlp_width=16, depth=1, iou_width=8, mask_channels=4
    ),
  )  # fmt: skip
  model, config = Model(draw(settings), settings), tiny()
  config.data.source.update({"kind": "coco", "on_error": "skip"})
  config.data.source.images_dir = str(tmp_path)
  config.data.source.json_path = write_coco(
    tmp_path, "train", (1, 0, 2, None, 4, 0, 0, 1)
  )
  config.data.source.valid.json_path = write_coco(tmp_path, "valid", (1,))
  config.importance.kind = "taylor"
  run, stage = Run(config, tmp_path / "run"), stage_of("step_2", "fixed")
  keep = kept_units(run, stage, model)

  example = PromptedExample(32, 4, config.teacher.prompts)
  with train_loader(run.train, example, rows=8, seed=config.seed) as loader:
    batch = next(loader)
  counted = batch["valid"].any(axis=1)
  assert list(counted[np.argsort(batch["ids"])]) == [1, 0, 1, 0, 1, 0, 0, 1]
  batch = {name: rows[counted] for name, rows in batch.items()}
  loss = make_loss_fn(Sam(settings))
  grads = jax.jit(jax.grad(lambda p: loss(p, batch, {})[1]["loss"].total))(
    model.params
  )
  found = jax.tree.map(lambda w, g: np.abs(w * g), model.params, grads)
  block = found["image_encoder"]["blocks"]["0"]
  attn, mlp = block["attn"], block["mlp"]
  expected = {
    "mlp/0": mlp["lin1"]["kernel"].sum(0) + mlp["lin2"]["kernel"].sum(1),
    "qkv/0": attn["qkv"]["kernel"].sum((0, 1, 2))
    + attn["proj"]["kernel"].sum((0, 2)),
  }
  assert keep.keys() == expected.keys()
  for name, scores in expected.items():
    best = np.argsort(-scores)[: len(scores) // 2]
    assert list(keep[name]) == sorted(best)


def test_scores_that_are_not_finite_choose_nothing(straight, tmp_path):
  config = tiny()
  run, stage = Run(config, tmp_path), stage_of("step_1", "fixed")
  model = Model.load(straight / "teacher" / "model")
  model.encoder["pos_embed"][0, 0, 0, 0] = np.nan
  with pytest.raises(RunError, match=r"scores of embedding are not finite"):
    kept_units(run, stage, model)
  assert not (tmp_path / "step_1" / "keep.json").exists()


def test_another_configuration_is_refused(straight):
  config = tiny()
  config.prune.ratio = 0.25
  with pytest.raises(UserError, match=r"prune\.ratio"):
    train_and_evaluate(config, straight)


def test_a_run_at_work_keeps_its_configuration(tmp_path):
  """Also before its first training has a folder."""
  Run(tiny(), tmp_path)
  before = (tmp_path / "config.json").read_text()
  changed = tiny()
  changed.distill.optim.lr *= 2
  with taken(tmp_path), pytest.raises(UserError, match="a run is at work in"):
    train_and_evaluate(changed, tmp_path)
  assert (tmp_path / "config.json").read_text() == before


def test_a_run_needs_a_folder():
  with pytest.raises(UserError, match=r"gs://bucket/run: .* need a folder"):
    train_and_evaluate(tiny(), "gs://bucket/run")


@pytest.mark.parametrize(
  "left", ["step_1/keep.json", "targets/targets.json", "step_1/checkpoints/1"]
)
def test_what_has_begun_keeps_its_configuration(tmp_path, left):
  """Also before the first checkpoint: units were chosen by it."""
  Run(tiny(), tmp_path)
  (tmp_path / left).parent.mkdir(parents=True)
  (tmp_path / left).write_text("{}")
  changed = tiny()
  changed.prune.ratio = 0.25
  with pytest.raises(UserError, match=r"prune\.ratio"):
    Run(changed, tmp_path)
  Run(tiny(), tmp_path)


MISTAKES = [
  ({"importance.kind": "disturbd"}, "did you mean 'disturbed'"),
  ({"distill.preset": "papr"}, "did you mean 'paper'"),
  ({"distill.stages": ("step_3",)}, "stage 'step_3'"),
  ({"distill.stages": ()}, "stages is empty"),
  ({"distill.stages": ("step_2", "step_1")}, "distill.stages=.*one of"),
  ({"distill.stages": ("step_1", "step_1")}, "distill.stages=.*one of"),
  ({"distill.accum": 3}, "distill.accum=3 must divide data.rows=8"),
  ({"distill.optim.name": "adamx"}, "did you mean 'adam"),
  ({"prune.scope": "globl"}, "prune.scope='globl'; did you mean 'global'"),
  ({"prune.normalization": "gauss"}, "did you mean 'gaussian'"),
  ({"prune.rel_pos": "zeros"}, "did you mean 'zero'"),
  ({"prune.ratio": 1.5}, "prune.ratio=1.5"),
  ({"prune.ratio": 0.95}, "prune.ratio=0.95 leaves nothing"),
  ({"importance.sigma": 0.0}, "importance.sigma=0.0 must be above 0"),
  ({"evaluation.choices": ("orcle",)}, "did you mean 'oracle'"),
  ({"evaluation.prompts": ("box",)}, "evaluation.best=.*is not measured"),
  ({"evaluation.best": "valid/mse"}, "evaluation.best='valid/mse' is not"),
  ({"prune.scope": "global"}, "export='hf' holds blocks of one width"),
  ({"distill.stages": ("step_1",)}, "export='hf' holds blocks of one width"),
  ({"distill.dtype": "float16"}, "distill.dtype='float16'"),
  ({"export": ("onnx",)}, "export='onnx'"),
  ({"distill.epochs": 0}, "distill.epochs=0 must be at least 1"),
  ({"evaluation.every": 0}, "evaluation.every=0 must be at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_answered_before_anything_is_read(changes, message):
  config = tiny()
  with config.unlocked():
    for key, value in changes.items():
      config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=message) as error:
    check(config)
  assert "\n" not in str(error.value)
