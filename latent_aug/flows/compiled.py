"""Encode and decode of one small image, compiled ahead of time: one call in place of hundreds.

AOTInductor writes a program as a file. It is machine code for this processor, so its name says for
which weights, torch and processor it was made, and no other is loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Function = Callable[[Tensor], Tensor]


class Program(nn.Module):
    """A function of one tensor as a module, which `torch.export` asks for."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, t: Tensor) -> Tensor:
        """Compute it."""
        return self.function(t)


def name_file(folder: Path, direction: str, shape: torch.Size, fingerprint: str) -> Path:
    """Name the program of a flow for one direction and shape of input."""
    made_for = "\n".join((direction, str(tuple(shape)), fingerprint, *describe_machine()))
    return folder / f"{direction}-{hashlib.sha256(made_for.encode()).hexdigest()[:16]}.pt2"


@cache
def describe_machine() -> tuple[str, ...]:
    """List what a program is made by and for: our version, torch, system, processor's features."""
    from latent_aug import __version__

    features = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        features = next((x for x in lines if x.startswith(("flags", "Features"))), features)
    capability = torch.backends.cpu.get_cpu_capability()
    system = f"{platform.system()} {platform.machine()}"
    return __version__, torch.__version__, system, capability, features


@torch.no_grad()
def compile_program(function: Function, example: Tensor, file: Path) -> None:
    """Compile a function of tensors like the example, for one thread, into a file.

    Raises:
        RuntimeError: Torch cannot compile it, as without a C++ compiler.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    options = {"cpp.threads": 1}
    with TemporaryDirectory(dir=file.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own parts
        path = str(Path(folder, file.name))
        try:
            program = torch.export.export(Program(function), (example,), strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=path, inductor_configs=options
            )
        except Exception as error:
            raise RuntimeError(
                f"torch {torch.__version__} could not compile the flow ({error}); it needs a C++ "
                "compiler such as g++, and without compiling everything works, more slowly"
            ) from error
        os.replace(path, file)


def load_program(file: Path) -> Function | None:
    """Load a program, None where there is none or it is damaged."""
    if not file.exists():
        return None
    try:
        loaded: Function = torch._inductor.aoti_load_package(str(file))
    except RuntimeError:
        return None
    return loaded


def can_run(t: Tensor) -> bool:
    """Whether a program may run on t: torch neither traces, maps nor differentiates it."""
    return (
        type(t) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and forward_ad._current_level < 0
    )
