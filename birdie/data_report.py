"""A table of what a mixture makes of a text."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from birdie import data as data_lib
from birdie.data import Batch, BatchMaker
from birdie.vocab import Vocabulary


def of_config(config: Any) -> str:
  """The report of what `configs/birdie.py` describes, with its first mixture.

  Raises:
    UserError: as training would.
  """
  corpus = data_lib.make_corpus(config)
  made = data_lib.make_configurations(
    config, corpus.vocab, corpus.tokenizer.encode
  )
  maker = data_lib.make_batch_maker(config, corpus, made)
  return data_report(maker, data_lib.first_mixture(made), corpus.vocab)


def data_report(
  maker: BatchMaker,
  probs: np.ndarray,
  vocab: Vocabulary,
  *,
  batches: int = 4,
) -> str:
  """A table of what the mixture makes of the text.

  The share of samples and the share of tokens differ: a configuration with
  long samples takes more of the tokens than of the draws.

  Args:
    maker: makes the batches; its process's rows are measured.
    probs: [K] the mixture.
    vocab: tells text from special tokens.
    batches: how many to make.
  """
  start = time.perf_counter()
  made = [maker.with_stats(k, probs) for k in range(batches)]
  seconds = time.perf_counter() - start
  stats = sum((s for _, s in made[1:]), made[0][1])
  count = np.maximum(stats.samples, 1)
  visible = _visible_text([batch for batch, _ in made], vocab, len(count))
  columns = {
    "commanded": [f"{p:.1%}" for p in probs],
    "samples": [f"{v:.1%}" for v in stats.samples / stats.samples.sum()],
    "tokens": [f"{v:.1%}" for v in stats.tokens / stats.tokens.sum()],
    "mean n": [f"{v:.0f}" for v in stats.prefix_tokens / count],
    "mean m": [f"{v:.0f}" for v in stats.target_tokens / count],
    "hidden": [
      f"{max(1 - seen / text, 0):.1%}" if text else "–"
      for seen, text in zip(visible, stats.text_tokens)
    ],
    "dropped": [str(v) for v in stats.dropped],
  }
  names = [c.name for c in maker.packer.configurations]
  table = [["configuration", *columns]]
  table += [list(row) for row in zip(names, *columns.values())]
  widths = [max(map(len, column)) for column in zip(*table)]
  lines = [
    "  ".join(
      cell.ljust(width) if j == 0 else cell.rjust(width)
      for j, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in table
  ]
  lines.append(
    f"fill {stats.fill:.1%}; {stats.samples.sum()} samples, "
    f"{stats.filled.sum() / stats.samples.sum():.1%} of them fill; "
    f"{stats.text_tokens.sum()} text tokens in {stats.slots} places; "
    f"{stats.tokens.sum() / seconds:,.0f} tokens/s"
  )
  lines.append(
    "hidden: text that the prefix does not show, which is the corruption rate "
    "of infilling and autoencoding"
  )
  return "\n".join(lines)


def _visible_text(
  batches: Sequence[Batch], vocab: Vocabulary, num_configs: int
) -> np.ndarray:
  """Text tokens in the prefixes of each configuration, [K]."""
  # EOS belongs to the text: it ends a document.
  special = np.array(sorted(vocab.special_ids - {vocab.eos}))
  counts = np.zeros(num_configs, np.int64)
  for batch in batches:
    seen = batch["prefix"] & ~np.isin(batch["tokens"], special)
    counts += np.bincount(batch["config_ids"][seen], minlength=num_configs)
  return counts
