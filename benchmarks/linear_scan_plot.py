"""Times over sizes, drawn; for `linear_scan.py`."""

import math
from typing import Any


def draw(rows: list[dict], path: str) -> None:
  """Times over the size of an array, with the unit as the roofline."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  kinds = sorted({(row["dtype"], row["part"]) for row in rows}, reverse=True)
  names = [
    name
    for name in dict.fromkeys(row["name"] for row in rows)
    if not name.endswith(("reverse", "resets"))
  ]
  figure, axes = plt.subplots(
    1, len(kinds), figsize=(3.6 * len(kinds) + 1.6, 3.6), squeeze=False,
    layout="constrained",
  )  # fmt: skip
  for axis, (dtype, part) in zip(axes[0], kinds):
    own = [r for r in rows if (r["dtype"], r["part"]) == (dtype, part)]
    for number, name in enumerate(names):
      points = sorted(
        (math.prod(r["shape"]), r["seconds"] * 1e3)
        for r in own
        if r["name"] == name
      )
      style: dict[str, Any] = {"color": f"C{number}"}
      if name == "unit":
        style = {"color": "black", "linestyle": "--"}
      label = "memory (unit)" if name == "unit" else name
      x, y = zip(*points) if points else ((), ())
      axis.plot(x, y, marker="o", markersize=4, label=label, **style)
    axis.set(
      xscale="log", yscale="log", xlabel="numbers in an array",
      ylabel="ms", title=f"{dtype}, {part}",
    )  # fmt: skip
    axis.grid(alpha=0.3)
  axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=110)
