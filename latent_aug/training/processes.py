"""The processes that train one flow together: those of `accelerate launch`, or one alone."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from latent_aug.utils.randomness import get_rank_and_count

T = TypeVar("T")


class Processes:
    """What one process of a training run asks of the others; alone it needs no accelerate.

    Args:
        device: Where to train; by default a CUDA GPU if there is one, each process its own.
        timeout_minutes: A process that waits longer than this for another one gives up.

    Attributes:
        rank: Of this process, from 0.
        count: Of the processes.
        device: Of this process.

    Raises:
        ModuleNotFoundError: There are several processes, and accelerate is not installed.
        ValueError: The processes are not started, or shard models, in a way that can train here.
    """

    def __init__(
        self, device: str | torch.device | None = None, *, timeout_minutes: float = 10.0
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.rank, self.count = 0, 1
        self._accelerator: Any = None
        if get_rank_and_count()[1] > 1:
            self._accelerator = accelerator_for(self.device, timeout_minutes)
            self.rank = self._accelerator.process_index
            self.count = self._accelerator.num_processes
            self.device = self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    def shared(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are the mean of all processes'; weights are the main one's."""
        if self._accelerator is None:
            return module
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    def unshared(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Where a shared module's gradients only add up, in this process."""
        if self._accelerator is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(module)
        return context

    def backward(self, part: Tensor) -> None:
        """Gradients of the sum over the processes of a scalar, of which this one has a part."""
        with warnings.catch_warnings():
            # 1x1 weights have strides of another layout, which makes no difference.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            (part * self.count).backward()  # what is shared takes the mean

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self._accelerator is None:
            return value
        total: Tensor = self._accelerator.reduce(value, reduction="sum")
        return total

    def from_main(self, function: Callable[[], T]) -> T:
        """What a function returns or raises in the main process, which alone calls it."""
        if self._accelerator is None:
            return function()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def agree(self, name: str, value: Any) -> None:
        """See to it that all processes have the same of something.

        Raises:
            ValueError: They do not; in every process.
        """
        if self._accelerator is None:
            return
        from accelerate.utils import gather_object

        for rank, other in enumerate(gather_object([value])):
            if other != value:
                raise ValueError(
                    f"{name} must be the same in all processes: rank {self.rank} has {value!r}, "
                    f"rank {rank} {other!r}"
                )

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """The main process goes first, then one on each other machine, then all others."""
        if self._accelerator is None:
            yield
            return
        # Nested, so that both hold whether the machines share their disk or not.
        with self._accelerator.main_process_first(), self._accelerator.local_main_process_first():
            yield

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def leave(self) -> None:
        """End the connection between the processes."""
        if self._accelerator is not None:
            self._accelerator.end_training()


def accelerator_for(device: torch.device, timeout_minutes: float) -> Any:
    """The Accelerator of this process, which joins it with the others."""
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "several processes need accelerate: pip install 'latent-aug[train]'"
        ) from error
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # `network_dtype` says what may run lower; the state may not
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=timeout_minutes))
        ],
    )
    kind = accelerator.distributed_type.name
    if not kind.startswith("MULTI_"):
        raise ValueError(
            f"a flow trains in processes that each hold all of it, but these are set up as {kind}: "
            "start them with torchrun, or with accelerate launch without FSDP or DeepSpeed"
        )
    return accelerator
