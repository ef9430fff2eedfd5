"""CUDA graphs of a flow: its kernels recorded once for a shape, then launched all at once.

A flow is hundreds of small kernels. Launching them one by one may take a processor several times as
long as they take a GPU. A recorded graph reads and writes memory of its own: inputs are copied
into it and results out of it, and each replay comes after the last one, on whatever stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

MOST = 16
"""Graphs that are kept of the same weights on a device and in a dtype; what else is asked for is
launched as ever."""

RECORDING = threading.Lock()
"""Held while one is recorded: torch can do so in one thread at a time."""

T = TypeVar("T")


class Graphs:
    """The graphs of a flow's weights, by what they compute and of which shape.

    One is recorded when its shape comes for the second time, as recording takes a moment and a last
    batch comes once an epoch.
    """

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._recorded: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def get(self, what: str, like: Tensor, record: Callable[[], T]) -> T | None:
        """The graph of what is computed of tensors like this one; None where there is none yet.

        Args:
            what: A name for it.
            like: A tensor of that shape; device and dtype are always the same.
            record: Makes the graph.
        """
        key = what, like.shape
        if key not in self._recorded:
            with RECORDING:
                if key not in self._seen or len(self) >= MOST:
                    self._seen.add(key)
                    return None
                if key not in self._recorded:  # by another thread meanwhile
                    self._recorded[key] = record()
        graph: T = self._recorded[key]
        return graph


def can_record(t: Tensor) -> bool:
    """Whether graphs may stand in for what is launched: on a GPU, and torch traces nothing."""
    return (
        t.is_cuda
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and not torch.cuda.is_current_stream_capturing()
    )


@cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """On which graphs of a device are recorded: blocks of memory are kept by stream."""
    return torch.cuda.Stream(device)


class Replays:
    """What graphs that share memory share: one is replayed at a time, after the last one."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        with torch.cuda.device(device):
            self.done = torch.cuda.Event()
            self.pool = torch.cuda.graph_pool_handle()


class Graph:
    """A function of one tensor, recorded; called with a tensor it gives the result for that.

    Args:
        function: Of a tensor; it gives a tensor, or a tensor and something more. It does not make
            the processor wait.
        like: A tensor of the shape, dtype and device of those to come.
        replays: Shared with other graphs that read this one's memory, or None.

    Attributes:
        output: The last result, in the graph's memory.
        more: What the function gave besides, there too.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], like: Tensor, replays: Replays | None = None
    ) -> None:
        self._replays = replays or Replays(like.device)
        self._function = function  # and with it whatever the kernels read
        with torch.cuda.device(like.device), torch.inference_mode(False), torch.no_grad():
            self._input = like.clone(memory_format=torch.contiguous_format)
            # What a first call does besides, as choosing kernels, is not to be recorded.
            aside = stream_of(like.device)
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    function(self._input)
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            # What other threads do at the same time, as loading data, is no error of this one's.
            with torch.cuda.graph(
                self._graph,
                pool=self._replays.pool,
                stream=aside,
                capture_error_mode="thread_local",
            ):
                result = function(self._input)
        self.output: Tensor
        self.output, self.more = result if isinstance(result, tuple) else (result, None)

    def __call__(self, x: Tensor) -> Tensor:
        """The result for x, of the recorded shape, in memory of the caller's."""
        with self._replays.lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._replays.done)
            self._input.copy_(x)
            self._input.record_stream(stream)
            self._graph.replay()
            result = self.output.clone()
            self._replays.done.record(stream)
        return result


class DifferentiableGraph:
    """A function and its gradient, which needs what the function kept in the graph's memory.

    Args:
        function: Of a tensor: its value, and what the gradient needs.
        gradient: Of the value's gradient, the value and what was kept: the tensor's gradient.
        like: A tensor of the shape, dtype and device of those to come.
    """

    def __init__(
        self,
        function: Callable[[Tensor], tuple[Tensor, Any]],
        gradient: Callable[[Tensor, Tensor, Any], Tensor],
        like: Tensor,
    ) -> None:
        self._replays = Replays(like.device)
        self._function, self._gradient = function, gradient
        self._forward = Graph(function, like, self._replays)
        self._forward(like)  # recording computes nothing
        value, kept = self._forward.output, self._forward.more
        self._backward = Graph(lambda grad: gradient(grad, value, kept), value, self._replays)
        self._calls = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, int]:
        """The value, and the number of this call."""
        with self._replays.lock:
            self._calls += 1
            return self._forward(x), self._calls

    def gradient(self, grad: Tensor, x: Tensor, call: int) -> Tensor:
        """The gradient at x, the tensor of that call, from the value's.

        After another call, whose memory is the same, the function is computed again.
        """
        with self._replays.lock:
            if call == self._calls:
                return self._backward(grad)
        return self._gradient(grad, *self._function(x))
