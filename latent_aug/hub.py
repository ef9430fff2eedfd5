"""Finding and reading flows: bundled ones, directories and the Hugging Face hub."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from latent_aug.flows import Flow
from latent_aug.flows.base import CONFIG_NAME, RUN_NAME, WEIGHTS_NAME

LARGEST_CONFIG = 2**16  # bytes; a config is a handful of numbers


def bundled_flows() -> dict[str, Path]:
    """Name and directory of every flow that ships with the package."""
    root = Path(str(resources.files("latent_aug.checkpoints")))
    return {p.name: p for p in sorted(root.iterdir()) if (p / CONFIG_NAME).is_file()}


def load_flow(
    name_or_path: str | Path = "glow-cifar10",
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> Flow:
    """Load a trained flow: frozen, in evaluation mode, ready to encode and decode.

    Args:
        name_or_path: A bundled name, a local directory, or "org/repo" on the Hugging Face hub,
            looked for in that order. Offline mode, mirrors and tokens are the hub client's
            (`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN`).
        revision: Branch, tag or commit of a hub repository.
        device: Where to put the weights; the CPU by default.

    Returns:
        A flow of its own, not shared with other callers.

    Raises:
        ValueError: The name is unknown, or config or weights are not what they should be.
        OSError: The directory or repository cannot be read.

    Example:
        >>> flow = load_flow("glow-fashionmnist")
        >>> flow.channels, flow.multiple
        (1, 4)
    """
    directory, origin = locate(str(name_or_path), revision)
    flow = read_flow(directory).to(device)
    flow.loaded_from = (*origin, flow.weights_version())
    return flow


def locate(name: str, revision: str | None = None) -> tuple[Path, tuple[str, str | None]]:
    """The directory that holds a flow, and the name and commit under which to find it again."""
    bundled, path = bundled_flows(), Path(name).expanduser()
    if name in bundled or path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision is for flows on the hub; {name!r} is here, got {revision!r}"
            )
        if name in bundled:
            return bundled[name], (name, None)
        return path, (str(path.resolve()), None)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"there is no flow {name!r}: give a bundled name ({', '.join(bundled)}), an existing "
            'directory, or "org/repo" on the Hugging Face hub'
        )
    wanted = [CONFIG_NAME, WEIGHTS_NAME]
    snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    return snapshot, (name, snapshot.name)


def read_flow(directory: Path) -> Flow:
    """Build a flow from config and weights in a directory; strict in both."""
    if not (directory / CONFIG_NAME).exists() and (directory / RUN_NAME).exists():
        raise FileNotFoundError(f"{directory} holds an unfinished training run; finish it first")
    config = read_config(directory / CONFIG_NAME)
    architecture = config.pop("architecture", None)
    if not isinstance(architecture, str) or architecture not in Flow.architectures:
        known = ", ".join(sorted(Flow.architectures))
        raise ValueError(
            f"{directory / CONFIG_NAME}: unknown architecture {architecture!r}; known: {known}"
        )
    try:
        # The caller's random draws stay as they were, and the weights serve outside inference mode.
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            flow = Flow.architectures[architecture].from_config(config)
            load_weights(flow, directory / WEIGHTS_NAME)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return flow.requires_grad_(False).eval()


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a small file."""
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path} is larger than {LARGEST_CONFIG} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def load_weights(flow: Flow, path: Path) -> None:
    """Load safetensors into a flow whose keys and shapes must agree exactly."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_NAME} is not a valid safetensors file: {error}") from error
    expected = flow.state_dict()
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{WEIGHTS_NAME} does not fit the config; missing: {sorted(missing)[:3]}, "
            f"unexpected: {sorted(unexpected)[:3]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the config says "
                f"{tuple(expected[name].shape)}"
            )
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype}, the flow has {expected[name].dtype}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
    flow.load_state_dict(tensors)


def shared_flow(name: str, revision: str | None = None) -> Flow:
    """The one flow of this name in this process; read again where its weights file changed."""
    directory, (name, revision) = locate(name, revision)
    return _load_once(name, revision, (directory / WEIGHTS_NAME).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _load_once(name: str, revision: str | None, modified: int) -> Flow:
    return load_flow(name, revision=revision)


class HeldFlow:
    """A flow as a transform holds it: shared in this process, out of sight of `parameters()`.

    Pickled by name where it was loaded and its weights are as they were, so that a spawned
    worker loads it by itself; with its weights otherwise.

    Args:
        flow: A flow, or anything `load_flow` takes, which is loaded once in a process.
    """

    def __init__(self, flow: Flow | str | Path) -> None:
        if isinstance(flow, (str, Path)):
            flow = shared_flow(str(flow))
        elif not isinstance(flow, Flow):
            raise TypeError(f"flow must be a Flow, a name or a path, got {type(flow).__name__}")
        self.flow = flow

    def __reduce__(self) -> tuple[Any, ...]:
        if self.flow.loaded_from is not None:
            name, revision, version = self.flow.loaded_from
            if version == self.flow.weights_version():
                return _held_by_name, (name, revision)
        return HeldFlow, (self.flow,)


def _held_by_name(name: str, revision: str | None) -> HeldFlow:
    return HeldFlow(shared_flow(name, revision))
