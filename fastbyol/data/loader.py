"""The loaders for training and evaluation, the same for every backend.

Augmentations are random functions of (seed, epoch, sample), the order one of (seed, epoch). So the number of worker threads, the number of
ranks and a resume change nothing, and the whole state of a loader is the (epoch, batch) of the next micro-batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.augment.parameters import EVAL_SHARE, centre_crop_parameters, draw_parameters
from fastbyol.config.errors import UserError, require_at_least
from fastbyol.config.views import ViewPair
from fastbyol.data.backends.source import DamagedImage, Indices, Source
from fastbyol.data.batch import CropBatch, ImageBatch, ViewBatch
from fastbyol.data.fetch_ahead import FetchAhead
from fastbyol.data.formats.manifest import label_counts
from fastbyol.data.renderer import KernelRenderer, Renderer
from fastbyol.data.replacements import Replacements
from fastbyol.data.traversal import Traversal
from fastbyol.host.cores import default_workers
from fastbyol.host.quantities import count_text

DIVISION = "division between nodes"
"""Key of a training loader's fingerprint that says how nodes divide the images."""


class _Loader:
    """Base of the loaders: holds the renderer, and with it the source, which `close` closes."""

    def __init__(self, renderer: Renderer) -> None:
        source = renderer.source
        self.num_samples, self.class_names, self._labels = source.num_samples, source.class_names, source.labels
        self._renderer = renderer

    def class_counts(self) -> dict[str, int]:
        """Returns the number of images of each class; images without a label (-1) are not counted."""
        return dict(zip(self.class_names, label_counts(self._labels, num_classes=len(self.class_names)), strict=True))

    def fingerprint(self) -> dict[str, str]:
        """Returns short texts that identify the data set, see `Source.fingerprint`."""
        return dict(self._fingerprint)

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return self._renderer.source.fingerprint()

    def image_names(self) -> list[str]:
        """Returns the name of every image in the listing, in index order, see `Source.image_name`."""
        return [self._renderer.source.image_name(index) for index in range(self.num_samples)]

    def require_decodable(self, index: int) -> None:
        """Decodes the image of this index. Raises UserError if it is damaged. May be called from several threads at once."""
        for _ in self._renderer.source.decode(np.array([index], dtype=np.int64)):
            pass

    def decodable(self, index: Indices, *, at_most: int | None = None) -> Indices:
        """Returns those of the images (N,) that decode, or the first `at_most` of them; others are logged. Decodes them for that.

        Raises UserError if more than `damage_allowed` don't, or all. Converted data are not looked at: their damage is an error wherever it is
        met.
        """
        source = self._renderer.source
        if not source.is_original:
            return index[:at_most]
        damage = Replacements(source.num_samples)

        def is_sound(one: int) -> bool:
            try:
                self.require_decodable(one)
            except DamagedImage as error:
                damage.add(error)
                return False
            return True

        found, piece = [index[:0]], at_most or 1024
        with ThreadPoolExecutor(default_workers()) as pool:
            for first in range(0, len(index), piece):
                part = index[first : first + piece]
                found.append(part[np.fromiter(pool.map(is_sound, part.tolist()), dtype=bool, count=len(part))])
                if at_most is not None and sum(map(len, found)) >= at_most:
                    break
        if len(index) and not any(map(len, found)):
            raise UserError(f"none of {count_text(len(index), 'image')} decodes: {source.sample_name(int(index[0]))} is the first")
        return np.concatenate(found)[:at_most]

    @property
    def labels(self) -> Indices:
        """(num_samples,) int64 class of each image, -1 for none."""
        return self._labels

    def close(self) -> None:
        """Stops the threads and closes the files."""
        self._renderer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TwoViewLoader(_Loader):
    """Training loader: an iterable of `ViewBatch` over the rest of the current epoch, with both views of every image.

    Iteration starts at the loader's position and ends at the start of the next epoch. Leaving the loop early keeps the position at the next
    batch that was not yielded yet, even if batches were prefetched. Each batch has its own memory.
    """

    def __init__(
        self, renderer: Renderer, *, views: ViewPair, traversal: Traversal, readahead: Readahead | FetchAhead | None = None
    ) -> None:
        """Takes ownership of the renderer and the readahead: `close` closes them.

        Args:
            renderer: renders two views of its source's images.
            views: augmentation of both views.
            traversal: sample order and this rank's share of it; its seed is also that of the augmentations.
            readahead: reads the samples of the same traversal and source ahead, into the page cache or from a store.
        """
        super().__init__(renderer)
        self.views, self.traversal, self._readahead = views, traversal, readahead
        self.backend = type(renderer.source).__name__.removesuffix("Source").lower()
        self._epoch = self._batch = 0

    def fingerprint(self) -> dict[str, str]:
        """Returns short texts that identify the data set, see `Source.fingerprint`, and how nodes divide it, which ranks must agree on too."""
        nodes = {DIVISION: f"{self.traversal.nodes} parts"} if self.traversal.nodes > 1 else {}
        return super().fingerprint() | nodes

    def __len__(self) -> int:
        """Returns the number of micro-batches of this rank in a whole epoch."""
        return self.traversal.micro_batches

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of another epoch. Does nothing for the current epoch, so that a resumed loop may call this too."""
        require_at_least("epoch", epoch, 0)
        if epoch != self._epoch:
            self._epoch, self._batch = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Returns the position of the next micro-batch: {'epoch', 'batch'}."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a `state_dict`, with byte-identical batches. Raises UserError if the position is outside an epoch (another batch size?)."""
        epoch, batch = state["epoch"], state["batch"]
        if epoch < 0 or not 0 <= batch < len(self):
            raise UserError(f"loader state {state}: an epoch has {len(self)} batches here; resume with the run's own data and global_batch")
        self._epoch, self._batch = epoch, batch

    def __iter__(self) -> Iterator[ViewBatch]:
        epoch, first = self._epoch, self._batch
        for batch, views in enumerate(self._rendered(self._plan(epoch, first), epoch), start=first):
            # Before the yield: a checkpoint that is saved in the loop's body must continue after this batch.
            self._epoch, self._batch = (epoch, batch + 1) if batch + 1 < len(self) else (epoch + 1, 0)
            yield views

    def views_of(self, index: Sequence[int], *, epoch: int, batch: int) -> Iterator[ViewBatch]:
        """Yields the views of these images, in this order, as that epoch draws them, `batch` images at once. The loader's position stays."""
        chosen = np.asarray(index, dtype=np.int64)
        return self._rendered((chosen[first : first + batch] for first in range(0, len(chosen), batch)), epoch)

    def _rendered(self, plan: Iterable[Indices], epoch: int) -> Iterator[ViewBatch]:
        views, seed = self.views, self.traversal.seed
        for rendered in self._renderer.batches(
            plan, lambda index, height, width: draw_parameters(views, seed=seed, epoch=epoch, index=index, height=height, width=width)
        ):
            # NHWC memory seen as NCHW is channels-last: no copy.
            view1, view2 = (view.permute(0, 3, 1, 2) for view in rendered.views)
            label, index = self._renderer.hosted(torch.from_numpy(self._labels[rendered.indices])), rendered.indices.copy()
            yield ViewBatch(view1, view2, label, torch.from_numpy(index), rendered.parameters)

    def endless(self) -> Generator[ViewBatch, None, None]:
        """Yields batches from the loader's position on, epoch after epoch."""
        while True:
            yield from self

    def close(self) -> None:
        """Stops the threads and closes the files."""
        if self._readahead is not None:
            self._readahead.close()
        super().close()

    def _plan(self, epoch: int, first: int) -> Iterator[Indices]:
        """Yields this rank's sample indices for each micro-batch from `first` on. The renderer takes them a few batches ahead of the consumer."""
        order = self.traversal.order(epoch)
        if self._readahead is not None:
            self._readahead.start_epoch(epoch, order, position=first * self.traversal.stride)
        for batch in range(first, len(self)):
            if self._readahead is not None:
                self._readahead.reach(batch * self.traversal.stride)
            yield self.traversal.share(order, batch)


class ImageLoader(_Loader):
    """Evaluation loader: an iterable of `ImageBatch`, every image once in index order, centre-cropped and normalised.

    The last batch may be smaller.
    """

    def __init__(
        self,
        source: Source,
        *,
        views: ViewPair,
        batch: int,
        workers: int = 1,
        prefetch: int = 2,
        crop_share: float = EVAL_SHARE,
        replacements: Replacements | None = None,
    ) -> None:
        """Takes ownership of the source: `close` closes it. Only size, interpolation, antialias and normalisation of `views` are used.

        crop_share: side of the centred square as a share of the short side.
        replacements: what takes the place of damaged images; None: they are errors.
        """
        require_at_least("batch", batch, 1)
        super().__init__(KernelRenderer(source, views, num_views=1, workers=workers, prefetch=prefetch, replacements=replacements))
        self._batch, self._crop_share = batch, crop_share

    def __len__(self) -> int:
        """Returns the number of batches in one pass over the data."""
        return -(-self.num_samples // self._batch)

    def __iter__(self) -> Iterator[ImageBatch]:
        return self.batches_of(np.arange(self.num_samples, dtype=np.int64))

    def batches_of(self, index: Indices) -> Iterator[ImageBatch]:
        """Yields the images at these indices, in this order, in batches."""
        plan = (index[first : first + self._batch] for first in range(0, len(index), self._batch))
        return self._render(plan)

    def pick(self, index: Sequence[int]) -> ImageBatch:
        """Returns the images at these indices, in this order, as one batch."""
        (batch,) = self._render([np.asarray(index, dtype=np.int64)])
        return batch

    def _render(self, plan: Iterable[Indices]) -> Iterator[ImageBatch]:
        def draw(_: Indices, height: Indices, width: Indices) -> NDArray[np.float32]:
            return centre_crop_parameters(height=height, width=width, share=self._crop_share)

        for rendered in self._renderer.batches(plan, draw):
            index = rendered.indices
            image, label = rendered.views[0].permute(0, 3, 1, 2), self._labels[index]
            yield ImageBatch(image, torch.from_numpy(label), torch.from_numpy(index.copy()))


class CropLoader(_Loader):
    """Loader for training with labels: one augmented view of each of the chosen images, in random order, epoch after epoch.

    The order and the crops are pure functions of (seed, step), so training can go on from any step. They are those of view 1 of a run's
    `TwoViewLoader`.
    """

    def __init__(
        self,
        source: Source,
        *,
        views: ViewPair,
        rows: Indices,
        traversal: Traversal,
        output: str = "float32",
        workers: int = 1,
        prefetch: int = 3,
    ) -> None:
        """Takes ownership of the source: `close` closes it.

        Args:
            source: decodes the images.
            views: view 1 is drawn.
            rows: the images to use, by their index in the source.
            traversal: over positions in `rows`; without micro-batches.
            output: 'float32', or 'uint8' crops for a GPU, see `KernelRenderer`.
            workers, prefetch: threads, and batches prepared ahead.
        """
        super().__init__(KernelRenderer(source, views, num_views=1, output=output, workers=workers, prefetch=prefetch))
        self.views, self.rows, self.traversal = views, rows, traversal

    def __len__(self) -> int:
        """Returns the number of steps in an epoch; the last incomplete batch is left out."""
        return self.traversal.micro_batches

    def batches_from(self, step: int) -> Generator[CropBatch, None, None]:
        """Yields this rank's batches from a step on, without end."""
        while True:
            epoch, first = divmod(step, len(self))
            for batch in self._epoch(epoch, first):
                yield batch
                step += 1

    def _epoch(self, epoch: int, first: int) -> Iterator[CropBatch]:
        order = self.traversal.order(epoch)
        plan = (self.rows[self.traversal.share(order, batch)] for batch in range(first, len(self)))

        def draw(index: Indices, height: Indices, width: Indices) -> NDArray[np.float32]:
            return draw_parameters(self.views, seed=self.traversal.seed, epoch=epoch, index=index, height=height, width=width)[:, :1]

        for rendered in self._renderer.batches(plan, draw):
            label = self._renderer.hosted(torch.from_numpy(self._labels[rendered.indices]))
            image, index = rendered.views[0].permute(0, 3, 1, 2), torch.from_numpy(rendered.indices.copy())
            yield CropBatch(image, label, index, rendered.parameters[:, 0])


class Readahead:
    """A thread that reads the blocks of a local traversal into the page cache, one window ahead of the loader.

    It ignores read errors: they are raised when the samples themselves are read.
    """

    def __init__(self, source: Source, traversal: Traversal, *, reader: int = 0, num_readers: int = 1) -> None:
        """Reads share number `reader` of `num_readers` of the blocks: the processes of one machine share the page cache."""
        assert traversal.blocks is not None
        self._source, self._traversal, self._blocks = source, traversal, traversal.blocks
        self._reader, self._num_readers = reader, num_readers
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastbyol-readahead")

    def start_epoch(self, epoch: int, order: Indices, *, position: int) -> None:
        """Takes the windows of an epoch; `reach` finds the one that a position lies in."""
        self._windows, self._ends = self._traversal.windows(epoch)
        self._next = 0

    def reach(self, position: int) -> None:
        """Fetches the window at this position of the epoch's order and the next one, each once. Call before reading from that position."""
        current = int(np.searchsorted(self._ends, position, side="right"))
        for window in self._windows[max(self._next, current) : current + 2]:
            for block in window[self._reader :: self._num_readers].tolist():
                self._pool.submit(self._source.read_ahead, self._blocks.members(block))
        self._next = max(self._next, current + 2)

    def close(self) -> None:
        """Stops the thread; blocks that it has not started are skipped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
