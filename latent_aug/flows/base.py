"""The contract every flow keeps, whoever wrote it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from latent_aug.utils.files import write_whole
from latent_aug.utils.randomness import sample_uniform

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
MOST_PARAMETERS = 2**28  # of a config from outside; the paper's Glow has 44 million
RUN_NAME = "run.pt"  # the state of a training run, beside the flow it ends in


def digest_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a flow: its config, and each tensor's name, type, shape and bytes."""
    config = json.loads(json.dumps(config))  # as it is read back: keys are strings
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def is_setting(name: str, value: Any) -> bool:
    """Whether an attribute of a module is plain and its own: a number, text, or a tuple of such."""
    if name.startswith("_") or name in ("training", "loaded_from"):
        return False
    if isinstance(value, (tuple, list)):
        return all(is_setting(name, part) for part in value)
    return type(value) in (int, float, str, bool)


def check_config(config: dict[str, Any], largest: dict[str, int], number: str) -> None:
    """Refuse a config from outside that does not hold a constructor's arguments.

    Args:
        config: From a file.
        largest: The sizes that must be there, integers from 1 to so much.
        number: What else must be there, a number; the constructor checks its range.

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


def check_parameters(count: int) -> None:
    """Refuse a config of so many parameters that building it could exhaust the memory.

    Raises:
        ValueError: It has more than `MOST_PARAMETERS`.
    """
    if count > MOST_PARAMETERS:
        raise ValueError(f"this config is of more than {MOST_PARAMETERS:,} parameters")


def dequantized(x: Tensor, noise: Tensor) -> Tensor:
    """8-bit images (values v / 255) spread over their bins by uniform noise in [0, 1)."""
    return x + (noise - 0.5) / 255


def bits_of(log_prob: Tensor, x: Tensor) -> Tensor:
    """Bits per dimension of 8-bit images (B, C, H, W) from their log-density (B,), in nats."""
    return (math.log(255) - log_prob / math.prod(x.shape[1:])) / math.log(2)


class Flow(nn.Module):
    """An invertible map between images and latents of the same shape, with an N(0, I) prior.

    Subclass it, set the attributes and write `encode` and `decode`: every transform and attack of
    the package then works with it. `log_prob` is for training and for bits/dim. Add `config` and
    `from_config` to save and load it.

    Attributes:
        channels: Channels of the images it maps.
        multiple: Height and width must divide by it; the transforms pad and crop.
        size: The only (H, W) it maps; None for any size.
        num_classes: Above 0 for a conditional flow, whose `encode` and `decode` need `y`.
        levels: Scales of its latent, see `split_levels`.
        spatial: Whether a latent's places are the image's, so that a region's can move alone.
        network_dtype: Precision of its networks, where it can lower that; None is the input's.

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
    # name, commit, and the weights' version and fingerprint when they were loaded
    loaded_from: tuple[str, str | None, tuple[tuple[Any, ...], str]] | None = None
    read_from: tuple[Path, int] | None = None  # its weights' file, and when that was written
    card: Path | None = None  # the model card that lay beside the weights when they were loaded

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = Flow.architectures.get(cls.__name__)
        if before is not None and before.__module__.startswith("latent_aug."):
            raise TypeError(f"{cls.__name__} is a flow of latent_aug; choose another class name")
        Flow.architectures[cls.__name__] = cls

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), float in [0, 1], to latents of the same shape, prior N(0, I)."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(x, y=None)")

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Exact inverse of `encode`; (B, C, H, W), not clamped."""
        raise NotImplementedError(f"{type(self).__name__} must define decode(z, y=None)")

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-density of x in [0, 1], exact at x: (B,), in nats."""
        raise NotImplementedError(f"{type(self).__name__} does not define log_prob(x, y=None)")

    def is_initialized(self) -> bool:
        """Whether what `initialize` sets is set; a flow without such parts always is."""
        return True

    def initialize(self, x: Tensor) -> None:
        """Set what depends on data from one batch (B, C, H, W) in [0, 1], before training."""

    def split_levels(self, z: Tensor) -> list[Tensor]:
        """The parts of a latent (B, C, H, W), finest level first, each at its own resolution."""
        return [z]

    def join_levels(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo `split_levels`."""
        (z,) = parts
        return z

    def bits_per_dim(
        self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Negative log-likelihood of 8-bit images in bits per dimension: (B,).

        Uniform dequantization noise, one bin wide, is added to x (values v / 255); the result is
        an upper bound on the bits of the discrete image (Theis et al. 2016, §3.1).
        """
        noise = sample_uniform(x.shape, x, generator)
        return bits_of(self.log_prob(dequantized(x, noise), y), x)

    def weights_version(self) -> tuple[Any, ...]:
        """Something that changes when a parameter or buffer is written to, moved or replaced.

        Torch leaves no sign of some ways to write: through `.data`, by a fused optimizer, by a
        collective such as `broadcast`. A flow that was in evaluation mode meanwhile has its new
        weights seen after ``flow.eval()``.
        """
        tensors = (*self.parameters(), *self.buffers())
        return tuple((t.data_ptr(), t._version) for t in tensors)

    def is_as_loaded(self) -> bool:
        """Whether it came from `load_flow`, and nothing of it has changed since."""
        if self.loaded_from is None:
            return False
        version, fingerprint = self.loaded_from[2]
        return bool(version == self.weights_version() and fingerprint == self.fingerprint())

    def _apply(self, *args: Any, **kwargs: Any) -> Flow:
        with torch.inference_mode(False):  # the weights serve outside it
            super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def fingerprint(self) -> str:
        """SHA-256 of what the latents follow from: class, precision, settings and weights.

        Settings are the numbers it holds and its `config`; where it has no `config`, all plain
        attributes of it and its submodules.
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
        return digest_of({"about": about}, tensors)

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-ready constructor arguments; absent ones are None."""
        raise NotImplementedError(f"{type(self).__name__} has no config, so it cannot be saved")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Flow:
        """Build the flow from a config that came from outside: validate, then construct."""
        raise NotImplementedError(f"{cls.__name__} has no from_config, so it cannot be loaded")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` for `load_flow` into the directory.

        The weights' header holds a digest of both, so that damage does not go unnoticed.
        """
        config = {"architecture": type(self).__name__, **self.config}
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        # Before anything is written; save_file makes files that only their owner may read.
        weights = save(tensors, {DIGEST_KEY: digest_of(config, tensors)})
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # The large file first: where it fails, a flow that was there stays as it was.
        write_whole(directory / WEIGHTS_NAME, weights)
        write_whole(directory / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Upload config, weights, card and its pictures to "org/repo" on the Hugging Face hub.

        Uses the token of `hf auth login`. Creates the repository where it does not exist. The
        card is the one that lay beside the weights where they are as they were loaded, else a
        short one that says how to load the flow.

        Args:
            repo_id: Where to, "org/repo".
            private: Whether a new repository is; by default as the account has it, usually not.
                One that is there stays as it is.

        Returns:
            The commit's address.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            self._write_card(Path(directory), repo_id)
            commit = api.upload_folder(repo_id=repo_id, folder_path=directory)
        return str(commit.commit_url)

    def _write_card(self, directory: Path, repo_id: str) -> None:
        """Of what is pushed, with its pictures: others may show training images."""
        if self.card and self.is_as_loaded():
            text = self.card.read_text(encoding="utf-8", errors="replace")
            named = text.replace(f'flow="{self.card.parent.name}"', f'flow="{repo_id}"')
            (directory / CARD_NAME).write_text(named, encoding="utf-8")
            for path in self.card.parent.glob("*.png"):
                if f"]({path.name})" in text:
                    shutil.copy(path, directory)
            return
        text = SHORT_CARD.format(repo_id=repo_id, kind=type(self).__name__, config=self.config)
        (directory / CARD_NAME).write_text(text, encoding="utf-8")


def preprocess(x: Tensor) -> Tensor:
    """[0, 1] to the middle of its bin in [-½, ½]: (255 x + ½) / 256 - ½."""
    return x * (255 / 256) + (0.5 / 256 - 0.5)


def postprocess(z: Tensor) -> Tensor:
    """Undo `preprocess`."""
    return (z + (0.5 - 0.5 / 256)) * (256 / 255)
