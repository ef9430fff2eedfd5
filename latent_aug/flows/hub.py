"""Finding and reading flows: bundled ones, directories and the Hugging Face hub."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from latent_aug.checkpoints import SHA256  # type: ignore[import-not-found,unused-ignore]
from latent_aug.flows.backend import use_plain_defaults
from latent_aug.flows.base import (
    CARD_NAME,
    CONFIG_NAME,
    DIGEST_KEY,
    RUN_NAME,
    WEIGHTS_NAME,
    Flow,
    compute_digest,
)
from latent_aug.utils.files import compute_sha256

LARGEST_CONFIG = 2**16  # bytes of a config, which holds a handful of numbers
OTHER_WEIGHTS = (
    "they were trained anew: install the latent-aug that had the former ones, or take these"
)


def bundled_flows() -> dict[str, Path]:
    """Return the name and directory of every flow that ships with the package."""
    root = Path(str(resources.files("latent_aug.checkpoints")))
    return {p.name: p for p in sorted(root.iterdir()) if (p / CONFIG_NAME).is_file()}


def load_flow(
    name_or_path: str | Path = "glow-photographs",
    *,
    revision: str | None = None,
    sha256: str | None = None,
    device: str | torch.device | None = None,
) -> Flow:
    """Load a trained flow: frozen, in evaluation mode, ready to encode and decode.

    Weights are loaded in the same precision whatever torch's default dtype and device are.

    Args:
        name_or_path: A bundled name, a local directory, or "org/repo" on the Hugging Face hub,
            looked for in that order. Offline mode, mirrors and tokens are the hub client's
            (`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN`).
        revision: Branch, tag or commit of a hub repository.
        sha256: The SHA-256 of the weights' file, as a card gives it. Other weights are refused.
        device: The device to put the weights on, by default the CPU.

    Returns:
        A flow that no other caller shares.

    Raises:
        TypeError: `sha256` is no string.
        ValueError: The name is unknown, or config or weights are not what they should be.
        OSError: The directory or repository cannot be read, or its weights are not those of
            `sha256`.

    Example:
        >>> flow = load_flow("glow-fashionmnist")
        >>> flow.channels, flow.multiple
        (1, 4)
    """
    if sha256 is not None and not isinstance(sha256, str):
        raise TypeError(f"sha256 must be a string of 64 hex digits, got {sha256!r}")
    directory, origin = locate(str(name_or_path), revision)
    expected, weights = SHA256.get(origin[0]), directory / WEIGHTS_NAME
    if expected is not None or sha256 is not None:
        found = compute_sha256(weights)
        if expected is not None and found != expected:
            raise OSError(f"{weights} was changed; install latent-aug again")
        if sha256 is not None and found != sha256.lower():
            raise OSError(
                f"the weights of {origin[0]!r} have SHA-256 {found}, and sha256={sha256!r} was "
                f"asked for; {OTHER_WEIGHTS}"
            )
    read_from = weights, get_write_time(weights)
    with torch.inference_mode(False):  # the weights serve outside it
        flow = read_flow(directory)
        fingerprint = flow.fingerprint()  # here, as the weights would have to come back for it
        flow = flow.to(device)
    flow.read_from = read_from
    flow.loaded_from = (*origin, (flow.weights_version(), fingerprint))
    card = directory / CARD_NAME
    flow.card = card if card.is_file() else None
    return flow


def locate(name: str, revision: str | None = None) -> tuple[Path, tuple[str, str | None]]:
    """Find the directory of a flow, and the name and commit under which to find it again."""
    bundled, path = bundled_flows(), Path(name).expanduser()
    if name in bundled or path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision is for flows on the hub; {name!r} is here, got {revision!r}"
            )
        if name in bundled:
            if path.is_dir():
                warnings.warn(
                    f"{name!r} is the bundled flow; the directory of this name is './{name}'",
                    stacklevel=3,
                )
            return bundled[name], (name, None)
        return path, (str(path.resolve()), None)
    if path.is_file():
        raise ValueError(f"{name} is a file: give the directory that holds it")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise ValueError(
            f"there is no flow {name!r}: give a bundled name ({', '.join(bundled)}), an existing "
            'directory, or "org/repo" on the Hugging Face hub'
        )
    snapshot = download(name, revision, bundled)
    return snapshot, (name, snapshot.name)


def download(name: str, revision: str | None, bundled: Iterable[str]) -> Path:
    """Download config and weights of a hub repository at one commit into the hub's cache.

    Args:
        name: The repository, "org/repo".
        revision: A branch, tag or commit, or None for the main branch.
        bundled: The bundled flows' names, for the error message.

    Returns:
        The directory of that commit in the cache.

    Raises:
        OSError: The repository cannot be read, or what came is not what the hub announced.
    """
    from huggingface_hub import constants, snapshot_download  # takes long to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [CONFIG_NAME, WEIGHTS_NAME]
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        try:  # a commit does not change, so that a cached one needs no network
            snapshot = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
        else:
            if all((snapshot / file).is_file() for file in wanted):
                verify_digest(snapshot / WEIGHTS_NAME)
                return snapshot
    try:
        try:
            found = snapshot_download(name, revision=revision, allow_patterns=wanted)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
            found = snapshot_download(name, revision=revision, allow_patterns=wanted)
        snapshot = Path(found)
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"there is no directory {Path(name).absolute()}; as a repository on the hub {name} is "
            f"not in the cache, and the hub was not reached: {error}"
        ) from error
    except HfHubHTTPError as error:
        where = name if revision is None else f"{name} at revision {revision!r}"
        raise OSError(
            f"no flow could be read from {where} on the hub: {error}\n(bundled flows: "
            f"{', '.join(bundled)}; private repositories need a token: hf auth login, or HF_TOKEN)"
        ) from error
    except Exception as error:  # of the HTTP library, which is another one in each version
        raise OSError(
            f"{name} could not be read from the hub at {constants.ENDPOINT}, which HF_ENDPOINT may "
            f"change: {type(error).__name__}: {error}"
        ) from error
    verify_digest(snapshot / WEIGHTS_NAME)
    return snapshot


def verify_digest(path: Path) -> None:
    """Compare a file of the hub's cache with the SHA-256 that the cache keeps it under.

    Raises:
        OSError: They differ. The file is removed, so that the next call fetches it anew.
    """
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return  # small files are under git's names, and some systems have no links
    found = compute_sha256(blob)
    if found != blob.name:
        blob.unlink()
        raise OSError(f"{path} has SHA-256 {found}, the hub says {blob.name}; it was removed")


def read_flow(directory: Path) -> Flow:
    """Build a flow from the config and the weights in a directory, strict in both."""
    if not (directory / CONFIG_NAME).exists() and (directory / RUN_NAME).exists():
        raise FileNotFoundError(
            f"{directory} holds an unfinished training run; give its command again to go on"
        )
    if not (directory / CONFIG_NAME).exists():
        raise FileNotFoundError(
            f"{directory} holds no flow: there is no {CONFIG_NAME}, which save_pretrained and "
            "`latent-aug train --output` write"
        )
    config = read_config(directory / CONFIG_NAME)
    architecture = config.pop("architecture", None)
    if not isinstance(architecture, str) or architecture not in Flow.architectures:
        known = ", ".join(sorted(Flow.architectures))
        raise ValueError(
            f"{directory / CONFIG_NAME}: unknown architecture {architecture!r}; known: {known}; a "
            "flow of your own is known in Python, once its module is imported"
        )
    try:
        # The caller's random draws stay as they were.
        with torch.random.fork_rng(devices=[]), use_plain_defaults():
            flow = Flow.architectures[architecture].from_config(copy.deepcopy(config))
            load_weights(flow, directory / WEIGHTS_NAME, {"architecture": architecture, **config})
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return flow.requires_grad_(False).eval()


def read_config(path: Path) -> dict[str, Any]:
    """Read the JSON object in a small file."""
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path} is larger than {LARGEST_CONFIG} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def load_weights(flow: Flow, path: Path, config: dict[str, Any]) -> None:
    """Load safetensors into a flow whose keys and shapes must agree exactly."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_NAME} is not a valid safetensors file: {error}") from error
    unknown = metadata.keys() - {"format", DIGEST_KEY}
    if unknown:
        raise ValueError(f"{WEIGHTS_NAME} has unknown metadata: {sorted(unknown)[:3]}")
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
    if DIGEST_KEY in metadata and metadata[DIGEST_KEY] != compute_digest(config, tensors):
        raise ValueError(
            f"{WEIGHTS_NAME} and {CONFIG_NAME} are not as they were saved: their digest differs"
        )
    flow.load_state_dict(tensors)


def get_shared_flow(name: str, revision: str | None = None) -> Flow:
    """Return this process's one flow of this name, read again where its weights file changed."""
    directory, (name, revision) = locate(name, revision)
    return _load_once(name, revision, get_write_time(directory / WEIGHTS_NAME))


def get_write_time(path: Path) -> int:
    """Return when a file was last written, in nanoseconds, or 0 where it is not there."""
    return path.stat().st_mtime_ns if path.is_file() else 0


@lru_cache(maxsize=8)
def _load_once(name: str, revision: str | None, modified: int) -> Flow:
    return load_flow(name, revision=revision)


class HeldFlow:
    """A flow as a transform holds it: shared in this process, out of sight of `parameters()`.

    A flow that was loaded, and whose weights and their file are unchanged, is pickled by name. A
    spawned worker so loads it by itself. Any other flow is pickled with its weights.

    Args:
        flow: A flow, or anything `load_flow` takes, which is loaded once in a process.
    """

    def __init__(self, flow: Flow | str | Path) -> None:
        if isinstance(flow, (str, Path)):
            flow = get_shared_flow(str(flow))
        elif not isinstance(flow, Flow):
            raise TypeError(f"flow must be a Flow, a name or a path, got {type(flow).__name__}")
        self.flow = flow

    def __reduce__(self) -> tuple[Any, ...]:
        path, when = self.flow.read_from or (Path(), 0)
        if self.flow.loaded_from and get_write_time(path) == when and self.flow.is_as_loaded():
            name, revision, (_, fingerprint) = self.flow.loaded_from
            return _hold_by_name, (name, revision, fingerprint, type(self.flow))
        return HeldFlow, (self.flow,)


def _hold_by_name(
    name: str,
    revision: str | None,
    fingerprint: str | None = None,
    kind: type[Flow] = Flow,
) -> HeldFlow:
    """Load the flow that a pickle names; refuse one of other weights.

    Reading its class from the pickle has imported the module of a user's flow.

    Raises:
        OSError: The flow of this name has other weights than the pickled one had.
    """
    flow = get_shared_flow(name, revision)
    if flow.loaded_from and fingerprint not in (None, flow.loaded_from[2][1]):
        raise OSError(
            f"what is unpickled here was made with other weights of {name!r}; {OTHER_WEIGHTS}"
        )
    return HeldFlow(flow)
