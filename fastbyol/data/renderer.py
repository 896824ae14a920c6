"""Decodes and augments batches on a pool of threads, a bounded number of batches ahead of the consumer.

Threads are enough because libjpeg, DALI and the kernel release the interpreter lock. So there are no worker processes that could die, and no
copies between processes.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.augment.parameters import NUM_COLUMNS
from fastbyol.augment.view_kernel import ViewKernel
from fastbyol.config.errors import UserError, require_at_least, require_choice
from fastbyol.config.views import ViewPair
from fastbyol.data.backends.source import DamagedImage, Indices, Pixels, Source
from fastbyol.data.replacements import Replacements

OUTPUTS = {"float32": torch.float32, "uint8": torch.uint8}
_NUMPY_TYPE = {torch.float32: np.float32, torch.uint8: np.uint8}
MAX_CHUNK = 16
"""Largest number of images that one thread takes at a time: enough to spread the fixed cost of numpy and of a DALI run over small images."""

Draw = Callable[[Indices, Indices, Indices], NDArray[np.float32]]
"""Draws augmentation parameters: (index, height, width), (N,) each -> (N, V, NUM_COLUMNS)."""


class Rendered(NamedTuple):
    """A rendered batch: views (V, N, S, S, 3), either augmented and normalised or uint8 crops; parameters (N, V, P)."""

    indices: Indices
    views: torch.Tensor
    parameters: torch.Tensor


class Pending(NamedTuple):
    """A batch in progress: once all `jobs` have finished, `result()` returns the batch."""

    jobs: list[Future[Any]]
    result: Callable[[], Rendered]


class Renderer(ABC):
    """Base class of the renderers, which make the views of planned batches. Owns the source: `close` closes it.

    Args:
        source: decodes the images.
        threads: size of the thread pool.
        prefetch: batches prepared ahead of the consumer.
        device: GPU that the pool's threads work on; None if they do not use one.
    """

    pinned = False
    """True if batches are read by a GPU, and so live in pinned memory: only from there are copies to a GPU asynchronous."""

    def __init__(self, source: Source, *, threads: int, prefetch: int, device: torch.device | None = None) -> None:
        require_at_least("workers", threads, 1)
        require_at_least("prefetch", prefetch, 1)
        self.source = source
        self._prefetch = prefetch
        # CUDA's current device is a property of each thread, and 0 in a new one.
        start = partial(torch.cuda.set_device, device) if device is not None else None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastbyol-data", initializer=start)

    def hosted(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a small tensor of a batch (labels, parameters), in pinned memory if the batch is."""
        return tensor.pin_memory() if self.pinned else tensor

    def batches(self, plan: Iterable[Indices], draw: Draw) -> Iterator[Rendered]:
        """Yields the planned batches in order, each in its own memory. An exception of a worker thread is raised here, at its batch."""
        remaining = iter(plan)
        ahead: deque[Pending] = deque()
        try:
            while True:
                ahead.extend(self._submit(indices, draw) for indices in islice(remaining, self._prefetch + 1 - len(ahead)))
                if not ahead:
                    return
                for job in ahead[0].jobs:
                    job.result()
                yield ahead.popleft().result()
        finally:  # the consumer stopped or a sample failed: cancel the jobs that have not started
            for pending in ahead:
                for job in pending.jobs:
                    job.cancel()

    @abstractmethod
    def _submit(self, indices: Indices, draw: Draw) -> Pending:
        """Submits one batch to the thread pool."""

    def close(self) -> None:
        """Stops the threads and closes the source."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.source.close()


class KernelRenderer(Renderer):
    """Renders views on the CPU: each thread decodes images and augments them with the compiled kernel.

    Args:
        source: decodes the images.
        pair: augmentation of both views; with one view, view 1's.
        num_views: views of each image.
        output: 'float32' renders augmented, normalised views; 'uint8' renders crops only (in pinned memory if there is a GPU), to be augmented
            by `augment.torch_graph`.
        workers: threads that decode and render.
        prefetch: batches prepared ahead of the consumer.
        replacements: what takes the place of damaged images, whose `Rendered.indices` are then those of other images; None: an error.
    """

    def __init__(
        self,
        source: Source,
        pair: ViewPair,
        *,
        num_views: int = 2,
        output: str = "float32",
        workers: int = 1,
        prefetch: int = 3,
        replacements: Replacements | None = None,
    ) -> None:
        super().__init__(source, threads=workers, prefetch=prefetch)
        require_choice("output", output, tuple(OUTPUTS))
        self._kernel = ViewKernel.of(pair)
        self._num_views, self._size_px, self._workers, self._replacements = num_views, pair.size_px, workers, replacements
        self.pinned = output == "uint8" and torch.cuda.is_available()  # uint8 crops will be copied to a GPU
        self._memory = BatchMemory(OUTPUTS[output], pinned=self.pinned, spare=prefetch + 1)

    def _submit(self, indices: Indices, draw: Draw) -> Pending:
        if self._replacements is not None:
            indices = indices.copy()  # `_render` writes into it
        shape = (self._num_views, len(indices), self._size_px, self._size_px, 3)
        views = self._memory.lend(shape)
        parameters = self.hosted(torch.empty((len(indices), self._num_views, NUM_COLUMNS)))
        chunk = min(MAX_CHUNK, -(-len(indices) // self._workers))
        jobs = [
            self._pool.submit(
                self._render, indices[first : first + chunk], draw, views.numpy()[:, first:], parameters.numpy()[first : first + chunk]
            )
            for first in range(0, len(indices), chunk)
        ]
        rendered = Rendered(indices, views, parameters)
        return Pending(jobs, lambda: rendered)

    def _render(self, indices: Indices, draw: Draw, views: NDArray[Any], parameters: NDArray[np.float32]) -> None:
        """Decodes and renders one chunk of images into its rows of `views` and `parameters`, and replaces damaged ones in `indices`."""
        if self._replacements is not None:
            self._replacements.replace(indices)
        done = 0
        while True:
            rest = indices[done:]
            try:
                parameters[done:] = draw(rest, *self.source.sizes(rest))
                for image in self.source.decode(rest):
                    self._render_row(image, done, int(indices[done]), views, parameters)
                    done += 1
                return
            except DamagedImage as damage:
                if self._replacements is None:
                    raise
                self._replacements.add(damage)
                self._replacements.replace(rest)

    def _render_row(self, image: Pixels, row: int, index: int, views: NDArray[Any], parameters: NDArray[np.float32]) -> None:
        try:
            for view in range(self._num_views):
                self._kernel.render(image, parameters[row, view : view + 1], views[view, row : row + 1])
        except Exception as error:
            error.add_note(f"while rendering {self.source.sample_name(index)}")
            raise


class BatchMemory:
    """Pool of batch-sized tensors of one type: page faults of fresh memory cost up to a fifth of a batch's CPU time.

    Memory is reused only after every tensor that shares it has been freed.
    """

    def __init__(self, dtype: torch.dtype, *, pinned: bool, spare: int) -> None:
        """Keeps at most `spare` unused batches. Pinned memory is pooled by PyTorch instead, which knows when the device has read it."""
        self._dtype, self._pinned = dtype, pinned
        self._spare: deque[NDArray[np.generic]] = deque(maxlen=spare)

    def lend(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns an uninitialised tensor of this shape, (views, images, S, S, 3). Raises UserError if there is not enough memory."""
        try:
            if self._pinned:
                return torch.empty(shape, dtype=self._dtype, pin_memory=True)
            memory = self._spare.pop() if self._spare else np.empty(shape, dtype=_NUMPY_TYPE[self._dtype])
            if memory.shape != shape:  # the smaller last batch of a pass
                memory = np.empty(shape, dtype=memory.dtype)
        except (MemoryError, RuntimeError) as error:
            gib = math.prod(shape) * self._dtype.itemsize / 2**30
            raise UserError(
                f"a batch of {shape[1]} images at views.size_px = {shape[2]} needs {gib:.1f} GiB, and there is not enough memory; "
                "take a smaller batch or smaller views"
            ) from error
        # PyTorch keeps the numpy view alive until the last tensor on it is freed; then the finalizer returns the memory to the pool.
        lent = memory.view()
        weakref.finalize(lent, self._spare.append, memory).atexit = False
        return torch.from_numpy(lent)
