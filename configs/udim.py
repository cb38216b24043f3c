"""UDIM and its peers on images in several domains.

Variants, to be combined with commas (`configs/udim.py:digits_c,smoke`):

  (none)      UDIM against SAM and ERM, digits from one source domain: compares
              them over three seeds in minutes on a laptop
  smoke       the same code path in less than a minute
  train       one training instead of a comparison
  digits_c    clean digits to train on, 8 corruptions x 5 severities to test
  digits_rot  digits at six angles, each in turn left out; few sources too
  digits_color  digits whose colour betrays the label
  cifar10c    CIFAR-10 to train on, CIFAR-10-C to test, WideResNet-28-2
  paper       the published settings on PACS, which are pacs
  pacs, vlcs, officehome, terraincognita, domainnet
              DomainBed's folders, ResNet-50, published settings
  single_source
              each domain in turn trains, all others test

From `cifar10c` on a variant trains one run; `python -m udim.compare` makes the
table.
"""

from ml_collections import ConfigDict

from common.config import apply_variants


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration; `arg` names variants."""
  config = ConfigDict()
  config.mode = "compare"  # train | compare
  config.seed = 0  # of initial weights, batches and dropout
  config.trial_seed = 0  # of the split of each domain
  config.num_steps = 500
  config.accum = 1  # micro-batches a step
  config.compile_cache = "~/.cache/tetrad/xla"  # "" switches it off

  # Devices along each axis; -1 takes what is left.
  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "model": 1, "seq": 1})

  # Which domains train and which test: leave_one_out | single_source | chosen.
  config.protocol = "chosen"
  config.sources = ()  # names; () stands for all
  config.targets = ()
  config.sources_limit = 0  # leave_one_out: how many train; 0: all others
  config.run = ""  # which run of the protocol to train; "": its first

  config.data = _data()
  config.model = _model()

  # erm | mixup | coral | groupdro | irm | fishr | sam | asam | fisher_sam |
  # gsam | sagm | gam | look_sam | esam | udim | perturbed_loss |
  # perturbed_sam; "+swad" behind a name averages its weights.
  config.algorithm = "udim"
  config.methods = _methods()
  config.label_smoothing = 0.0
  config.share_dropout = True  # one dropout mask for all passes of a step
  config.swad = ConfigDict(
    {"n_converge": 3, "n_tolerance": 6, "tolerance_ratio": 0.3}
  )
  config.optim = _optim()

  config.evaluation = ConfigDict({"every": 50, "batch_size": 512})
  config.log = ConfigDict({"every": 25, "tensorboard": False})
  # 0: at the end only.
  config.checkpoint = ConfigDict({"every": 0, "keep": 1, "keep_best": True})
  config.profile = ConfigDict({"start": 20, "count": 0})  # 0 steps: none

  config.compare = _compare()
  config.search = _search()
  return apply_variants(config, arg, VARIANTS)


def _data() -> ConfigDict:
  config = ConfigDict()
  config.source = ConfigDict()
  # digits_c | digits_rot | digits_color | cifar10c | folder | tfds; see
  # `udim.domains.load_domains`.
  config.source.kind = "digits_c"
  config.source.seed = 0  # digits: of order, noise and places
  config.source.path = ""  # cifar10c, folder
  config.source.clean_path = ""  # cifar10c: CIFAR-10's own files
  config.source.corruptions = ()  # digits_c, cifar10c; () stands for all
  config.source.severities = (1, 2, 3, 4, 5)
  config.source.duplicates = ""  # folder: a list of images to leave out
  config.source.unreadable = "error"  # folder: error | skip
  config.source.max_pixels = 0  # folder: of an image; 0: 179 million
  config.source.follow_links = False  # folder: links that lead out of it
  config.source.threads = 8  # folder: that look through the images at first
  config.source.names = ()  # tfds: a data set for each domain
  config.source.split = "train"  # tfds
  config.source.data_dir = ""  # tfds
  config.source.image_key = "image"  # tfds
  config.source.label_key = "label"  # tfds
  config.image_size = 0  # 0: as stored
  config.augment = "none"  # none | crop_flip | domainbed
  config.statistics = "none"  # none | imagenet | cifar10
  config.images_per_domain = 64  # of each source domain, in a batch
  config.holdout = 0.2  # the share of each domain that selects models
  config.workers = 0  # processes that make batches; 0: one thread
  config.threads = 0  # of grain, that decode the images of a batch
  config.prefetch = 2
  return config


def _model() -> ConfigDict:
  """See `udim.models`."""
  config = ConfigDict()
  config.name = "cnn"  # cnn | wrn28_K | resnet18 | resnet50 | vit_s16 | vit_b16
  config.pretrained = ""  # a .safetensors or .pth file
  config.dropout = 0.0  # of the features
  config.block_dropout = 0.0  # wrn28_K and the ViTs
  config.batch_norm = "frozen"  # frozen | update
  config.dtype = "float32"  # of the computation
  config.remat = False
  return config


def _methods() -> ConfigDict:
  """The settings of each algorithm."""
  config = ConfigDict()
  config.mixup = ConfigDict({"alpha": 0.2})
  config.coral = ConfigDict({"weight": 1.0})
  config.groupdro = ConfigDict({"eta": 0.01})
  config.irm = ConfigDict({"weight": 100.0, "anneal_steps": 100})
  config.fishr = ConfigDict(
    {"weight": 1000.0, "anneal_steps": 100, "ema": 0.95}
  )
  config.sam = ConfigDict({"rho": 0.05})
  config.asam = ConfigDict({"rho": 0.5, "eta": 0.01})
  config.fisher_sam = ConfigDict({"rho": 0.1, "eta": 1.0})
  config.gsam = ConfigDict({"rho": 0.05, "alpha": 0.2})
  config.sagm = ConfigDict({"rho": 0.05, "alpha": 0.001})
  config.gam = ConfigDict(
    {"rho": 0.05, "rho_prime": 0.05, "beta0": 0.1, "beta1": 0.1, "gamma": 0.05}
  )
  config.look_sam = ConfigDict({"rho": 0.05, "k": 5, "alpha": 0.7})
  config.esam = ConfigDict(
    {"rho": 0.05, "weight_fraction": 0.6, "data_fraction": 0.5}
  )
  config.udim = _udim()
  # With rho_x = 1: values known to do well on Digits-C, so a table that tunes
  # nothing is no test of the method there.
  config.udim.lambda1 = 10.0
  config.udim.terms = ("pen", "norm")
  config.udim.detach_source = False
  config.udim.domain_reduce = "sum"  # sum | mean, over source domains
  config.udim.reference_quirks = False
  for control in ("perturbed_loss", "perturbed_sam"):
    config[control] = _udim()
    config[control].lambda1 = 1.0
  return config


def _udim() -> ConfigDict:
  """What UDIM and its control share; see `udim.settings.UdimConfig`."""
  config = ConfigDict()
  config.rho = 0.05
  config.rho_x = 1.0  # length of each image's perturbation
  config.normalise = "sample"  # sample | batch | sign
  config.data_grad = "fast"  # fast | exact | plain
  config.clip_range = (0.0, 1.0)  # of valid images; () for none
  config.perturbation = "pixel"  # pixel | style
  config.every = 1
  config.term_images = 0  # of each domain's images in the term; 0: all
  config.warm_up_percent = 20.0  # of the run: SAM alone
  config.warm_up_best = True  # go on from the best of the warm-up
  return config


def _optim() -> ConfigDict:
  """See `common.optim.make_optimizer`."""
  config = ConfigDict()
  config.name = "adamw"
  config.lr = 2e-3
  config.schedule = "constant"
  config.warmup_steps = 0
  config.final_ratio = 0.0
  config.b1 = 0.9
  config.b2 = 0.999
  config.eps = 1e-8
  config.momentum = 0.9  # sgd
  config.nesterov = False  # sgd
  config.weight_decay = 1e-4
  config.decay = "decoupled"  # decoupled | coupled
  config.no_decay = (r"(^|/)bias$",)  # regexes of parameters
  config.frozen = ()
  config.clip_norm = 0.0
  return config


def _compare() -> ConfigDict:
  """Which algorithms a comparison runs; see `udim.compare`."""
  config = ConfigDict()
  # Algorithms, or names of `variants`, separated by commas.
  config.algorithms = "erm,sam,udim"
  config.seeds = 3  # runs of each
  config.first_seed = 0
  config.references = "erm,sam"  # what the others are compared with, in pairs
  config.landscape = True  # sharpness and loss lines of every run
  config.landscape_images = 1024  # at most, of sources and of targets
  config.image_distance = 1.0  # L2, that their images move; lines: twice that
  config.keep_checkpoints = False  # those of the trained models
  # Names of one's own, each an algorithm and settings of it.
  config.variants = ConfigDict()
  # SAM as it is inside UDIM, with its radius and its warm-up.
  config.variants.udim_zero = ("algorithm=udim", "methods.udim.lambda1=0.0")
  config.variants.udim_pen = ("algorithm=udim", "methods.udim.terms=('pen',)")
  config.variants.udim_norm = ("algorithm=udim", "methods.udim.terms=('norm',)")
  config.variants.udim_exact = (
    "algorithm=udim",
    "methods.udim.data_grad=exact",
  )
  config.variants.udim_plain = (
    "algorithm=udim",
    "methods.udim.data_grad=plain",
  )
  config.variants.udim_detached = (
    "algorithm=udim", "methods.udim.detach_source=true"
  )  # fmt: skip
  config.variants.udim_still = ("algorithm=udim", "methods.udim.rho_x=0.0")
  config.variants.udim_style = (
    "algorithm=udim", "methods.udim.perturbation=style"
  )  # fmt: skip
  return config


def _search() -> ConfigDict:
  """Random search over hyper-parameters; see `udim.search`."""
  config = ConfigDict()
  config.draws = 1  # of each algorithm
  config.seed = 0
  # 0: every run chooses among its own draws, as in DomainBed; the first are
  # the settings above. Else so many seeds, from `first_tuning_seed`, choose
  # among as many draws, without these settings, for all runs that are reported.
  config.tuning_seeds = 0
  config.first_tuning_seed = 1000
  config.chosen = ""  # the chosen.json of another comparison, instead
  # (key, log | uniform | choice, …): ranges, for all algorithms and for each.
  config.shared = ()
  config.spaces = ConfigDict()
  rho = ("log", 0.01, 1.0)
  terms = (
    ("rho", *rho), ("rho_x", "log", 0.25, 2.0), ("lambda1", "log", 0.1, 100.0)
  )  # fmt: skip
  config.spaces.mixup = (("alpha", "log", 0.1, 10.0),)
  config.spaces.coral = (("weight", "log", 0.1, 10.0),)
  config.spaces.groupdro = (("eta", "log", 1e-3, 0.1),)
  config.spaces.irm = (("weight", "log", 0.1, 1e4),)
  config.spaces.fishr = (("weight", "log", 10.0, 1e4),)
  config.spaces.sam = (("rho", *rho),)
  config.spaces.asam = (("rho", "log", 0.1, 10.0),)
  config.spaces.fisher_sam = (("rho", "log", 0.02, 2.0),)
  config.spaces.gsam = (("rho", *rho), ("alpha", "log", 0.05, 0.5))
  config.spaces.sagm = (("rho", *rho), ("alpha", "log", 1e-4, 1e-2))
  config.spaces.gam = (("rho", *rho), ("gamma", "log", 0.01, 0.5))
  config.spaces.look_sam = (("rho", *rho), ("alpha", "uniform", 0.3, 1.0))
  config.spaces.esam = (("rho", *rho),)
  config.spaces.udim = terms
  for control in ("perturbed_loss", "perturbed_sam"):
    config.spaces[control] = (*terms[:2], ("lambda1", "log", 0.1, 10.0))
  return config


def smoke(config: ConfigDict) -> None:
  """The same code path in less than a minute."""
  config.num_steps = 20
  config.data.images_per_domain = 16
  config.data.source.severities = (3,)
  config.methods.irm.anneal_steps = 4
  config.methods.fishr.anneal_steps = 4
  config.evaluation.every = 10
  config.log.every = 5
  config.compare.seeds = 2


def train(config: ConfigDict) -> None:
  """One training, not a comparison."""
  config.mode = "train"
  config.checkpoint.every = 50


_ALL = (
  "erm,mixup,irm,erm+swad,sam,asam,fisher_sam,gsam,sagm,gam,look_sam,esam,"
  "perturbed_loss,perturbed_sam,udim,udim+swad,udim_zero,udim_pen,udim_norm,"
  "udim_exact,udim_plain,udim_detached,udim_still,udim_style"
)


def digits_c(config: ConfigDict) -> None:
  """One clean source; 40 corrupted domains that nothing was chosen by."""
  config.compare.algorithms = _ALL
  config.compare.seeds = 8
  config.compare.references = "erm,sam,perturbed_loss"
  config.search.update({"draws": 8, "tuning_seeds": 2})


def digits_rot(config: ConfigDict) -> None:
  """Six angles, each left out in turn; also with one and two sources alone."""
  _domains_of_digits(config, "digits_rot")
  with config.compare.variants.unlocked():
    for count in (1, 2):
      for name in ("erm", "sam", "udim"):
        config.compare.algorithms += f",{name}_{count}"
        config.compare.variants[f"{name}_{count}"] = (
          f"algorithm={name}", f"sources_limit={count}",
          f"data.images_per_domain={80 // count}",  # a batch as large
        )  # fmt: skip


def digits_color(config: ConfigDict) -> None:
  """ColoredMNIST's recipe; the last domain contradicts the others."""
  _domains_of_digits(config, "digits_color")


def _domains_of_digits(config: ConfigDict, kind: str) -> None:
  config.data.source.kind = kind
  config.protocol = "leave_one_out"
  config.data.images_per_domain = 16
  config.num_steps = 300
  config.compare.algorithms = (
    "erm,mixup,coral,groupdro,irm,fishr,erm+swad,sam,asam,fisher_sam,gsam,"
    "sagm,gam,look_sam,esam,perturbed_loss,perturbed_sam,udim,udim_zero,"
    "udim_pen,udim_norm,udim_exact,udim_still"
  )
  config.compare.seeds = 8
  config.compare.references = "erm,sam,perturbed_loss"
  config.compare.landscape = False
  config.search.update({"draws": 4, "tuning_seeds": 1})
  config.methods.udim.domain_reduce = "mean"  # one weight for any number


def cifar10c(config: ConfigDict) -> None:
  """CIFAR-10 to CIFAR-10-C. The paper's settings are not known; these are
  those of WideResNets on CIFAR-10.
  """
  train(config)
  config.data.source.kind = "cifar10c"
  config.data.source.path = "CIFAR-10-C"
  config.data.augment = "crop_flip"
  config.data.statistics = "cifar10"
  config.data.images_per_domain = 128
  config.data.holdout = 0.1
  config.data.workers = 4
  config.model.update({"name": "wrn28_2", "batch_norm": "update"})
  config.num_steps = 70_000
  config.optim.update({"name": "sgd", "lr": 0.1, "schedule": "cosine"})
  config.optim.update(
    {"nesterov": True, "weight_decay": 5e-4, "decay": "coupled"}
  )
  for name in ("udim", "perturbed_loss", "perturbed_sam"):
    config.methods[name].clip_range = ()  # normalised images have other bounds
  config.methods.irm.anneal_steps = 14_000
  config.evaluation.update({"every": 3500, "batch_size": 1000})
  config.checkpoint.update({"every": 3500, "keep": 2})
  config.log.every = 100
  config.compare.algorithms = _ALL
  config.compare.references = "erm,sam,perturbed_loss"


def _domainbed(name: str, *, lr: float, alpha: float, decay: float = 1e-4):
  """DomainBed's folders with a ResNet-50: learning rate, decay, dropout and
  SAGM's alpha as in the SAGM authors' README; UDIM's settings as in its
  authors' scripts, which are for PACS and a ResNet-18.
  """

  def variant(config: ConfigDict) -> None:
    train(config)
    config.data.source.kind = "folder"
    config.data.source.path = name
    config.protocol = "leave_one_out"
    config.num_steps = 5001
    config.data.update({"image_size": 224, "augment": "domainbed"})
    config.data.update({"statistics": "imagenet", "images_per_domain": 16})
    config.data.update({"workers": 4, "threads": 4})
    config.model.update({"name": "resnet50", "dropout": 0.5})
    config.model.pretrained = "resnet50.pth"  # torchvision's, yours to bring
    config.optim.update({"lr": lr, "weight_decay": decay, "decay": "coupled"})
    config.optim.no_decay = ()
    config.methods.sagm.alpha = alpha
    for name_of in ("udim", "perturbed_loss", "perturbed_sam"):
      # The authors' length of 10 over a batch of 48, for each image:
      # 10 sqrt(224 * 224 * 3 / 48).
      config.methods[name_of].update({"rho_x": 560.0, "clip_range": ()})
    config.compare.image_distance = 560.0
    config.methods.udim.lambda1 = 1.0
    config.methods.irm.anneal_steps = 500
    config.methods.fishr.anneal_steps = 1500
    config.evaluation.update({"every": 100, "batch_size": 128})
    config.checkpoint.update({"every": 200, "keep": 1})
    config.compare.algorithms = _ALL + ",coral,groupdro,fishr"
    config.compare.references = "erm,sam,perturbed_loss"
    config.compare.landscape = False
    _domainbed_variants(config.compare.variants)
    _domainbed_search(config.search)

  return variant


def _domainbed_variants(variants: ConfigDict) -> None:
  """What depends on the size of images and their normalisation."""
  # The length of a move of means and deviations, not of pixels.
  variants.udim_style = (*variants.udim_style, "methods.udim.rho_x=1.0")
  with variants.unlocked():
    variants.udim_reference = (
      "algorithm=udim", "methods.udim.reference_quirks=true",
      "methods.udim.rho_x=10.0",
    )  # fmt: skip


def _domainbed_search(search: ConfigDict) -> None:
  """DomainBed's ranges (`domainbed/hparams_registry.py`), but for the size of
  batches, which is fixed; those of UDIM's terms are ours.
  """
  search.shared = (
    ("optim.lr", "log", 1e-5, 10**-3.5),
    ("optim.weight_decay", "log", 1e-6, 1e-2),
    ("model.dropout", "choice", 0.0, 0.1, 0.5),
  )
  spaces = search.spaces
  spaces.irm = (("weight", "log", 0.1, 1e5),)
  spaces.fishr = (("weight", "log", 10.0, 1e4), ("ema", "uniform", 0.9, 0.99))
  for name in ("sam", "gsam", "sagm", "gam", "look_sam", "esam"):
    _, *others = spaces[name]
    spaces[name] = (("rho", "choice", 0.01, 0.02, 0.05, 0.1), *others)
  for name in ("udim", "perturbed_loss", "perturbed_sam"):
    *_, weight = spaces[name]
    spaces[name] = (
      ("rho", "choice", 0.01, 0.02, 0.05, 0.1), ("rho_x", "log", 140.0, 2240.0),
      weight,
    )  # fmt: skip


def _domainnet(config: ConfigDict) -> None:
  _domainbed("domain_net", lr=3e-5, alpha=5e-4, decay=1e-6)(config)
  config.num_steps = 15_001
  config.evaluation.every = 1000
  config.checkpoint.every = 1000
  config.data.source.duplicates = "domain_net_duplicates.txt"


def single_source(config: ConfigDict) -> None:
  """Each domain in turn trains; 48 images of it in a batch."""
  config.protocol = "single_source"
  config.data.images_per_domain = 48


VARIANTS = {
  "smoke": smoke,
  "train": train,
  "digits_c": digits_c,
  "digits_rot": digits_rot,
  "digits_color": digits_color,
  "cifar10c": cifar10c,
  "paper": _domainbed("PACS", lr=3e-5, alpha=1e-3),
  "pacs": _domainbed("PACS", lr=3e-5, alpha=1e-3),
  "vlcs": _domainbed("VLCS", lr=1e-5, alpha=1e-3),
  "officehome": _domainbed("office_home", lr=1e-5, alpha=5e-4),
  "terraincognita": _domainbed("terra_incognita", lr=1e-5, alpha=1e-3),
  "domainnet": _domainnet,
  "single_source": single_source,
}
