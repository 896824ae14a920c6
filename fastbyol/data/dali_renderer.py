"""Makes crops with DALI: one pipeline decodes an image and cuts both views, on the GPU if there is one.

Crop boxes come from our sampler, so a view is the same as with any other backend. The crops differ from the CPU kernel's by at most one of
255 levels, because the JPEG decoder and resampler round differently; a test checks this. `augment.torch_graph` does what follows the crop.

We have not run this on a GPU yet, where the same graph decodes with nvJPEG ('mixed'). It is tested on the CPU, where it is slower than the kernel.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.augment.parameters import CROP_H, CROP_W, CROP_X, CROP_Y
from fastbyol.config.errors import UserError
from fastbyol.config.views import ViewPair
from fastbyol.data.backends.dali_source import DaliSource, built_pipeline, dali_reason, decoded_jpeg
from fastbyol.data.backends.source import Indices, Pixels
from fastbyol.data.renderer import MAX_CHUNK, Draw, Pending, Rendered, Renderer


class DaliRenderer(Renderer):
    """Makes two uint8 crops of each image from one decode, not mirrored, for `augment.torch_graph`. One thread runs DALI's pipeline.

    Other threads read and check the files of the next batches meanwhile.

    Args:
        source: gives the JPEGs.
        pair: what both views draw.
        batch: images of every batch.
        workers: number of DALI's threads, and of threads that read files.
        prefetch: batches made ahead.
        device: where the crops are made and left.

    Raises:
        UserError: DALI does not work on this device.
    """

    def __init__(self, source: DaliSource, pair: ViewPair, *, batch: int, workers: int, prefetch: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        if on_gpu and device.index is None:
            # 'cuda' is the caller's current GPU, and the pool's threads must be given its number.
            device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(source, threads=1, prefetch=prefetch, device=device if on_gpu else None)
        self._jpeg, self._on_gpu = source.jpeg, on_gpu
        self.pinned = on_gpu
        self._held: deque[tuple[Any, Any]] = deque()
        self._readers = ThreadPoolExecutor(workers, thread_name_prefix="fastbyol-read")
        try:
            device_id = device.index if on_gpu else None
            self._pipeline = built_pipeline(lambda: self._graph(pair), batch_size=batch, num_threads=workers, device_id=device_id)
        except RuntimeError as error:
            self._readers.shutdown()
            raise UserError(f"data.dali_ops = 'crop': DALI cannot work on {device} ({dali_reason(error)}); use decode") from error

    def _graph(self, pair: ViewPair) -> list[Any]:
        """Returns DALI's graph: JPEGs and each view's boxes in, two batches (N, S, S, 3) out."""
        image = decoded_jpeg(on_gpu=self._on_gpu)
        return [crop(image, view, pair) for view in range(2)]

    def _submit(self, indices: Indices, draw: Draw) -> Pending:
        chunks = [indices[first : first + MAX_CHUNK] for first in range(0, len(indices), MAX_CHUNK)]
        # Submitted with the batch, and so up to data.prefetch batches before their turn to be decoded.
        reads = [self._readers.submit(lambda chunk: [self._jpeg(index) for index in chunk], chunk) for chunk in chunks]
        job = self._pool.submit(self._render, indices, draw, reads)
        return Pending([*reads, job], job.result)

    def _render(self, indices: Indices, draw: Draw, reads: list[Future[list[Pixels]]]) -> Rendered:
        parameters = draw(indices, *self.source.sizes(indices))
        inputs: dict[str, Any] = {"jpeg": [jpeg for read in reads for jpeg in read.result()]}
        for view in range(2):
            inputs |= box_arguments(parameters[:, view], view)
        try:
            outputs = self._pipeline.run(**inputs)  # blocks until the device has finished
        except RuntimeError as error:
            for _ in self.source.decode(indices):  # raises an error that names the damaged image, if there is one; DALI's doesn't
                pass
            raise UserError(f"DALI failed ({dali_reason(error)}); use data.dali_ops decode") from error
        views = torch.stack([torch.from_dlpack(output.as_tensor()) for output in outputs])
        if self._on_gpu:
            # Keep DALI's outputs alive until the GPU, which works asynchronously, has copied them: DALI would reuse their memory.
            copied = torch.cuda.Event()
            copied.record()
            self._held.append((copied, outputs))
            while self._held and self._held[0][0].query():
                self._held.popleft()
        return Rendered(indices, views, self.hosted(torch.from_numpy(parameters)))

    def close(self) -> None:
        """Stops the threads and closes the source."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        super().close()


def box_arguments(rows: NDArray[np.float32], view: int) -> dict[str, NDArray[np.float32]]:
    """Returns the inputs of `crop` for one view's boxes, by name, from the sampler's rows (N, P)."""
    boxes = {"start": rows[:, [CROP_Y, CROP_X]], "extent": rows[:, [CROP_H, CROP_W]]}
    return {f"{name}{view}": np.ascontiguousarray(box.astype(np.float32, copy=False)) for name, box in boxes.items()}


def crop(image: Any, view: int, pair: ViewPair) -> Any:
    """Cuts the view's box, then resizes it: no pixel outside the box counts, as in the paper's code."""
    from nvidia.dali import fn, types

    names: Any = types
    interpolation = {"bicubic": names.INTERP_CUBIC, "bilinear": names.INTERP_LINEAR}[pair.interpolation]  # DALI's cubic has a = -0.5 too
    box = [fn.external_source(name=f"{name}{view}", dtype=names.FLOAT, ndim=1) for name in ("start", "extent")]
    cut = fn.slice(image, *box, axes=[0, 1], normalized_anchor=False, normalized_shape=False)
    return fn.resize(cut, size=[pair.size_px, pair.size_px], interp_type=interpolation, antialias=pair.antialias)
