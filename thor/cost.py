"""What a model costs: forward matrix products of a token, by formula.

# d width, f hidden width, v vocabulary, k experts, m members

    encoder layer   8 d^2 + 4 d f       a source token
    decoder layer   16 d^2 + 4 d f      a target token
    logits          2 d v               a target token
    gate            2 d k               in each expert layer

Scores of attention, norms and sums are left out, as they are small at the
lengths of sentences. A backward pass costs two forward ones.
"""

from typing import NamedTuple

from thor.settings import Settings


class Cost(NamedTuple):
  """Floating-point operations of a forward pass.

  Attributes:
    source: of a source token.
    target: of a target token, with its logits.
  """

  source: float
  target: float

  @property
  def total(self) -> float:
    """Of a source token and a target token."""
    return self.source + self.target


def forward_flops(
  settings: Settings, *, experts_run: float = 1.0, members: int = 1
) -> Cost:
  """The cost of a token.

  Args:
    settings: the model's.
    experts_run: experts that one token passes in each expert layer: k for
      `average_output`; where experts keep room for more than their tokens,
      the room in even shares.
    members: models that run, of an ensemble.
  """
  width, hidden = settings.width, settings.hidden
  encoder, decoder = settings.expert_layers
  attend, feed = 8 * width**2, 4 * width * hidden
  extra = feed * (experts_run - 1)
  if settings.gated:
    extra += 2 * width * settings.experts
  source = settings.encoder_layers * (attend + feed) + encoder * extra
  target = settings.decoder_layers * (2 * attend + feed) + decoder * extra
  target += 2 * width * settings.vocab_size
  return Cost(members * source, members * target)


def dispatch_flops(settings: Settings, name: str, number: int) -> Cost:
  """The cost of a token under a way to use the model; see `thor.dispatch`."""
  if name == "average_output":
    return forward_flops(settings, experts_run=settings.experts)
  members = number if name == "ensemble" else 1
  return forward_flops(settings, members=members)


def train_flops(settings: Settings, *, passes: int) -> Cost:
  """The cost of a token in a training step."""
  forward = forward_flops(settings, experts_run=settings.capacity or 1.0)
  return Cost(3 * passes * forward.source, 3 * passes * forward.target)
