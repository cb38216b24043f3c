"""The page that a model's folder shows: what it is and how to use it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_TITLES = {
  "gated_ssm": "Gated SSM",
  "hawk": "Hawk",
  "transformer": "Transformer",
}
_READS = {
  "none": "every layer is causal",
  "alternate": "every second layer reads the prefix in both directions",
  "all": "all layers read the prefix in both directions",
}
_SIZES = (
  "width", "layers", "state", "heads", "kv_heads", "mlp_width", "gate_blocks",
  "bidirectional", "prefix_mode", "forget_bias", "reset_gamma", "rope_base",
  "tie_embeddings", "dtype", "param_dtype",
)  # fmt: skip
_USE = """\
## Use

In this folder, where `tetrad-jax[weights]` is installed:

```
python -m birdie.generate --run . --prompt "Once upon a time"
```

```python
from birdie import load_run

run = load_run(".")  # .model, .params, .tokenizer, .vocab
```

A prompt is {announce}, then its
tokens, read in both directions; generation begins with {gen} (GEN) and ends
with {eos} (EOS). Parameters lie in `model.safetensors` under their paths. A
training may begin from them, with `--config.init_from` and this folder.

## Licence

None is stated here. Whoever passes the model on says under which terms, and
whether those of the training text allow it.
"""


def card_of(content: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
  """The page, in Markdown.

  Args:
    content: what the folder's `config.json` says.
    facts: what its `facts.json` says.
  """
  return "\n".join([*_lines(content, facts), _use(content)])


def _lines(
  content: Mapping[str, Any], facts: Mapping[str, Any]
) -> Iterator[str]:
  model, training = content["model"], content["training"]
  title = _TITLES[model["name"]]
  yield "---\nlibrary_name: tetrad-jax\npipeline_tag: text-generation\n---\n"
  yield f"# A {title} of {content['parameters']:,} parameters\n"
  yield (
    "A language model of prefixes and continuations, trained under Birdie's\n"
    f"objectives (arXiv 2411.01030):\n{_READS[model['bidirectional']]}.\n"
  )
  yield "## Architecture\n"
  yield from _table(("setting", "value"), _architecture(content))
  yield "## Training\n"
  yield from _training(content["step"], training, facts)
  yield from _mixture(dict(content["metrics"]), training["mixture"])
  measured = [
    (name, f"{value:.4g}")
    for name, value in content["metrics"]
    if not name.startswith("mixture/")
  ]
  if measured:
    yield "## Measured\n"
    yield "While training, on held-out text; losses are nats per token.\n"
    yield from _table(("metric", "value"), measured)


def _architecture(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  """What the model reads of its settings, with sizes that were left to it."""
  from birdie.models import make_model

  settings, size = content["model"], content["vocabulary"]["size"]
  made = make_model(settings, size)
  yield "model", _TITLES[settings["name"]]
  for key in _SIZES:
    if hasattr(made, key):
      is_type = key.endswith("dtype")
      yield key, settings[key] if is_type else getattr(made, key)
  yield "vocabulary", f"{size} ({content['tokenizer']['kind']})"


def _training(
  step: int, training: Mapping[str, Any], facts: Mapping[str, Any]
) -> Iterator[str]:
  data, optim = training["data"], training["optim"]
  rows = f"{data['batch_size']} rows of {data['sequence_length']} tokens"
  yield (
    f"{step} of {training['num_steps']} steps of {rows}, with {optim['name']} "
    f"at {optim['lr']:g}."
  )
  if "train_tokens" in facts:
    yield (
      f"The text ({data['source']['kind']}) has {facts['train_tokens']:,} "
      f"tokens in {facts['train_documents']:,} documents."
    )
  if training.get("init_from"):
    yield f"It began from the parameters of `{training['init_from']}`."
  yield ""


def _mixture(
  metrics: Mapping[str, float], mixture: Mapping[str, Any]
) -> Iterator[str]:
  shares = {
    name.removeprefix("mixture/"): value
    for name, value in metrics.items()
    if name.startswith("mixture/")
  }
  what = (
    "entries of its own" if mixture["entries"] else f"`{mixture['preset']}`"
  )
  yield f"The mixture of objectives: {what}.\n"
  if shares:
    yield from _table(
      ("objective", "last share"),
      [(name, f"{share:.1%}") for name, share in shares.items()],
    )


def _use(content: Mapping[str, Any]) -> str:
  vocab = content["vocabulary"]
  announce = vocab["paradigms"]["prefix_language_modeling"]
  return _USE.format(
    announce=f"{', '.join(map(str, announce))} (prefix language modeling)",
    gen=vocab["gen"],
    eos=vocab["eos"],
  )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
  for row in (head, ["---"] * len(head), *rows):
    yield f"| {' | '.join(map(str, row))} |"
  yield ""
