"""Birdie: language models under the reward-driven mixture.

Variants, to be combined with commas (`configs/birdie.py:smoke,uniform`):

  (none)      Python's own documentation, byte tokens; minutes on a laptop
  smoke       the same code path in less than a minute
  small       little of everything, to compare mixtures: see `birdie.compare`
  paper       the published settings: 1.3 B parameters, 2048 x 520 tokens
  uniform     all objectives, the mixture held fixed
  ul2         UL2's seven denoisers, fixed
  ul2_decoder UL2 for decoders, fixed
  ntp         next-token prediction alone
  causal      no bidirectional layers
  hawk        Hawk in the Gated SSM's place
  transformer a Transformer in its place
  phonebook   the published fine-tuning on phone books
  phonebook_small  a short form of it, for models of a laptop
"""

from ml_collections import ConfigDict

from common.config import apply_variants


def get_config(arg: str | None = None) -> ConfigDict:
  """Returns the configuration; `arg` names variants."""
  config = ConfigDict()
  # train | data_report: print what the mixture makes of the text, and end.
  config.mode = "train"
  config.seed = 0
  config.num_steps = 400
  config.accum = 1  # micro-batches a step
  # The folder of a run, or of a model that birdie.convert wrote, from whose
  # parameters a new run begins; its model and tokenizer must be this one's.
  config.init_from = ""
  config.compile_cache = "~/.cache/tetrad/xla"  # "" switches it off

  # Devices along each axis; -1 takes what is left.
  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "model": 1, "seq": 1})

  config.tokenizer = ConfigDict()
  config.tokenizer.kind = "byte"  # byte | sentencepiece | huggingface
  config.tokenizer.path = ""  # the tokenizer's file, for the last two

  config.data = ConfigDict()
  config.data.source = ConfigDict()
  # python_docs | tfds | array_record | jsonl | text
  config.data.source.kind = "python_docs"
  config.data.source.name = ""  # TFDS name
  config.data.source.split = "train"  # TFDS split
  config.data.source.path = ""  # files, or a pattern
  # Whether a pattern finds links too that lead out of its folder.
  config.data.source.follow_links = False
  config.data.source.text_key = "text"
  config.data.source.separator = ""  # text files: what divides documents
  config.data.source.data_dir = ""  # TFDS; "" is TFDS's own default
  config.data.cache_dir = "~/.cache/tetrad/tokens"  # "" keeps tokens in memory
  config.data.sequence_length = 512
  config.data.batch_size = 8
  config.data.pack_rows = 4  # rows packed together; divides a process's batch
  config.data.workers = 0  # processes that make batches; 0: one thread
  config.data.prefetch = 2
  config.data.mixture_change = "regenerate"  # or "schedule"

  config.mixture = ConfigDict()
  # birdie | birdie_uniform | ul2 | ul2_decoder | ntp
  config.mixture.preset = "birdie"
  config.mixture.grid = "small"  # small | paper: which configurations
  config.mixture.paradigm_append_prob = 0.5
  # Classes' shares of a mixture in the preset's place, such as "copying=4,
  # infilling=1"; the others get none. A controller begins with them.
  config.mixture.shares = ""
  # A mixture of your own in the preset's place: dicts with `objective`, which
  # may be a task, and as you like `name`, `cls`, `weight` and the objective's
  # controls. See birdie/README.md; it can only be set in a file like this one.
  config.mixture.entries = ()

  config.model = _model()
  config.loss = ConfigDict()
  config.loss.chunk = 0  # places whose logits are held at once; 0: all of a row
  config.loss.z_loss = 0.0

  config.optim = _optim()
  config.controller = _controller()

  config.evaluation = ConfigDict()
  config.evaluation.rows = 4  # packed rows of held-out text a configuration
  config.evaluation.batch_size = 8

  config.retrieval = ConfigDict()
  config.retrieval.every = 200
  config.retrieval.task = "phone_book"  # phone_book | phone_book_compact
  config.retrieval.books = 16
  config.retrieval.entries = 8
  config.retrieval.lookups = 2
  config.retrieval.batch_size = 16  # books that are answered together

  config.compare = _compare()

  config.log = ConfigDict({"every": 10, "tensorboard": False})
  config.checkpoint = ConfigDict({"every": 50, "keep": 2, "keep_best": True})
  config.profile = ConfigDict({"start": 20, "count": 0})  # 0 steps: none

  return apply_variants(config, arg, VARIANTS)


def _model() -> ConfigDict:
  """See `birdie.models`."""
  config = ConfigDict()
  config.name = "gated_ssm"  # gated_ssm | hawk | transformer
  config.width = 192
  config.layers = 6
  config.bidirectional = "alternate"  # none | alternate | all
  config.prefix_mode = "strict"  # strict | paper; gated_ssm, hawk
  config.state = 256  # gated_ssm, hawk
  config.forget_bias = "fixed"  # learned | fixed | none; gated_ssm
  config.gate_blocks = 1  # 1: dense gates; k: block-diagonal ones; hawk
  config.reset_gamma = "keep"  # keep | one, where a segment starts; hawk
  config.heads = 3  # transformer
  config.kv_heads = 0  # 0: as many; transformer
  config.rope_base = 250_000.0  # transformer
  config.attention_impl = "auto"  # auto | einsum | xla; transformer
  config.attention_chunk = 0  # queries at a time; 0: by device; transformer
  config.mlp_width = 0  # 0: 8/3 of the width; hawk, transformer
  config.tie_embeddings = True
  config.dtype = "float32"  # of the computation
  config.param_dtype = "float32"
  # What the backward pass computes again: none | dots, all but products of
  # matrices, recurrences and attention | full
  config.remat = "dots"
  config.scan_impl = "auto"  # gated_ssm, hawk
  config.seq_axis = ""  # "seq" shards time over that mesh axis
  return config


def _optim() -> ConfigDict:
  """See `common.optim.make_optimizer`."""
  config = ConfigDict()
  config.name = "adamw"
  config.lr = 3e-3
  config.schedule = "cosine"
  config.warmup_steps = 50
  config.final_ratio = 0.1
  config.b1 = 0.9
  config.b2 = 0.95
  config.eps = 1e-8
  config.momentum = 0.9  # sgd
  config.nesterov = False  # sgd
  config.weight_decay = 0.1
  # Regexes of parameters. The paper spares the forget gates and the RG-LRU from
  # decay (A.8).
  # One pattern: the Transformer has nothing of the second kind, and a pattern
  # that matches nothing is refused.
  config.no_decay = (
    r"(^|/)(scale|bias|\w+_bias|lambda|embedding)$"
    r"|(^|/)(forget|recurrence_gate|input_gate)/kernel$",
  )
  config.frozen = ()
  config.clip_norm = 1.0
  return config


def _controller() -> ConfigDict:
  """What re-weights the mixture; see `birdie.controller`."""
  config = ConfigDict()
  config.enabled = True
  # Steps between evaluations; "paper" is 10, 50, 250, 500, 1000, 1500, 2000
  # and every 1000 from there.
  config.schedule = "50"
  config.warmup_end = 50  # the mixture stays uniform until then
  config.hidden = 64
  config.layers = 4
  config.fit_steps = 200
  config.lr = 5e-4  # of the reward model
  config.weight_decay = 0.1
  config.clip_norm = 1.0
  config.noise = 0.02
  config.num_candidates = 2048
  config.top_k = 8
  config.proposal = "mixed"  # mixed | uniform
  config.min_prob = 0.005
  config.max_prob = 1.0
  # The chance to explore: at first, from 10 % of the run, from half of it.
  config.explore_first = 1.0
  config.explore_start = 0.5
  config.explore_floor = 0.2
  return config


def _compare() -> ConfigDict:
  """What `python -m birdie.compare` runs."""
  config = ConfigDict()
  config.systems = (
    "none, ntp, ul2, uniform, birdie, none_causal, ntp_causal, ul2_causal, "
    "uniform_causal, birdie_causal"
  )
  config.seeds = 3
  config.first_seed = 0
  config.keep_checkpoints = False
  config.train = True  # before the fine-tuning
  # What all go on with, and are asked for.
  config.finetune = ConfigDict()
  config.finetune.num_steps = 1000
  config.finetune.task = ConfigDict(
    {"name": "associative_recall", "pairs": 12, "lookups": (1, 8),
     "key_alphabet": 16, "value_alphabet": 16, "order": "context_query"}
  )  # fmt: skip
  config.finetune.data = ConfigDict({"sequence_length": 128, "batch_size": 16})
  config.finetune.optim = ConfigDict(
    {"lr": 3e-3, "schedule": "cosine", "warmup_steps": 50, "weight_decay": 0.0}
  )
  config.lookups = (1, 2, 4, 8)
  config.problems = 512  # asked for each number of look-ups
  config.questions = 0  # their seed; a search for a mixture takes another
  config.batch_size = 64  # of them at a time
  # What makes each system of the configuration: `key=value`, `key*=number`.
  fixed = "controller.enabled=false"
  systems = {
    "none": ("compare.train=false",),
    "ntp": ("mixture.preset=ntp", fixed),
    "ul2": ("mixture.preset=ul2", fixed),
    "uniform": ("mixture.preset=birdie_uniform", fixed),
    "birdie": (),
  }
  # Without training, with the question before what it asks for.
  systems["none_query_first"] = (
    *systems["none"],
    "compare.finetune.task.order=query_context",
  )
  # Half of everything to one class: what a search for a fixed mixture tries.
  for name in _CLASSES:
    shares = [f"{c}={7 if c == name else 1}" for c in _CLASSES]
    systems[f"half_{name}"] = (f"mixture.shares={','.join(shares)}", fixed)
  # The best of such a search: benchmarks/results/birdie_small.md.
  systems["searched"] = systems["half_deshuffling"]
  causal = "model.bidirectional=none"
  config.settings = ConfigDict(
    systems
    | {f"{name}_causal": (*own, causal) for name, own in systems.items()}
  )
  return config


_CLASSES = (
  "next_token_prediction", "prefix_language_modeling", "infilling",
  "autoencoding", "autoencoding_with_deshuffling", "copying", "deshuffling",
  "selective_copying",
)  # fmt: skip


def small(config: ConfigDict) -> None:
  """A small model and little text, for comparisons: see `birdie.compare`."""
  config.num_steps = 2500
  config.data.update({"sequence_length": 128, "batch_size": 16})
  config.model.update({"width": 64, "state": 128, "heads": 2})
  _deepen(config)
  config.controller.update({"schedule": "100", "warmup_end": 100})
  config.evaluation.update({"rows": 16, "batch_size": 16})
  config.retrieval.every = 0
  config.log.every = 25
  config.checkpoint.update({"every": 500, "keep": 1, "keep_best": False})


def smoke(config: ConfigDict) -> None:
  """The same code path in less than a minute."""
  config.num_steps = 12
  config.data.sequence_length = 128
  config.data.batch_size = 8
  config.model.update({"width": 32, "state": 32, "heads": 2})
  _deepen(config)
  config.controller.update(
    {"schedule": "4", "warmup_end": 4, "hidden": 16, "fit_steps": 20}
  )
  config.controller.num_candidates = 128
  config.evaluation.rows = 1
  config.retrieval.update({"every": 12, "books": 4, "entries": 2, "lookups": 1})
  config.log.every = 2
  config.checkpoint.every = 4
  config.optim.warmup_steps = 4


def paper(config: ConfigDict) -> None:
  """Section 4.1 and appendix A.11 of the paper; the Pile is yours to bring.

  Not stated there, and therefore ours: tied embeddings, the forget gates'
  initial values, the learning rate's floor, everything about exploration.
  """
  config.num_steps = 32_000
  config.tokenizer.kind = "sentencepiece"
  config.tokenizer.path = "tokenizer.model"  # a vocabulary of 32,000
  config.data.source.kind = "array_record"
  config.data.source.path = "pile/*.array_record"
  config.data.sequence_length = 2048
  config.data.batch_size = 520
  config.data.pack_rows = 5  # for 1, 2, 4, 8, 13, 26, 52 or 104 processes
  config.data.workers = 8
  config.mixture.grid = "paper"
  config.model.update({"width": 2048, "state": 2560, "heads": 16})
  _deepen(config)
  config.model.update(
    {"dtype": "bfloat16", "remat": "full", "prefix_mode": "paper"}
  )
  config.optim.lr = 1e-3
  config.optim.warmup_steps = 320
  config.controller.update(
    {"schedule": "paper", "warmup_end": 250, "hidden": 256}
  )
  config.controller.update({"proposal": "uniform", "min_prob": 0.0})
  config.loss.chunk = 256
  config.evaluation.batch_size = 520
  config.retrieval.update(
    {"every": 8000, "books": 1024, "entries": 50, "lookups": 4}
  )
  config.log.every = 20
  config.checkpoint.every = 1000


def _fixed(preset: str):
  def variant(config: ConfigDict) -> None:
    config.mixture.preset = preset
    config.controller.enabled = False

  return variant


def causal(config: ConfigDict) -> None:
  """The ablation `Birdie - Causal`."""
  config.model.bidirectional = "none"


# Layers by width and model; the last as in table 7 of the paper, where all have
# 1.3 B parameters.
_DEPTHS = {
  32: {"gated_ssm": 2, "hawk": 2, "transformer": 2},
  64: {"gated_ssm": 4, "hawk": 2, "transformer": 2},
  192: {"gated_ssm": 6, "hawk": 2, "transformer": 3},
  2048: {"gated_ssm": 48, "hawk": 20, "transformer": 24},
}


def _deepen(config: ConfigDict) -> None:
  model = config.model
  model.layers = _DEPTHS[model.width][model.name]
  if model.name == "hawk" and model.width == 2048:
    model.param_dtype = "bfloat16"  # A.11


def hawk(config: ConfigDict) -> None:
  """Hawk, with about as many parameters as the Gated SSM."""
  config.model.name = "hawk"
  _deepen(config)


def transformer(config: ConfigDict) -> None:
  """The Transformer, with about as many parameters; all layers see ahead."""
  config.model.name = "transformer"
  if config.model.bidirectional != "none":
    config.model.bidirectional = "all"
  _deepen(config)


def phonebook(config: ConfigDict) -> None:
  """Appendix A.9 of the paper: fine-tuning on phone books, packed.

  It is meant for a model that has been trained before (`config.init_from`).
  800 entries are 16,384 of the paper's tokens; as bytes they are more, and
  books then have as many entries as a row holds.
  """
  _fine_tuning(config, lr=5e-5)
  config.num_steps = 1000
  config.data.update(
    {"sequence_length": 16_384, "batch_size": 64, "pack_rows": 4}
  )
  config.mixture.entries = (
    {
      "objective": "phone_book",
      "entries": (200, 800),
      "lookups": (1, 32),
      "layout": "question_context_question",
    },
  )
  config.controller.schedule = "250"
  config.retrieval.update(
    {"every": 250, "books": 64, "entries": 750, "lookups": 32}
  )


def phonebook_small(config: ConfigDict) -> None:
  """The same at a laptop's size: few tokens an entry, rows of 512.

  Small models take higher rates than the published one.
  """
  _fine_tuning(config, lr=1e-3)
  config.num_steps = 1000
  config.data.sequence_length = 512
  config.mixture.entries = (
    {"objective": "phone_book_compact", "entries": (4, 32), "lookups": (1, 8)},
  )
  config.controller.schedule = "100"
  config.retrieval.update(
    {
      "every": 100, "task": "phone_book_compact", "books": 64, "entries": 16,
      "lookups": 4,
    }
  )  # fmt: skip


def _fine_tuning(config: ConfigDict, *, lr: float) -> None:
  """One task, one rate, nothing that decays."""
  config.controller.enabled = False
  config.optim.lr = lr
  config.optim.schedule = "constant"
  config.optim.warmup_steps = 0
  config.optim.weight_decay = 0.0


VARIANTS = {
  "smoke": smoke,
  "small": small,
  "paper": paper,
  "uniform": _fixed("birdie_uniform"),
  "ul2": _fixed("ul2"),
  "ul2_decoder": _fixed("ul2_decoder"),
  "ntp": _fixed("ntp"),
  "causal": causal,
  "hawk": hawk,
  "transformer": transformer,
  "phonebook": phonebook,
  "phonebook_small": phonebook_small,
}
