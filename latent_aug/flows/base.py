"""The contract every flow keeps, whoever wrote it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from latent_aug.utils.arguments import require_natural, require_number, require_positive
from latent_aug.utils.files import compute_sha256, write_whole
from latent_aug.utils.randomness import sample_normal, sample_uniform

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
DIGEST_KEY = "sha256"  # in the metadata of the weights
CARD_NAME = "README.md"
SHORT_CARD = """\
---
library_name: latent-aug
tags: [normalizing-flow, data-augmentation]
---
# {repo_id}

A {kind} flow for latent perturbations with [latent-aug](https://pypi.org/project/latent-aug/):

```python
from latent_aug import LatentPerturb

augment = LatentPerturb(flow="{repo_id}")
```

Config: `{config}`.
"""
MOST_PARAMETERS = 2**28  # of a config from outside (the paper's Glow has 44 million)
RUN_NAME = "run.pt"  # the state of a training run, beside the flow it ends in
SAMPLED_SIDE = 32  # of the images that `Flow.sample` draws where no size is given


def compute_digest(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Compute the SHA-256 of a flow: its config, and each tensor's name, type, shape and bytes."""
    config = json.loads(json.dumps(config))  # as it is read back: keys are strings
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def is_setting(name: str, value: Any) -> bool:
    """Whether a module's attribute is a plain value: a number, a text, or a tuple of these."""
    if name.startswith("_") or name in ("training", "loaded_from"):
        return False
    if isinstance(value, (tuple, list)):
        return all(is_setting(name, part) for part in value)
    return type(value) in (int, float, str, bool)


def require_config(config: dict[str, Any], largest: dict[str, int], number: str) -> None:
    """Refuse a config from outside that does not hold a constructor's arguments.

    Args:
        config: The content of a config file.
        largest: The names of the sizes it must hold, and the largest value of each.
        number: The name of the number it must also hold, whose range the constructor checks.

    Raises:
        ValueError: A key is unknown or missing, or a value of the wrong type or too large.
    """
    expected = {*largest, number}
    if set(config) != expected:
        raise ValueError(f"config must have the keys {sorted(expected)}, got {sorted(config)}")
    for name, limit in largest.items():
        value = config[name]
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(f"{name} must be an integer from 1 to {limit}, got {value!r}")
    if type(config[number]) not in (int, float):
        raise ValueError(f"{number} must be a number, got {config[number]!r}")


def require_parameter_count(count: int) -> None:
    """Refuse a flow of so many parameters that building it could exhaust the memory.

    Raises:
        ValueError: It has more than `MOST_PARAMETERS`.
    """
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"config must describe at most {MOST_PARAMETERS:,} parameters, got about {count:,}"
        )


def dequantize(x: Tensor, noise: Tensor) -> Tensor:
    """Spread 8-bit images (values v / 255) over their bins by uniform noise in [0, 1)."""
    return x + (noise - 0.5) / 255


def compute_bits(log_prob: Tensor, x: Tensor) -> Tensor:
    """Compute the bits per dimension of images (B, C, H, W) from their log-density in nats (B,)."""
    return (math.log(255) - log_prob / math.prod(x.shape[1:])) / math.log(2)


class Flow(nn.Module):
    """An invertible map between images and latents of the same shape, with an N(0, I) prior.

    Subclass it, set the attributes and write `encode` and `decode`. Every transform and attack of
    the package then works with it. `log_prob` is for training and for bits/dim. Add `config` and
    `from_config` to save and load it.

    Attributes:
        channels: The number of image channels.
        multiple: Height and width must be multiples of it. The transforms pad and crop.
        size: The only (H, W) it maps, or None for any size.
        num_classes: The number of classes of a conditional flow, whose `encode` and `decode` need
            `y`. 0 for any other flow.
        levels: The number of scales of its latents, see `split_levels`.
        spatial: Whether a latent's places are the image's, so that a region can move alone.
        network_dtype: The precision of its networks, where it can lower that. None for that of
            the input.

    Source: the paper's §2 writes F for `encode` and F⁻¹ for `decode`.

    Example:
        >>> import torch
        >>> class Identity(Flow):
        ...     channels = 3
        ...
        ...     def encode(self, x, y=None):
        ...         return x
        ...
        ...     def decode(self, z, y=None):
        ...         return z
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.equal(Identity().decode(Identity().encode(x)), x)
        True
    """

    architectures: ClassVar[dict[str, type[Flow]]] = {}

    channels: int
    multiple: int = 1
    size: tuple[int, int] | None = None
    num_classes: int = 0
    levels: int = 1
    spatial: bool = True
    network_dtype: torch.dtype | None = None
    # the name, the commit, and the weights' version and fingerprint when they were loaded
    loaded_from: tuple[str, str | None, tuple[tuple[Any, ...], str]] | None = None
    read_from: tuple[Path, int] | None = None  # the file of its weights, and when it was written
    card: Path | None = None  # the model card that lay beside the weights when they were loaded

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = Flow.architectures.get(cls.__name__)
        if before is not None and before.__module__.startswith("latent_aug."):
            raise TypeError(f"{cls.__name__} is a flow of latent_aug; choose another class name")
        Flow.architectures[cls.__name__] = cls

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map images to latents of the same shape, which the prior N(0, I) describes.

        Args:
            x: Images (B, C, H, W), float in [0, 1].
            y: The images' classes (B,) or class probabilities (B, num_classes), for a conditional
                flow.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode(x, y=None)")

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map latents to images (B, C, H, W), not clamped: the exact inverse of `encode`.

        Args:
            z: Latents (B, C, H, W).
            y: The classes that the latents were encoded with, for a conditional flow.
        """
        raise NotImplementedError(f"{type(self).__name__} must define decode(z, y=None)")

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the log-density of images (B, C, H, W) in [0, 1], exact at x: (B,), in nats."""
        raise NotImplementedError(f"{type(self).__name__} does not define log_prob(x, y=None)")

    def is_initialized(self) -> bool:
        """Whether `initialize` was called, or nothing of the flow depends on it."""
        return True

    def initialize(self, x: Tensor) -> None:
        """Set the parts that depend on data, before training.

        Args:
            x: One batch of images (B, C, H, W), float in [0, 1].
        """

    def split_levels(self, z: Tensor) -> list[Tensor]:
        """Split a latent (B, C, H, W) into levels, finest first, each at its own resolution."""
        return [z]

    def join_levels(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo `split_levels`."""
        (z,) = parts
        return z

    @torch.no_grad()
    def sample(
        self,
        count: int,
        y: Tensor | None = None,
        *,
        size: int | tuple[int, int] | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images from the flow: normal latents, decoded.

        Args:
            count: The number of images.
            y: Their classes (count,) or class probabilities (count, num_classes), for a
                conditional flow. By default the classes come in turn: 0, 1, 2, ...
            size: Height and width of the images, or one number for both. By default the flow's
                only size, or 32 x 32, rounded up to the flow's `multiple`.
            temperature: Standard deviation of the latents. About 0.7 gives smoother images than 1.
            generator: The generator to draw from, of any device. By default torch's global one of
                the flow's device.

        Returns:
            Images (count, C, H, W), float32 in [0, 1], on the flow's device.

        Raises:
            ValueError: `count` or `size` is out of range, the flow does not map this size, or
                `temperature` is negative or not finite.
            TypeError: `temperature` is no number.

        Source: Kingma & Dhariwal 2018, §5, on temperature.

        Example:
            >>> from latent_aug import load_flow
            >>> load_flow("glow-fashionmnist").sample(4, size=28, temperature=0.7).shape
            torch.Size([4, 1, 28, 28])
        """
        shape = (require_natural("count", count), self.channels, *self._choose_size(size))
        if not 0 <= require_number("temperature", temperature) < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {temperature!r}")
        like = torch.empty(0, dtype=torch.float32, device=self.device)
        z = temperature * sample_normal(shape, like, generator)
        if y is None and self.num_classes:
            y = torch.arange(count, device=z.device) % self.num_classes
        y = None if y is None else torch.as_tensor(y, device=z.device)
        return self.decode(z, y).clamp(0, 1)

    def _choose_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Return the (H, W) of images to draw, the flow's own by default."""
        if size is None:
            side = SAMPLED_SIDE + -SAMPLED_SIDE % self.multiple
            height, width = self.size or (side, side)
            return height, width
        sides = size if isinstance(size, (tuple, list)) else (size, size)
        if len(sides) != 2:
            raise ValueError(f"size must be a number or (height, width), got {size!r}")
        height, width = (require_positive("size", side) for side in sides)
        if self.size is not None and (height, width) != tuple(self.size):
            raise ValueError(f"size must be {self.size}, the only one of this flow, got {size!r}")
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"size must be divisible by {self.multiple} for this flow, got {size!r}"
            )
        return height, width

    @property
    def device(self) -> torch.device:
        """The device of its weights.

        Of a flow without parameters and buffers it is the CPU, or the device that was assigned
        here. Assigning moves no weights: use ``flow.to(device)``.
        """
        for weight in chain(self.parameters(), self.buffers()):
            return weight.device
        return torch.device(self.__dict__.get("device") or "cpu")

    @device.setter
    def device(self, device: str | torch.device | None) -> None:  # users' flows may do so
        self.__dict__["device"] = device

    def bits_per_dim(
        self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Compute the negative log-likelihood of 8-bit images in bits per dimension: (B,).

        Uniform dequantization noise, one bin wide, is added to x. The result is an upper bound on
        the bits of the discrete image (Theis et al. 2016, §3.1).

        Args:
            x: Images (B, C, H, W), values v / 255.
            y: Their classes, for a conditional flow.
            generator: The generator of the noise, of any device. By default torch's global one.

        Raises:
            TypeError: x is no tensor of floats.
            NotImplementedError: The flow has no `log_prob`.
        """
        if not x.is_floating_point():
            raise TypeError(f"x must be floats, got {x.dtype}: divide 8-bit values by 255")
        noise = sample_uniform(x.shape, x, generator)
        return compute_bits(self.log_prob(dequantize(x, noise), y), x)

    def weights_version(self) -> tuple[Any, ...]:
        """Return what changes when a parameter or buffer is written to, moved or replaced.

        Torch leaves no sign of some ways to write: through `.data`, by a fused optimizer, by a
        collective such as `broadcast`. After these, call ``flow.eval()`` to have the new weights
        seen by a flow in evaluation mode.
        """
        tensors = (*self.parameters(), *self.buffers())
        return tuple((t.data_ptr(), t._version) for t in tensors)

    def is_as_loaded(self) -> bool:
        """Whether it came from `load_flow` and has not changed since."""
        if self.loaded_from is None:
            return False
        version, fingerprint = self.loaded_from[2]
        return bool(version == self.weights_version() and fingerprint == self.fingerprint())

    def _apply(self, *args: Any, **kwargs: Any) -> Flow:
        with torch.inference_mode(False):  # the weights serve outside it
            super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def fingerprint(self) -> str:
        """Compute the SHA-256 of all that latents depend on: class, precision, settings, weights.

        The settings are the numbers it holds and its `config`. Without a `config` they are all
        plain attributes of the flow and of its submodules.
        """
        settings = {k: v for k, v in vars(self).items() if type(v) in (int, float)}
        try:
            settings |= self.config
        except NotImplementedError:
            for place, module in self.named_modules():
                start = f"{place}." if place else ""
                settings |= {start + k: v for k, v in vars(module).items() if is_setting(k, v)}
        about = [type(self).__name__, str(self.network_dtype), settings]
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        return compute_digest({"about": about}, tensors)

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-ready constructor arguments. Absent ones are None."""
        raise NotImplementedError(f"{type(self).__name__} has no config, so it cannot be saved")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Flow:
        """Build the flow from a config that came from outside, which is validated first."""
        raise NotImplementedError(f"{cls.__name__} has no from_config, so it cannot be loaded")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` for `load_flow`.

        The weights' header holds a digest of both, so that damage does not go unnoticed.

        Args:
            directory: The directory to write to, which is made where it does not exist.

        Raises:
            NotImplementedError: The flow has no `config`.
        """
        config = {"architecture": type(self).__name__, **self.config}
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        # Before anything is written. save_file would make files that only their owner may read.
        weights = save(tensors, {DIGEST_KEY: compute_digest(config, tensors)})
        directory = Path(directory).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        # The large file first: where it fails, a flow that was there stays as it was.
        write_whole(directory / WEIGHTS_NAME, weights)
        write_whole(directory / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Upload config, weights, card and its pictures to "org/repo" on the Hugging Face hub.

        Uses the token of `hf auth login`. Creates the repository where it does not exist. The
        card of unchanged weights is the one that lay beside them. Otherwise it is a short one that
        says how to load the flow.

        Args:
            repo_id: The repository to upload to, "org/repo".
            private: Whether a new repository is private. By default the account decides, usually
                for a public one. A repository that exists stays as it is.

        Returns:
            The commit's address.

        Raises:
            ValueError: The name is not one that the hub allows.
            OSError: The hub cannot be reached, or refuses.
        """
        import tempfile

        from huggingface_hub import HfApi, constants

        api = HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            with tempfile.TemporaryDirectory() as directory:
                self.save_pretrained(directory)
                self._write_card(Path(directory), repo_id)
                commit = api.upload_folder(repo_id=repo_id, folder_path=directory)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of the HTTP library, which is another one in each version
            raise OSError(
                f"{repo_id} could not be pushed to the hub at {constants.ENDPOINT}, which "
                f"HF_ENDPOINT may change: {type(error).__name__}: {error}"
            ) from error
        return str(commit.commit_url)

    def _write_card(self, directory: Path, repo_id: str) -> None:
        """Write the card of what is pushed, and its pictures only: others may be private."""
        text = self._read_card(directory / WEIGHTS_NAME)
        if self.card and text:
            if named := re.search('flow="([^"]*)"', text):  # by the name it had when it was made
                text = text.replace(named[0], f'flow="{repo_id}"')
                text = text.replace(f"DATA --init {named[1]} ", f"DATA --init {repo_id} ")
            (directory / CARD_NAME).write_text(text, encoding="utf-8")
            for path in self.card.parent.glob("*.png"):
                if f"]({path.name})" in text:
                    shutil.copy(path, directory)
            return
        text = SHORT_CARD.format(repo_id=repo_id, kind=type(self).__name__, config=self.config)
        (directory / CARD_NAME).write_text(text, encoding="utf-8")

    def _read_card(self, weights: Path) -> str:
        """Read the card, with the SHA-256 of these weights. It is empty where it is not theirs."""
        unchanged = self.loaded_from is not None and self.loaded_from[2][1] == self.fingerprint()
        if not self.card or not unchanged:
            return ""
        text = self.card.read_text(encoding="utf-8", errors="replace")
        named = re.search(f"SHA-256 of `{WEIGHTS_NAME}`: `([0-9a-f]+)`", text)
        if not named:
            return text
        if named[1] != compute_sha256(self.card.with_name(WEIGHTS_NAME)):
            return ""
        # The same weights as saved by an earlier version are other bytes.
        return text.replace(named[1], compute_sha256(weights))


def preprocess(x: Tensor) -> Tensor:
    """Bring values in [0, 1] to the middle of their bins in [-½, ½]: (255 x + ½) / 256 - ½."""
    return x * (255 / 256) + (0.5 / 256 - 0.5)


def postprocess(z: Tensor) -> Tensor:
    """Undo `preprocess`."""
    return (z + (0.5 - 0.5 / 256)) * (256 / 255)
