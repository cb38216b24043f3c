"""ONNX graphs, written down operation by operation.

Shapes follow from the operations, so that only inputs and outputs state theirs.
A dimension is a number or, where it is free, a name. The standard and its
operators: https://onnx.ai/onnx
"""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from common.errors import UserError
from common.tree import names

OPSET = 17  # the first with LayerNormalization; segment-anything's own choice
IR_VERSION = 8  # the format of the file that came with it
FLOAT, INT64 = 1, 7  # as the standard numbers types
# A file of protocol buffers ends at 2 GiB: larger weights get one beside it.
ONE_FILE = 2**31 - 2**24
PyTree = Any
Dims = Sequence[int | str]
Value = str  # what an operation makes, or takes, by its name
Input = Value | float | Sequence[float] | np.ndarray


class Node(NamedTuple):
  """An operation.

  Attributes:
    kind: its operator.
    inputs: names of values.
    output: the name of what it makes.
    attributes: of the operator.
  """

  kind: str
  inputs: tuple[Value, ...]
  output: Value
  attributes: dict[str, Any]


class Graph:
  """A graph that grows.

  Args:
    params: those that its layers will name, such as `neck/conv1`. Each becomes
      an initializer once, however often it is used.
  """

  def __init__(self, params: PyTree):
    self.nodes: list[Node] = []
    self.inputs: dict[str, Dims] = {}
    self.outputs: dict[str, Dims] = {}
    self.initializers: dict[str, np.ndarray] = {}
    self._params = dict(
      zip(jax.tree.leaves(names(params)), jax.tree.leaves(params))
    )
    self._constants: dict[Any, Value] = {}
    self._renamed: dict[Value, str] = {}

  def input(self, name: str, dims: Dims) -> Value:
    """Declares an input, float32."""
    self.inputs[name] = dims
    return name

  def output(self, name: str, value: Value, dims: Dims) -> None:
    """Declares an output, float32, and gives its value that name."""
    self.outputs[name] = dims
    self._renamed[value] = name

  def op(self, kind: str, *inputs: Input | None, **attributes: Any) -> Value:
    """Adds an operation.

    Args:
      kind: the operator, such as `MatMul`.
      *inputs: values; numbers and arrays are constants, int64 where they are
        whole and else float32; None is an input left out.
      **attributes: of the operator.
    """
    output = f"{kind}_{len(self.nodes)}"
    named = tuple("" if x is None else self._value(x) for x in inputs)
    self.nodes.append(Node(kind, named, output, attributes))
    return output

  def _value(self, x: Input) -> Value:
    """The name of an input; equal constants are one initializer."""
    if isinstance(x, str):
      return x
    array = np.asarray(x)
    array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in self._constants:
      name = f"constant_{len(self._constants)}"
      self._constants[key] = name
      self.initializers[name] = array
    return self._constants[key]

  def weight(
    self,
    name: str,
    change: Callable[[np.ndarray], np.ndarray] = lambda array: array,
  ) -> Value:
    """A parameter as an initializer of its name.

    Args:
      name: its path.
      change: from its shape to the operator's.
    """
    if name not in self.initializers:
      array = np.asarray(self._params[name], np.float32)
      self.initializers[name] = change(array)
    return name

  def shape_of(self, name: str) -> tuple[int, ...]:
    """The shape of a parameter."""
    return self._params[name].shape

  def reshape(self, x: Value, *dims: int) -> Value:
    """To another shape; 0 keeps the dimension, and one may be -1."""
    return self.op("Reshape", x, dims)

  def transpose(self, x: Value, *axes: int) -> Value:
    """Reorders the axes."""
    return self.op("Transpose", x, perm=list(axes))

  def channels_last(self, x: Value) -> Value:
    """[b c y x] -> [b y x c]."""
    return self.transpose(x, 0, 2, 3, 1)

  def channels_first(self, x: Value) -> Value:
    """[b y x c] -> [b c y x]."""
    return self.transpose(x, 0, 3, 1, 2)

  def linear(self, x: Value, name: str, outer: int) -> Value:
    """The product with a kernel alone: [... d] -> [... f].

    Args:
      x: of any rank from 2.
      name: of the layer.
      outer: f, for kernels that hold the axes of several heads.
    """
    kernel = self.weight(f"{name}/kernel", lambda k: k.reshape(-1, outer))
    return self.op("MatMul", x, kernel)

  def plus_bias(self, x: Value, name: str) -> Value:
    """Adds a layer's bias to the last axis."""
    return self.op("Add", x, self.weight(f"{name}/bias", np.ravel))

  def dense(self, x: Value, name: str) -> Value:
    """[... d] -> [... f]; of several heads the axes are one."""
    outer = math.prod(self.shape_of(f"{name}/bias"))
    return self.plus_bias(self.linear(x, name, outer), name)

  def norm(self, x: Value, name: str, epsilon: float) -> Value:
    """Layer normalization over the last axis."""
    scale, bias = self.weight(f"{name}/scale"), self.weight(f"{name}/bias")
    return self.op(
      "LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon
    )

  def gelu(self, x: Value) -> Value:
    """GELU by the error function; runtimes make one of these operations."""
    risen = self.op("Add", self.op("Erf", self.op("Div", x, 2**0.5)), 1.0)
    return self.op("Mul", self.op("Mul", x, risen), 0.5)

  def conv(
    self, x: Value, name: str, *, stride: int = 1, pad: int = 0
  ) -> Value:
    """A convolution, [b c y x] -> [b d y x], with a bias where there is one."""
    kernel = self.weight(f"{name}/kernel", lambda k: k.transpose(3, 2, 0, 1))
    bias = f"{name}/bias"
    inputs = [self.weight(bias)] if bias in self._params else []
    return self.op(
      "Conv", x, kernel, *inputs, strides=[stride] * 2, pads=[pad] * 4
    )

  def doubled(self, x: Value, name: str) -> Value:
    """A transposed convolution of 2x2 at stride 2."""
    kernel = self.weight(f"{name}/kernel", lambda k: k.transpose(2, 3, 0, 1))
    bias = self.weight(f"{name}/bias")
    return self.op("ConvTranspose", x, kernel, bias, strides=[2, 2])

  def model(self, title: str) -> Any:
    """The graph as an `onnx.ModelProto`.

    Args:
      title: a name for it.

    Raises:
      UserError: where onnx is missing.
    """
    try:
      from onnx import helper, numpy_helper  # type: ignore
    except ImportError as error:
      raise UserError(
        f"{title}.onnx needs onnx: pip install -e '.[export]'"
      ) from error

    def called(value: Value) -> str:
      return self._renamed.get(value, value)

    def declared(values: dict[str, Dims]) -> list[Any]:
      return [
        helper.make_tensor_value_info(name, FLOAT, dims)
        for name, dims in values.items()
      ]

    nodes = [
      helper.make_node(
        node.kind,
        [called(x) for x in node.inputs],
        [called(node.output)],
        name=node.output,
        **node.attributes,
      )
      for node in self.nodes
    ]
    model = helper.make_model(
      helper.make_graph(
        nodes, title, declared(self.inputs), declared(self.outputs)
      ),
      ir_version=IR_VERSION,
      opset_imports=[helper.make_opsetid("", OPSET)],
      producer_name="tetrad-jax",
    )
    # Not before: what `make_model` is given it copies.
    for name, array in self.initializers.items():
      made = numpy_helper.from_array(np.asarray(array, order="C"), name)
      model.graph.initializer.add().CopyFrom(made)
    return model

  def write(self, path: pathlib.Path) -> int:
    """Writes the graph; weights too large for one file go to `NAME.data`.

    Returns:
      The bytes of what was written.
    """
    model = self.model(path.stem)
    import onnx  # type: ignore

    size = sum(array.nbytes for array in self.initializers.values())
    data = path.with_name(f"{path.name}.data")
    onnx.save_model(
      model,
      str(path),
      save_as_external_data=size > ONE_FILE,
      location=data.name,
    )
    return sum(file.stat().st_size for file in (path, data) if file.exists())
