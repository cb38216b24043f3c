"""A compiled program's text: its lines, how often each runs, its FLOPs.

The compiler's own count takes the body of a loop once, so a model of fifty
layers in a scan costs as much as one of a single layer. It does write down how
often each loop runs.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_CALLED = re.compile(
  r"(?:calls|body|condition|to_apply|(?:branch|called)_computations"
  r"|(?:true|false)_computation)=(?P<names>\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_RESULT = re.compile(
  r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = [a-z]\w*\[(?P<shape>[\d,]*)\]"
)
_PRODUCT = re.compile(r" (?P<kind>dot|convolution)\((?P<operands>[^)]*)\)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=\w+_(?P<kernel>\w+)->")

Shape = tuple[int, ...]


class Line(NamedTuple):
  """An instruction.

  Attributes:
    text: as the compiler writes it.
    times: it runs in a run of the program.
    computation: the name of the function it stands in, "" outside of all.
  """

  text: str
  times: int
  computation: str


def lines(text: str) -> Iterator[Line]:
  """All instructions of a program.

  A loop whose count the compiler does not know counts once, and so does every
  branch of a conditional.

  Args:
    text: `compiled.as_text()`, or a part of one: what stands in no function
      runs once.
  """
  found = _functions(text)
  times = collections.Counter({"": 1})
  # A function stands before those that call it.
  for name, (is_entry, body) in reversed(found.items()):
    times[name] += is_entry
    for line in body:
      trips = _TRIPS.search(line)
      for called in _CALLED.finditer(line):
        for callee in _NAME.findall(called["names"]):
          times[callee] += times[name] * (int(trips[1]) if trips else 1)
  for name, (_, body) in found.items():
    for line in body:
      yield Line(line, times[name], name)


def _functions(text: str) -> dict[str, tuple[bool, list[str]]]:
  """(is the entry, its lines) by name."""
  found: dict[str, tuple[bool, list[str]]] = {"": (False, [])}
  name = ""
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head is not None:
      name = head["name"]
      found[name] = (head["entry"] is not None, [])
    elif line == "}":
      name = ""
    else:
      found[name][1].append(line)
  return found


def flops(text: str) -> int:
  """FLOPs of all matrix products and convolutions of a run of the program.

  A product and the addition that follows are two. All else (what is done to
  each element) is left out, and padding of convolutions counts as if it were
  data.

  Args:
    text: `compiled.as_text()`, for one device of those that run it.

  Raises:
    ValueError: for a product whose sizes cannot be read.
  """
  shapes: dict[tuple[str, str], Shape] = {}
  total = 0
  for line in lines(text):
    result = _RESULT.match(line.text)
    if result is None:
      continue
    shape = _numbers(result["shape"])
    shapes[line.computation, result["name"]] = shape
    product = _PRODUCT.search(line.text)
    if product is None:
      continue
    operands = re.findall(r"%([\w.\-]+)", product["operands"])
    try:
      sides = [shapes[line.computation, name] for name in operands]
      inner = _INNER[product["kind"]](line.text, *sides)
    except (KeyError, TypeError) as error:
      raise ValueError(f"no sizes in {line.text.strip()[:200]!r}") from error
    total += 2 * line.times * math.prod(shape) * inner
  return total


def _inner_of_dot(line: str, left: Shape, right: Shape) -> int:
  """Products that are added up to one element of the result."""
  del right
  contracted = _CONTRACTED.search(line)
  axes = _numbers(contracted[1]) if contracted else ()
  return math.prod(left[axis] for axis in axes)


def _inner_of_convolution(line: str, image: Shape, kernel: Shape) -> int:
  """As `_inner_of_dot`: over the window and a group's channels."""
  del image
  labels = _LABELS.search(line)
  if labels is None:
    raise KeyError("dim_labels")
  return math.prod(
    size for label, size in zip(labels["kernel"], kernel) if label != "o"
  )


_INNER: Mapping = {
  "dot": _inner_of_dot,
  "convolution": _inner_of_convolution,
}


def _numbers(text: str) -> Shape:
  return tuple(int(number) for number in text.split(",") if number)
