import numpy as np
import pytest

from birdie.vocab import PARADIGMS, as_ids, byte_vocabulary, extend
from common.data.tokenizers import ByteTokenizer


def test_byte_vocabulary():
  vocab = byte_vocabulary()
  assert (vocab.pad, vocab.gen, vocab.eos, vocab.sep) == (0, 1, 2, 3)
  assert [vocab.paradigms[name] for name in PARADIGMS] == [
    (i,) for i in range(4, 13)
  ]
  markers = (vocab.start, vocab.end, vocab.context, vocab.done)
  assert markers == (13, 14, 15, 16)
  assert vocab.sentinels == tuple(range(320, 420))
  assert vocab.size == 512
  np.testing.assert_array_equal(
    ByteTokenizer().encode("AJ"), [vocab.byte_offset + b for b in b"AJ"]
  )


@pytest.mark.parametrize(
  "vocab", [byte_vocabulary(), extend(32_000), extend(7, multiple=1)]
)
def test_no_two_specials_share_an_id_and_none_is_text(vocab):
  names = ("pad", "gen", "eos", "sep", "start", "end", "context", "done")
  ids = [getattr(vocab, name) for name in names]
  ids += [i for paradigm in vocab.paradigms.values() for i in paradigm]
  ids += vocab.sentinels
  assert len(ids) == len(set(ids)) == len(names) + 9 + 100
  assert vocab.special_ids == set(ids)
  assert not any(i in vocab.text for i in ids)
  assert all(0 <= i < vocab.size for i in ids)


@pytest.mark.parametrize(
  ("base", "multiple", "size"),
  [(32_000, 128, 32_128), (1000, 128, 1152), (1000, 1, 1117)],
)
def test_extend_pads_the_size(base, multiple, size):
  vocab = extend(base, multiple=multiple)
  assert vocab.size == size
  assert min(vocab.special_ids) == base
  assert vocab.text == range(base)
  assert vocab.byte_offset is None


@pytest.mark.parametrize(
  ("given", "ids"),
  [
    ("<|COPY|>", tuple(64 + b for b in b"<|COPY|>")),
    (63, (63,)),
    ([60, np.int64(61)], (60, 61)),
  ],
)
def test_paradigms_are_ids_or_text(given, ids):
  assert as_ids(given, ByteTokenizer().encode) == ids
