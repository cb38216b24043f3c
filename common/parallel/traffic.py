"""What a compiled program sends between devices, read from its text.

# p devices that talk to each other, s bytes of a result on one of them

Bytes that a device sends, on a ring:

    all-gather                      s (p - 1) / p
    reduce-scatter                  s (p - 1)
    all-reduce                      2 s (p - 1) / p
    all-to-all                      s (p - 1) / p
    collective-permute              s
"""

import math
import re
from collections.abc import Callable

from common.parallel.program import lines

_SENT: dict[str, Callable[[int, int], float]] = {
  "all-gather": lambda size, p: size * (p - 1) / p,
  "reduce-scatter": lambda size, p: size * (p - 1),
  "all-reduce": lambda size, p: 2 * size * (p - 1) / p,
  "all-to-all": lambda size, p: size * (p - 1) / p,
  "collective-permute": lambda size, p: size,
}
_CALL = re.compile(
  r" = (?P<result>.*?) (?P<kind>" + "|".join(_SENT) + r")(?P<start>-start)?\("
)
_ARRAY = re.compile(r"(?P<kind>[a-z]+)(?P<bits>\d*)\w*\[(?P<shape>[\d,]*)\]")
_GROUPS = re.compile(
  r"replica_groups=(\[\d+,(?P<size>\d+)\]|\{\{(?P<members>[\d,]+)\}"
  r"|mesh\[(?P<mesh>[^]]+)\](, device_ids=\S+)? \{(?P<axes>[^}]*)\})"
)
_SIDE = re.compile(r"(?P<axis>'[^']+')=(?P<size>\d+)")
_AXIS = re.compile(r"(?P<axis>'[^']+')(:\(\d+\)(?P<part>\d+))?")


def bytes_sent(text: str) -> dict[str, int]:
  """Adds up what a device sends in a run of the program.

  What is in a loop counts as often as the loop runs: see `program.lines`.

  Args:
    text: `compiled.as_text()`.

  Returns:
    Bytes by kind of collective, of the kinds that send any.

  Raises:
    ValueError: for a collective whose groups cannot be read.
  """
  sent: dict[str, float] = {}
  for line, times, _ in lines(text):
    call = _CALL.search(line)
    if call is None:
      continue
    arrays = [_size(found) for found in _ARRAY.finditer(call["result"])]
    if call["start"] and call["kind"] != "all-reduce":
      # Such a result has the operands before it.
      arrays = arrays[len(arrays) // 2 :]
    # A permutation has pairs instead of groups.
    alone = call["kind"] == "collective-permute"
    many = 1 if alone else _group_size(line)
    amount = times * _SENT[call["kind"]](sum(arrays), many)
    sent[call["kind"]] = sent.get(call["kind"], 0) + amount
  return {kind: round(amount) for kind, amount in sent.items() if amount}


def _size(array: re.Match) -> int:
  """Bytes of one array of a result."""
  bits = int(array["bits"] or 8)  # `pred` is a byte
  shape = [int(side) for side in array["shape"].split(",") if side]
  return math.prod(shape) * bits // 8


def _group_size(line: str) -> int:
  """How many devices take part in a line's collective.

  Groups are written as [groups,size], as lists of members, or as axes of a mesh
  that may be cut, and whose devices may be in an order of their own:
  mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(1)2}.
  """
  groups = _GROUPS.search(line)
  if groups is None:
    raise ValueError(f"no groups of devices in {line.strip()[:200]!r}")
  if groups["size"]:
    return int(groups["size"])
  if groups["members"]:
    return groups["members"].count(",") + 1
  sides = {
    side["axis"]: side["size"] for side in _SIDE.finditer(groups["mesh"])
  }
  return math.prod(
    int(axis["part"] or sides[axis["axis"]])
    for axis in _AXIS.finditer(groups["axes"])
  )
