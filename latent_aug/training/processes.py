"""The processes that train one flow together: several of `accelerate launch`, or one alone."""

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
    """The link of one process to the others that train with it. Alone it needs no accelerate.

    Args:
        device: The device to train on. By default a CUDA GPU if there is one, each process its
            own.
        timeout_minutes: The time that a process waits for another one before it gives up.

    Attributes:
        rank: The number of this process, from 0.
        count: The number of processes.
        device: The device of this process.

    Raises:
        ModuleNotFoundError: There are several processes, and accelerate is not installed.
        ValueError: Each process holds a part of the model only, or the processes were started by
            another launcher.
    """

    def __init__(
        self, device: str | torch.device | None = None, *, timeout_minutes: float = 10.0
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.rank, self.count = 0, 1
        self._accelerator: Any = None
        if get_rank_and_count()[1] > 1:
            self._accelerator = make_accelerator(self.device, timeout_minutes)
            self.rank = self._accelerator.process_index
            self.count = self._accelerator.num_processes
            self.device = self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share_gradients(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that its gradients become the mean over the processes.

        All processes take the main one's weights.
        """
        if self._accelerator is None:
            return module
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    def keep_gradients(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Let the gradients of a wrapped module only add up in this process meanwhile."""
        if self._accelerator is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(module)
        return context

    def backward(self, part: Tensor) -> None:
        """Compute the gradients of a sum over the processes, of which this one has one summand."""
        with warnings.catch_warnings():
            # 1x1 weights have strides of another layout, which makes no difference.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            (part * self.count).backward()  # what is shared takes the mean

    def add_up(self, value: Tensor) -> Tensor:
        """Add up a tensor over the processes."""
        if self._accelerator is None:
            return value
        total: Tensor = self._accelerator.reduce(value, reduction="sum")
        return total

    def call_on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the main process, and return or raise the outcome in all."""
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

    def require_same(self, name: str, value: Any) -> None:
        """Refuse a value that is not the same in all processes.

        Raises:
            ValueError: The values differ. Every process raises it.
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
    def let_one_go_first(self) -> Iterator[None]:
        """Let the main process go first, then one on each other machine, then all others."""
        if self._accelerator is None:
            yield
            return
        # Nested, so that both hold whether the machines share their disk or not.
        with self._accelerator.main_process_first(), self._accelerator.local_main_process_first():
            yield

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def leave(self) -> None:
        """End the connection between the processes."""
        if self._accelerator is not None:
            self._accelerator.end_training()


def make_accelerator(device: torch.device, timeout_minutes: float) -> Any:
    """Make the Accelerator of this process, which joins it with the others."""
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
            f"each process must hold the whole flow, but the processes are set up as {kind}: "
            "start them with torchrun, or with accelerate launch without FSDP or DeepSpeed"
        )
    return accelerator
