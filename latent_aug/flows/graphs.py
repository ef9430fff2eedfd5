"""CUDA graphs of a flow: its kernels recorded once for a shape, then launched all at once.

A flow is hundreds of small kernels. Launching them one by one may take a processor several times as
long as they take a GPU. A recorded graph reads and writes memory of its own. Inputs are copied
into it and results out of it. Each replay comes after the last one, on whatever stream.
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
"""The most graphs that are kept of the same weights, device and dtype. Kernels of other shapes are
launched one by one."""

RECORDING = threading.Lock()
"""Held while a graph is recorded, as torch records in one thread at a time."""

T = TypeVar("T")


class Graphs:
    """The graphs of a flow's weights, by what they compute and for which shape.

    A graph is recorded when its shape comes for the second time. Recording takes a moment, and the
    last batch of an epoch comes only once.
    """

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._graphs: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, what: str, like: Tensor, record: Callable[[], T]) -> T | None:
        """Return the graph of a computation for tensors like this one, or None.

        Args:
            what: A name for the computation.
            like: A tensor of that shape. Device and dtype are always the same.
            record: Makes the graph.
        """
        key = what, like.shape
        if key not in self._graphs:
            with RECORDING:
                if key not in self._seen or len(self) >= MOST:
                    self._seen.add(key)
                    return None
                if key not in self._graphs:  # by another thread meanwhile
                    self._graphs[key] = record()
        graph: T = self._graphs[key]
        return graph


def can_record(t: Tensor) -> bool:
    """Whether a graph may stand in for launches: on a GPU, where torch traces nothing."""
    return (
        t.is_cuda
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and not torch.cuda.is_current_stream_capturing()
    )


@cache
def get_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that a device's graphs are recorded on, as memory is kept by stream."""
    return torch.cuda.Stream(device)


class Replays:
    """The order of replays of graphs that share memory: one at a time, after the last one."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        with torch.cuda.device(device):
            self.done = torch.cuda.Event()
            self.pool = torch.cuda.graph_pool_handle()


class Graph:
    """A recorded function of one tensor.

    Args:
        function: Takes a tensor and returns one, or a tensor and something more. It must not make
            the processor wait.
        like: A tensor of the shape, dtype and device of those to come.
        replays: The order shared with other graphs that read this one's memory, or None.

    Attributes:
        output: The last result, in the graph's memory.
        more: What the function returned besides, in the graph's memory.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], like: Tensor, replays: Replays | None = None
    ) -> None:
        self._replays = replays or Replays(like.device)
        self._function = function  # and with it whatever the kernels read
        with torch.cuda.device(like.device), torch.inference_mode(False), torch.no_grad():
            self._input = like.clone(memory_format=torch.contiguous_format)
            # What a first call does besides, as choosing kernels, is not to be recorded.
            aside = get_stream(like.device)
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
        """Compute the result for x, of the recorded shape, in memory of the caller's."""
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
    """A recorded function and its gradient, which reads what the function kept.

    Args:
        function: Takes a tensor, and returns the value and what the gradient needs.
        gradient: Takes the value's gradient, the value and what was kept, and returns the tensor's
            gradient.
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
        """Compute the value, and give the number of this call."""
        with self._replays.lock:
            self._calls += 1
            return self._forward(x), self._calls

    def gradient(self, grad: Tensor, x: Tensor, call: int) -> Tensor:
        """Compute the gradient at x, the tensor of that call, from the value's gradient.

        Another call since then has overwritten the memory, so the function is computed again.
        """
        with self._replays.lock:
            if call == self._calls:
                return self._backward(grad)
        return self._gradient(grad, *self._function(x))
