"""Measures feature extraction from image files with a frozen encoder, which dominates kNN and linear evaluation.

How: the product's `build_image_loader` and `extract_features`, float32, one thread each. Reference: torchvision's resize and centre
crop on Pillow images in the same thread, float32, NCHW. Ceiling: the encoder's forward alone, on images in memory. Read the wall
clock: the loader works beside the encoder. `embed` is the whole command but for Python's own start: the weights are read and digested, the
data opened, features written to parts and then to one file; its fixed costs weigh on so few images. `encoder thread x forward` counts the
CPU time of the thread that runs the encoder alone, what embedding costs in time where another core decodes.

    python -m benchmarks.run evaluate

Why: one forward without gradient costs an eighth of a training step, but a centre crop most of the cost of two views, so evaluation
becomes data-bound sooner than training. Our centre crop costs less than torchvision's because it crops first and resizes once. A data
set whose images fit in a GiB is decoded once for all protocols (`Split`).
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torchvision import transforms

from benchmarks.imagenet_like import stored_for, write_imagenet_like
from benchmarks.record import CaseResult, measured
from benchmarks.timing import subjects_of, torch_threads
from fastbyol.config.views import PAPER, ViewPair
from fastbyol.data import build_image_loader
from fastbyol.data.batch import ImageBatch
from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.evaluation.embedding import embed
from fastbyol.evaluation.feature_file import FeatureFile
from fastbyol.evaluation.features import extract_features
from fastbyol.models import build_encoder
from fastbyol.ranks.process_group import Process

REFERENCE, CEILING, OURS, LOADER = "torchvision on Pillow, NCHW", "forward alone", "extract_features, .beton", "decode and crop alone"
EMBED = "embed, .beton to .npz"
SHORT_SIDE = 256 / 224
"""Short side of torchvision's usual resize before a centre crop, relative to the crop's side."""


@dataclass(frozen=True)
class Size:
    images: int
    """A multiple of batch."""
    batch: int
    rounds: int
    encoder: str
    size_px: int
    torch_threads: int = 1
    workers: int = 1
    scale: float = 1.0
    """Scale of ImageNet's image sides."""
    seed: int = 0


QUICK = Size(images=32, batch=16, rounds=6, encoder="resnet18", size_px=64)
FULL = Size(images=64, batch=16, rounds=9, encoder="resnet50", size_px=224)


def run(size: Size, *, scratch: Path) -> CaseResult:
    folder = write_imagenet_like(scratch / "images", images=size.images, classes=2, scale=size.scale, seed=size.seed)
    beton = stored_for("ffcv", folder, out=scratch)
    views = replace(PAPER, size_px=size.size_px)
    torch.manual_seed(size.seed)
    # Two: `extract_features` leaves its encoder in channels-last layout, and the reference is NCHW.
    encoder, theirs = build_encoder(size.encoder), build_encoder(size.encoder).eval()
    held = [torch.randn(size.batch, 3, size.size_px, size.size_px) for _ in range(size.images // size.batch)]
    batches = [ImageBatch(image, torch.zeros(size.batch, dtype=torch.int64), torch.arange(size.batch)) for image in held]
    thread_s: dict[str, list[float]] = defaultdict(list)

    def counted(name: str, work: Callable[[], object]) -> Callable[[], object]:
        def counting() -> object:
            before = time.thread_time()
            done = work()
            thread_s[name].append(time.thread_time() - before)
            return done

        return counting

    with (
        build_image_loader(beton, views=views, batch=size.batch, workers=size.workers) as loader,
        torch_threads(size.torch_threads),
    ):
        work = {
            CEILING: counted(CEILING, lambda: extract_features(encoder, batches, every_image=False)),
            OURS: lambda: extract_features(encoder, loader),
            EMBED: counted(EMBED, _embedding(beton, encoder, size, scratch=scratch)),
            LOADER: lambda: deque(loader, maxlen=0),
            REFERENCE: _torchvision_features(folder, theirs, views, size.batch),
        }
        title = f"features of {size.encoder} at {size.size_px} px from JPEG files, batch {size.batch}"
        subjects = subjects_of(work, units=size.images, notes={REFERENCE: "not beside the encoder"})
        threads = size.torch_threads + size.workers
        given = {"reference": REFERENCE, "ceiling": CEILING, "threads": threads, "primary": "wall", "settings": size}
        result = measured("evaluate", title, subjects, **given)
    # The first of each is the warm-up.
    thread = {name: median(seconds[1:]) for name, seconds in thread_s.items()}
    return result.with_extra({EMBED: {"encoder thread x forward": thread[EMBED] / thread[CEILING]}})


def _embedding(beton: Path, encoder: torch.nn.Module, size: Size, *, scratch: Path) -> Callable[[], FeatureFile]:
    """Returns a function that embeds the data set to a new file, from a file of the encoder's weights."""
    weights, out = scratch / "encoder.pt", scratch / "features.npz"
    torch.save(encoder.state_dict(), weights)
    process = Process(rank=0, world_size=1, device=torch.device("cpu"))

    def embedded() -> FeatureFile:
        out.unlink(missing_ok=True)
        changes = {"views.size_px": size.size_px}
        return embed(weights, beton, out=out, changes=changes, batch=size.batch, workers=size.workers, process=process)

    return embedded


def _torchvision_features(folder: Path, encoder: torch.nn.Module, views: ViewPair, batch: int) -> Callable[[], torch.Tensor]:
    listing = list_image_folder(folder)
    transform = transforms.Compose(
        [
            transforms.Resize(round(SHORT_SIDE * views.size_px), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(views.size_px),
            transforms.ToTensor(),
            transforms.Normalize(views.mean, views.std),
        ]
    )

    def images() -> Iterator[torch.Tensor]:
        for index in range(len(listing.files)):
            with Image.open(str(listing.path(index))) as file:
                yield transform(file.convert("RGB"))  # type: ignore[misc]

    @torch.no_grad()
    def features() -> torch.Tensor:
        source = images()
        return torch.cat([encoder(torch.stack([next(source) for _ in range(batch)])) for _ in range(len(listing.files) // batch)])

    return features
