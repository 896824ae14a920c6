"""One loader for every backend: threads decode each image once, draw and render its views, and hand out whole batches in order.

All randomness is keyed by (seed, epoch, sample), all order by (seed, epoch): workers, ranks and resumes change nothing, and the state of a
loader is the next micro-batch's (epoch, batch). libjpeg, DALI and the kernel release the interpreter lock, so threads are enough: there are
no processes to lose, and no copies between them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.augment.cpu_kernel import ViewKernel
from fastbyol.augment.parameters import NUM_COLUMNS, centre_crop_parameters, draw_parameters
from fastbyol.config.errors import UserError, require_at_least, require_choice
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ImageBatch, ViewBatch
from fastbyol.data.batch_memory import BatchMemory
from fastbyol.data.readahead import Readahead
from fastbyol.data.source import Indices, Source
from fastbyol.data.traversal import Traversal

OUTPUTS = {"float32": torch.float32, "uint8": torch.uint8}
MAX_CHUNK = 16
"""Most images that one thread takes at a time: enough to spread the fixed cost of numpy and of a DALI run over small images."""

Draw = Callable[[Indices, Indices, Indices], NDArray[np.float32]]
"""(index, height, width), (N,) each -> parameters (N, V, NUM_COLUMNS)."""


class _Rendered(NamedTuple):
    """views: (V, N, S, S, 3). parameters: (N, V, P)."""

    indices: Indices
    views: torch.Tensor
    parameters: torch.Tensor


class _Renderer:
    """A pool of threads that renders batches, a bounded number ahead of the consumer."""

    def __init__(self, source: Source, pair: ViewPair, *, num_views: int, dtype: torch.dtype, workers: int, prefetch: int) -> None:
        require_at_least("workers", workers, 1)
        require_at_least("prefetch", prefetch, 1)
        self.source = source
        self._kernel = ViewKernel.of(pair)
        self._num_views, self._size_px = num_views, pair.size_px
        # uint8 crops are on their way to a device: pinned memory makes that copy asynchronous.
        pinned = dtype == torch.uint8 and torch.cuda.is_available()
        self._memory = BatchMemory(dtype, pinned=pinned, spare=prefetch + 1)
        self._workers, self._prefetch = workers, prefetch
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fastbyol-data")

    def batches(self, plan: Iterable[Indices], draw: Draw) -> Iterator[_Rendered]:
        """Renders the planned batches in order. Each has its own memory. A worker's exception is raised here, at its batch."""
        remaining = iter(plan)
        ahead: deque[tuple[_Rendered, list[Future[None]]]] = deque()
        try:
            while True:
                ahead.extend(self._submit(indices, draw) for indices in islice(remaining, self._prefetch + 1 - len(ahead)))
                if not ahead:
                    return
                rendered, chunks = ahead[0]
                for chunk in chunks:
                    chunk.result()
                ahead.popleft()
                yield rendered
        finally:  # the consumer left or a sample failed: what has not begun shall not run
            for _, chunks in ahead:
                for chunk in chunks:
                    chunk.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.source.close()

    def _submit(self, indices: Indices, draw: Draw) -> tuple[_Rendered, list[Future[None]]]:
        shape = (self._num_views, len(indices), self._size_px, self._size_px, 3)
        views = self._memory.lend(shape)
        parameters = torch.empty((len(indices), self._num_views, NUM_COLUMNS))
        chunk = min(MAX_CHUNK, -(-len(indices) // self._workers))
        jobs = [
            self._pool.submit(
                self._render, indices[first : first + chunk], draw, views.numpy()[:, first:], parameters.numpy()[first : first + chunk]
            )
            for first in range(0, len(indices), chunk)
        ]
        return _Rendered(indices, views, parameters), jobs

    def _render(self, indices: Indices, draw: Draw, views: NDArray[Any], parameters: NDArray[np.float32]) -> None:
        """Fills the rows of one chunk."""
        parameters[:] = draw(indices, *self.source.sizes(indices))
        for row, image in enumerate(self.source.decode(indices)):
            try:
                for view in range(self._num_views):
                    self._kernel.render(image, parameters[row, view : view + 1], views[view, row : row + 1])
            except Exception as error:
                error.add_note(f"while rendering {self.source.sample_name(int(indices[row]))}")
                raise


class TwoViewLoader:
    """Both views of every image, in batches: an iterable of `ViewBatch` over the rest of the current epoch.

    Iterating starts at the loader's position and leaves it at the start of the next epoch; breaking off leaves it at the next batch,
    whatever was made ahead. Each batch has its own memory.
    """

    def __init__(
        self,
        source: Source,
        *,
        views: ViewPair,
        traversal: Traversal,
        workers: int = 1,
        prefetch: int = 3,
        output: str = "float32",
        readahead: Readahead | None = None,
    ) -> None:
        """Takes over the source and the readahead, and closes them.

        Args:
            source: the backend.
            views: what both views draw.
            traversal: order and share of this rank; also gives the seed of the views.
            workers: threads that decode and render.
            prefetch: batches made ahead.
            output: 'float32': whole views, normalised; 'uint8': crops, in pinned memory where there is a GPU, for `augment.torch_graph`.
            readahead: of the same source and blocks as the traversal's, if that is local.
        """
        require_choice("output", output, tuple(OUTPUTS))
        self.views, self.traversal, self.class_names = views, traversal, source.class_names
        self.backend = type(source).__name__.removesuffix("Source").lower()
        self._renderer = _Renderer(source, views, num_views=2, dtype=OUTPUTS[output], workers=workers, prefetch=prefetch)
        self._labels = source.labels
        self._readahead = readahead
        self._epoch = self._batch = 0

    @property
    def num_samples(self) -> int:
        """Images in the data set, over all ranks."""
        return self.traversal.num_samples

    def __len__(self) -> int:
        """Micro-batches of this rank in a whole epoch."""
        return self.traversal.micro_batches

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of another epoch; the current one is left where it is, so that a resumed loop may call this too."""
        require_at_least("epoch", epoch, 0)
        if epoch != self._epoch:
            self._epoch, self._batch = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The next micro-batch to hand out: {'epoch', 'batch'}."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where `state_dict` was taken, byte for byte. UserError for a position outside an epoch (another batch size?)."""
        epoch, batch = state["epoch"], state["batch"]
        if epoch < 0 or not 0 <= batch < len(self):
            raise UserError(f"loader state {state}: an epoch has {len(self)} batches here; resume with the run's own data and global_batch")
        self._epoch, self._batch = epoch, batch

    def __iter__(self) -> Iterator[ViewBatch]:
        epoch, first = self._epoch, self._batch
        for batch, rendered in enumerate(self._renderer.batches(self._plan(epoch, first), self._draw_at(epoch)), start=first):
            self._epoch, self._batch = (epoch, batch + 1) if batch + 1 < len(self) else (epoch + 1, 0)
            yield self._view_batch(rendered)

    def close(self) -> None:
        """Ends the threads and closes the files."""
        if self._readahead is not None:
            self._readahead.close()
        self._renderer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan(self, epoch: int, first: int) -> Iterator[Indices]:
        """This rank's images of each micro-batch from the first on, drawn a few batches before they are handed out."""
        order = self.traversal.order(epoch)
        if self._readahead is not None:
            self._readahead.start_epoch(epoch)
        for batch in range(first, len(self)):
            if self._readahead is not None:
                self._readahead.reach(batch * self.traversal.rank_batch * self.traversal.world_size)
            yield self.traversal.share(order, batch)

    def _draw_at(self, epoch: int) -> Draw:
        draw = partial(draw_parameters, self.views, seed=self.traversal.seed, epoch=epoch)
        return lambda index, height, width: draw(index=index, height=height, width=width)

    def _view_batch(self, rendered: _Rendered) -> ViewBatch:
        # NHWC memory seen as NCHW is channels-last: no copy.
        view1, view2 = (view.permute(0, 3, 1, 2) for view in rendered.views)
        label = torch.from_numpy(self._labels[rendered.indices])
        return ViewBatch(view1, view2, label, torch.from_numpy(rendered.indices.copy()), rendered.parameters)


class ImageLoader:
    """Every image once, in index order, centre-cropped and normalised: an iterable of `ImageBatch`. The last batch may be smaller."""

    def __init__(self, source: Source, *, views: ViewPair, batch: int, workers: int = 1, prefetch: int = 2) -> None:
        """Takes over the source and closes it. Of `views`, only size, interpolation and normalisation matter."""
        require_at_least("batch", batch, 1)
        self.num_samples, self.class_names = source.num_samples, source.class_names
        self._renderer = _Renderer(source, views, num_views=1, dtype=torch.float32, workers=workers, prefetch=prefetch)
        self._labels, self._batch = source.labels, batch

    def __len__(self) -> int:
        """Batches in a pass."""
        return -(-self.num_samples // self._batch)

    def __iter__(self) -> Iterator[ImageBatch]:
        return self.batches_of(np.arange(self.num_samples, dtype=np.int64))

    def batches_of(self, index: Indices) -> Iterator[ImageBatch]:
        """These images in this order, in batches."""
        plan = (index[first : first + self._batch] for first in range(0, len(index), self._batch))
        for rendered in self._renderer.batches(plan, _centre_crop):
            yield _image_batch(rendered, self._labels)

    def pick(self, index: Sequence[int]) -> ImageBatch:
        """These images in this order, as one batch."""
        (rendered,) = self._renderer.batches([np.asarray(index, dtype=np.int64)], _centre_crop)
        return _image_batch(rendered, self._labels)

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self._renderer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _image_batch(rendered: _Rendered, labels: Indices) -> ImageBatch:
    index = rendered.indices
    return ImageBatch(rendered.views[0].permute(0, 3, 1, 2), torch.from_numpy(labels[index]), torch.from_numpy(index.copy()))


def _centre_crop(index: Indices, height: Indices, width: Indices) -> NDArray[np.float32]:
    return centre_crop_parameters(height=height, width=width)
