"""Equality with PyTorch and transformers on random weights (parity extra).

torchvision's ResNet and timm's Vision Transformer are written out here with
torch.nn, under the names that their state dicts have.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.weights import read_weights
from udim.convert import load_pretrained
from udim.models import ResNet, ViT, init_variables, make_apply_fn

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
nn = torch.nn

# float32 and logits of order 1.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Block(nn.Module):
  """BasicBlock or Bottleneck (v1.5) of torchvision."""

  def __init__(self, inputs, width, stride, bottleneck):
    super().__init__()
    outputs = 4 * width if bottleneck else width
    plan = (
      [(width, 1, 1), (width, 3, stride), (outputs, 1, 1)]
      if bottleneck
      else [(width, 3, stride), (width, 3, 1)]
    )
    self.count, last = len(plan), inputs
    for i, (channels, size, step) in enumerate(plan, 1):
      conv = nn.Conv2d(last, channels, size, step, size // 2, bias=False)
      setattr(self, f"conv{i}", conv)
      setattr(self, f"bn{i}", nn.BatchNorm2d(channels))
      last = channels
    self.downsample = None
    if stride > 1 or inputs != outputs:
      self.downsample = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False),
        nn.BatchNorm2d(outputs),
      )

  def forward(self, x):
    y = x
    for i in range(1, self.count + 1):
      y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
      y = y if i == self.count else torch.relu(y)
    return torch.relu(
      y + (x if self.downsample is None else self.downsample(x))
    )


class TorchResNet(nn.Module):
  def __init__(self, classes, stages, bottleneck, width):
    super().__init__()
    self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.maxpool = nn.MaxPool2d(3, 2, 1)
    self.stages, inputs = len(stages), width
    for stage, blocks in enumerate(stages):
      layers, inner = [], width * 2**stage
      for i in range(blocks):
        stride = 2 if stage and not i else 1
        layers.append(Block(inputs, inner, stride, bottleneck))
        inputs = 4 * inner if bottleneck else inner
      setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
    self.fc = nn.Linear(inputs, classes)

  def forward(self, x):
    x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
    for stage in range(self.stages):
      x = getattr(self, f"layer{stage + 1}")(x)
    return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    b, t, d = x.shape
    qkv = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.proj(y.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.fc1 = nn.Linear(width, 4 * width)
    self.fc2 = nn.Linear(4 * width, width)

  def forward(self, x):
    return self.fc2(nn.functional.gelu(self.fc1(x)))


class Layer(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = Attention(width, heads)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = Mlp(width)

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
  def __init__(self, classes, width, depth, heads, patch, image):
    super().__init__()
    tokens = 1 + (image // patch) ** 2
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
    self.patch_embed = nn.Module()
    self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
    self.blocks = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
    self.norm = nn.LayerNorm(width, eps=1e-6)
    self.head = nn.Linear(width, classes)

  def forward(self, x):
    x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
    return self.head(self.norm(self.blocks(x + self.pos_embed))[:, 0])


def shuffle(module):
  """Draws every vector, every token and the statistics anew."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, value in module.state_dict().items():
      if name.endswith("running_var") or (
        value.ndim == 1 and name.endswith("weight")
      ):
        value.uniform_(0.5, 1.5)
      elif value.ndim == 1 or "token" in name or "pos" in name:
        value.normal_(0, 0.2)
  return module


def images(rows, size):
  rng = np.random.default_rng(0)
  return rng.normal(size=(rows, size, size, 3)).astype(np.float32)


def to_torch(x):
  return torch.tensor(x.transpose(0, 3, 1, 2))


def loaded(path, model, size):
  """Our variables with the weights of a file; zeros where it has none."""
  init = functools.partial(init_variables, model, image_shape=(size, size, 3))
  shapes = jax.eval_shape(init, jax.random.key(0))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
  return load_pretrained(str(path), model, zeros)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model, variables, x):
  return make_apply_fn(model)(variables, x, train=False)


TINY = {"stages": (1, 2), "width": 8}


@pytest.mark.parametrize(
  ("options", "size"),
  [
    ({"stages": (2, 2, 2, 2), "bottleneck": False, "width": 64}, 64),
    ({"stages": (3, 4, 6, 3), "bottleneck": True, "width": 64}, 64),
    ({"bottleneck": False, **TINY}, 75),
    ({"bottleneck": True, **TINY}, 75),
  ],
  ids=["resnet18", "resnet50", "basic", "bottleneck"],
)
def test_a_resnet_is_torchvisions(options, size, tmp_path):
  theirs = shuffle(TorchResNet(10, **options)).eval()
  torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
  model = ResNet(10, **options)
  x = images(2, size)
  _, logits, _ = evaluate(
    model, loaded(tmp_path / "resnet.pth", model, size), x
  )
  with torch.no_grad():
    expected = theirs(to_torch(x)).numpy()
  scale = np.abs(expected).max()  # 50 random layers: far from 1
  np.testing.assert_allclose(logits / scale, expected / scale, **CLOSE)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_training_step_of_batch_norm_is_torchs(bottleneck, tmp_path):
  """Logits, gradients and running statistics, the variance unbiased."""
  theirs = shuffle(TorchResNet(10, bottleneck=bottleneck, **TINY)).train()
  torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
  model = ResNet(10, bottleneck=bottleneck, batch_norm="update", **TINY)
  variables = loaded(tmp_path / "resnet.pth", model, 32)
  x = images(4, 32)

  @jax.jit
  def step(params):
    def loss(params):
      _, logits, new = make_apply_fn(model)(
        {**variables, "params": params}, x, train=True
      )
      return jnp.sum(jnp.sin(logits)), (logits, new)

    return jax.grad(loss, has_aux=True)(params)

  grads, (logits, stats) = step(variables["params"])
  expected = theirs(to_torch(x))
  torch.sin(expected).sum().backward()
  np.testing.assert_allclose(logits, expected.detach().numpy(), **CLOSE)
  # The new state dict reads as our new statistics.
  torch.save(theirs.state_dict(), tmp_path / "after.pth")
  after = loaded(tmp_path / "after.pth", model, 32)["batch_stats"]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), stats, after
  )
  # And its gradients as ours.
  for parameter in theirs.parameters():
    parameter.data = parameter.grad
  torch.save(theirs.state_dict(), tmp_path / "grads.pth")
  wanted = loaded(tmp_path / "grads.pth", model, 32)["params"]
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale),
    grads,
    wanted,
  )


def test_a_vit_is_timms(tmp_path):
  theirs = shuffle(
    TimmViT(10, width=48, depth=3, heads=3, patch=16, image=64)
  ).eval()
  torch.save({"state_dict": theirs.state_dict()}, tmp_path / "vit.pth")
  model = ViT(10, width=48, depth=3, heads=3)
  x = images(2, 64)
  _, logits, _ = evaluate(model, loaded(tmp_path / "vit.pth", model, 64), x)
  with torch.no_grad():
    expected = theirs(to_torch(x)).numpy()
  np.testing.assert_allclose(logits, expected, **CLOSE)


def transformers_vit(kind, **options):
  transformers = pytest.importorskip("transformers")
  config = transformers.ViTConfig(**options)
  model = shuffle(getattr(transformers, kind)(config)).eval()
  return model, config.layer_norm_eps


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
@pytest.mark.parametrize("file", ["model.safetensors", "state_dict.pth"])
def test_a_vit_is_transformers(kind, file, tmp_path):
  theirs, epsilon = transformers_vit(
    kind,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=192,
    image_size=64,
    num_labels=10,
  )
  assert epsilon == 1e-12  # ours is timm's 1e-6
  if file == "model.safetensors":
    pytest.importorskip("safetensors")
    theirs.save_pretrained(tmp_path)
  else:
    torch.save(theirs.state_dict(), tmp_path / file)
  model = ViT(10, width=48, depth=3, heads=3)
  x = images(2, 64)
  features, logits, _ = evaluate(model, loaded(tmp_path / file, model, 64), x)
  with torch.no_grad():
    answer = theirs(to_torch(x))
  if kind == "ViTModel":
    expected = answer.last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(features, expected, **CLOSE)
  else:
    np.testing.assert_allclose(logits, answer.logits.numpy(), **CLOSE)


def test_files_of_every_kind_give_the_same_arrays(tmp_path):
  safetensors = pytest.importorskip("safetensors.torch")
  weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
  half = {k: v.to(torch.bfloat16) for k, v in weights.items()}
  safetensors.save_file(half, tmp_path / "a.safetensors")
  torch.save(half, tmp_path / "b.pth")
  torch.save({"model": weights}, tmp_path / "c.pt")
  parallel = {f"module.{k}": nn.Parameter(v) for k, v in weights.items()}
  torch.save({"state_dict": parallel}, tmp_path / "d.bin")
  for name in ("a.safetensors", "b.pth", "c.pt", "d.bin"):
    found = read_weights(str(tmp_path / name))
    assert list(found) == ["a", "b"]
    for key, value in weights.items():
      np.testing.assert_array_equal(
        np.asarray(found[key], np.float32), value.numpy()
      )


def test_nothing_but_tensors_is_read(tmp_path):
  torch.save(
    {"a": torch.ones(1), "f": np.random.default_rng}, tmp_path / "a.pth"
  )
  torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "b.pth")
  torch.save([torch.ones(1)], tmp_path / "c.pth")
  (tmp_path / "d.pth").write_bytes(b"nothing of the kind")
  (tmp_path / "e.pth").touch()
  for name in "abcde":
    with pytest.raises(UserError, match=f"{name}.pth .*state_dict alone"):
      read_weights(str(tmp_path / f"{name}.pth"))
  pytest.importorskip("safetensors")
  (tmp_path / "f.safetensors").write_bytes(b"nothing of the kind")
  with pytest.raises(UserError, match=r"f\.safetensors is no safetensors file"):
    read_weights(str(tmp_path / "f.safetensors"))
