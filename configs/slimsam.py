"""SlimSAM: Segment Anything, pruned and distilled in turn.

Variants, to be combined with commas (`configs/slimsam.py:vit_b_77,one_step`):

  (none)      trains a small teacher on composited photographs, then slims it:
              minutes on a laptop
  smoke       the same code path in a minute or two
  small       to compare ways to slim on: see `slimsam.compare`
  vit_b_50, vit_b_77, vit_h_77
              Segment Anything on SA-1B at the published settings; give
              `--config.teacher.path` and `--config.data.source.path`

  and how to slim:

  paper       the losses as the paper writes them
  reference   those of the authors' code, with what it gets wrong
  one_step    everything is pruned at once: the baseline
  global      bottlenecks of all blocks are ranked together
"""

from ml_collections import ConfigDict

from common.config import apply_variants


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration; `arg` names variants."""
  config = ConfigDict()
  config.seed = 0
  config.compile_cache = "~/.cache/tetrad/xla"  # "" switches it off

  # Devices along each axis; -1 takes what is left.
  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "model": 1})

  config.teacher = _teacher()
  config.data = _data()
  config.importance = _importance()
  config.prune = _prune()
  config.distill = _distill()

  config.evaluation = ConfigDict()
  config.evaluation.images = 50  # 0: all of the validation split
  config.evaluation.prompts = ("point", "center", "box")
  config.evaluation.choices = ("single", "best", "oracle")
  # Decides which checkpoint is kept and when the learning rate is halved:
  # miou/gt/… by true masks, miou/teacher/… by the teacher's, for which no mask
  # need be true.
  config.evaluation.best = "miou/teacher/point/single"
  config.evaluation.every = 1  # epochs

  config.compare = _compare()

  config.export = ("native", "hf")  # what the end leaves, of native, hf, pth

  config.log = ConfigDict({"every": 20, "tensorboard": False})
  config.checkpoint = ConfigDict({"every": 500, "keep": 1})
  config.profile = ConfigDict({"start": 20, "count": 0})  # 0 steps: none

  return apply_variants(config, arg, VARIANTS)


def _teacher() -> ConfigDict:
  """Where the teacher comes from."""
  config = ConfigDict()
  # A .pth of segment-anything, a folder of transformers or of ours; "" trains
  # a small one of these sizes.
  config.path = ""
  config.image_size = 64
  config.patch = 8
  config.width = 48
  config.depth = 4
  config.heads = 4
  config.mlp_width = 192
  config.window = 4
  config.global_blocks = (1, 3)
  config.out = 64  # of the image embedding
  config.decoder_heads = 8
  config.decoder_mlp_width = 256

  config.num_steps = 2000
  config.rows = 16
  config.prompts = 3  # of each image in a batch
  config.every = 500  # updates between two evaluations
  config.optim = _optim(lr=2e-3, schedule="cosine", warmup_steps=100)
  return config


def _data() -> ConfigDict:
  config = ConfigDict()
  config.source = ConfigDict()
  # sa1b | tfds | coco | folder | bundled | composite | crops; see
  # `slimsam.sources.make_source`. The teacher learns from it too.
  config.source.kind = "composite"
  config.source.length = 4000  # composite, crops
  config.source.size = 64
  config.source.seed = 0
  config.source.objects = (1, 4)
  config.source.path = ""  # sa1b, folder
  config.source.data_dir = ""  # tfds
  config.source.images_dir = ""  # coco
  config.source.json_path = ""
  config.source.start = 0
  config.source.limit = 0
  config.source.on_error = "error"  # error | skip
  config.source.max_pixels = 0  # of an image file; 0: 179 million
  config.source.follow_links = False  # that lead out of a folder of data
  config.source.valid = ConfigDict(
    {"kind": "", "length": 100, "path": "", "json_path": "", "images_dir": "",
     "start": 0, "limit": 0}
  )  # fmt: skip
  config.rows = 4  # images of an update
  config.images = 160  # slimming uses so many: very little; 0: all
  config.workers = 0  # processes that make batches; 0: one thread
  config.threads = 0  # that decode the images of a batch
  config.prefetch = 2
  config.memory = 256  # megabytes of images kept in memory, in each process
  return config


def _importance() -> ConfigDict:
  """See `slimsam.importance`."""
  config = ConfigDict()
  # disturbed | disturbed_sq | taylor | magnitude | random
  config.kind = "disturbed"
  config.images = 160  # the first ones
  config.rows = 8
  config.sigma = 0.01
  return config


def _prune() -> ConfigDict:
  """See `slimsam.prune` and `slimsam.select`."""
  config = ConfigDict()
  config.ratio = 0.5  # of every width
  config.scope = "local"  # local | global, of bottlenecks
  # gaussian | standard | max | mean | sum, of global
  config.normalization = "gaussian"
  config.min_keep = 1  # units of a block, of global
  config.by_residue = False  # embedding: as the authors' code ranks channels
  config.rel_pos = "slice"  # slice | zero
  config.fold_scale = True
  return config


def _distill() -> ConfigDict:
  """See `slimsam.stages` and `slimsam.distill`."""
  config = ConfigDict()
  config.stages = ("step_1", "step_2")  # or one_step
  config.epochs = 15  # of each stage
  config.preset = "fixed"  # fixed | paper | reference
  config.intermediate = True  # False: image embeddings alone are compared
  # Evaluations without a gain that are borne before the rate is halved.
  config.patience = 3
  config.accum = 1  # micro-batches an update
  config.dtype = "float32"  # of the student's computation
  config.teacher_dtype = "float32"
  config.cache_targets = False  # the teacher's embeddings: found once, on disk
  config.remat = False  # of plain epochs; compared features always are
  config.optim = _optim(lr=1e-3, schedule="constant")
  return config


def _optim(**changes) -> ConfigDict:
  """See `common.optim.make_optimizer`."""
  config = ConfigDict()
  config.name = "adamw"
  config.lr = 1e-3
  config.schedule = "constant"
  config.warmup_steps = 0
  config.final_ratio = 0.0
  config.b1 = 0.9
  config.b2 = 0.999
  config.eps = 1e-8
  config.momentum = 0.9  # sgd
  config.nesterov = False  # sgd
  config.weight_decay = 0.0
  config.decay = "decoupled"  # decoupled | coupled
  config.clip_norm = 0.0
  config.update(changes)
  return config


def _compare() -> ConfigDict:
  """What `python -m slimsam.compare` runs."""
  config = ConfigDict()
  config.systems = (
    "alternate, one_step, disturbed_sq, taylor, magnitude, random, "
    "no_intermediate, global, paper, reference, ratio_30, ratio_40, ratio_60, "
    "ratio_70, ratio_80, ratio_90, one_step_80, magnitude_80, random_80, "
    "global_80"
  )
  config.seeds = 3
  config.first_seed = 0
  config.baseline = "alternate"  # of a column of differences
  # Validation images after those of `evaluation.images`.
  config.test_images = 200
  config.pictures = 5  # images whose masks are drawn
  config.keep_checkpoints = False
  # What makes each system of the configuration: `key=value`, `key*=number`.
  at_80 = "prune.ratio=0.8"
  one_step = ("distill.stages=('one_step',)", "distill.epochs*=2")
  config.settings = ConfigDict(
    {
      "alternate": (),
      "one_step": one_step,
      "disturbed_sq": ("importance.kind=disturbed_sq",),
      "taylor": ("importance.kind=taylor",),
      "magnitude": ("importance.kind=magnitude",),
      "random": ("importance.kind=random",),
      "no_intermediate": ("distill.intermediate=False",),
      "global": ("prune.scope=global",),
      "paper": ("distill.preset=paper",),
      "reference": (
        "distill.preset=reference",
        "prune.by_residue=True",
        "prune.rel_pos=zero",
        "prune.fold_scale=False",
      ),
      **{f"ratio_{n}": (f"prune.ratio={n / 100}",)
         for n in (30, 40, 60, 70, 80, 90)},
      "one_step_80": (*one_step, at_80),
      "magnitude_80": ("importance.kind=magnitude", at_80),
      "random_80": ("importance.kind=random", at_80),
      "global_80": ("prune.scope=global", at_80),
    }
  )  # fmt: skip
  return config


def _epochs(config: ConfigDict, epochs: int) -> None:
  """Of each stage; a single one has as many as two."""
  stages = config.distill.stages
  config.distill.epochs = epochs * (2 if stages == ("one_step",) else 1)


def smoke(config: ConfigDict) -> None:
  """The same code path in a minute or two."""
  config.teacher.update({"width": 16, "depth": 2, "heads": 2, "mlp_width": 32})
  config.teacher.update({"image_size": 32, "global_blocks": (1,), "out": 16})
  config.teacher.update({"decoder_heads": 2, "decoder_mlp_width": 32})
  config.teacher.update({"num_steps": 12, "rows": 8, "every": 6})
  config.teacher.optim.warmup_steps = 4
  config.data.source.update({"length": 40, "size": 32})
  config.data.source.valid.length = 10
  config.data.update({"rows": 8, "images": 16})
  config.importance.update({"images": 16})
  _epochs(config, 3)
  config.evaluation.images = 6
  config.compare.update({"test_images": 4, "pictures": 2})
  config.log.every = 2


def small(config: ConfigDict) -> None:
  """Small enough to be run many times, with images to test on."""
  config.data.source.valid.length = 250
  _epochs(config, 12)
  config.evaluation.update({"images": 30, "every": 2})
  config.evaluation.prompts = ("point", "box")
  config.evaluation.best = "miou/gt/point/single"


def _published(ratio: float, epochs: int, teacher: str):
  """The settings of the paper, section 4.1, and of the authors' code."""

  def variant(config: ConfigDict) -> None:
    config.teacher.path = teacher
    config.data.source.update({"kind": "sa1b", "path": "SA1B/train"})
    config.data.source.valid.path = "SA1B/valid"
    config.data.update({"rows": 4, "images": 10_000, "threads": 8})
    config.importance.update({"images": 1000, "rows": 4})
    config.prune.ratio = ratio
    _epochs(config, epochs)
    config.distill.remat = True
    config.distill.optim.update({"lr": 1e-4, "schedule": "constant"})
    config.evaluation.update({"images": 50, "best": "miou/gt/point/single"})
    config.log.every = 100

  return variant


def paper(config: ConfigDict) -> None:
  """The losses as the paper writes them; the rate is halved after 4 epochs."""
  config.distill.preset = "paper"


def reference(config: ConfigDict) -> None:
  """The authors' code: its losses, its ranking, its lost positions. It halves
  the rate of step 2 one epoch later: `distill.patience=4`.
  """
  config.distill.preset = "reference"
  config.prune.update({"by_residue": True, "rel_pos": "zero"})
  config.prune.fold_scale = False


def one_step(config: ConfigDict) -> None:
  """Everything is pruned at once, with as many epochs as the two steps have."""
  config.distill.stages = ("one_step",)
  config.distill.epochs = 2 * config.distill.epochs


def global_(config: ConfigDict) -> None:
  """Bottlenecks of all blocks are ranked together."""
  config.prune.scope = "global"
  config.export = ("native",)


VARIANTS = {
  "smoke": smoke,
  "small": small,
  "vit_b_50": _published(0.5, 20, "sam_vit_b_01ec64.pth"),
  "vit_b_77": _published(0.77, 40, "sam_vit_b_01ec64.pth"),
  "vit_h_77": _published(0.77, 40, "sam_vit_h_4b8939.pth"),
  "paper": paper,
  "reference": reference,
  "one_step": one_step,
  "global": global_,
}
