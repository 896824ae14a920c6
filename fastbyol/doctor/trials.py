"""The self tests: each does a little real work and holds the result against a slow reference. `self_tests.py` runs them in other processes.

python -m fastbyol.doctor.trials FOLDER NAME...        (FOLDER: for temporary files)
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastbyol.config.errors import UserError, shortened
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.doctor.subprocesses import report

IMAGES, SIZE_PX = 12, 32
VIEWS = ViewPair(size_px=SIZE_PX)
PIXEL_TOLERANCE = 1e-4
"""Largest difference of normalised pixels between float32 and float64 sums."""
THRESHOLD_SHARE = 1e-3
"""Share of pixels that may differ: those at solarize's threshold, where x and 1 - x are both right."""


class Wrong(Exception):
    """A result that is not what the reference says."""


def write_pictures(folder: Path) -> Path:
    """Writes a dozen small JPEGs of two classes, smooth as photographs are, and returns their folder."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = (40 + number, 60 - number)
        path = folder / "pictures" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=92)
    return folder / "pictures"


def views_of(data: Path, **options: Any) -> dict[int, tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]]:
    """Returns view 1, view 2 and the parameters of each image as the run's loader makes them, by the image's number."""
    from fastbyol.data import build_loader

    config = DataConfig(train=str(data), workers=1, **options)
    found = {}
    with build_loader(config, views=VIEWS, seed=0, global_batch=IMAGES // 2) as loader:
        for batch in loader:
            for row, index in enumerate(batch.index.tolist()):
                found[index] = (batch.view1[row].numpy(), batch.view2[row].numpy(), batch.parameters[row].numpy())
    return found


# ---- reading images


def folder_backend(folder: Path) -> str:
    from PIL import Image

    from fastbyol.augment.reference import render_view

    pictures = write_pictures(folder)
    files = sorted(pictures.rglob("*.jpg"), key=lambda path: str(path.relative_to(pictures)))
    worst = 0.0
    for index, (view1, view2, parameters) in views_of(pictures).items():
        image = torch.from_numpy(np.array(Image.open(files[index]).convert("RGB")))
        for view, row in zip((view1, view2), parameters, strict=True):
            off = (torch.from_numpy(view).double() - render_view(image, row, VIEWS)).abs().flatten()
            off = off.sort().values[: round(off.numel() * (1 - THRESHOLD_SHARE))]
            worst = max(worst, float(off[-1]))
    require_close("a view's largest error", worst, PIXEL_TOLERANCE)
    return f"two views of {IMAGES} JPEGs by the CPU kernel, at most {worst:.1g} from the reference"


def converted(folder: Path, write: Callable[..., Any], name: str) -> Path:
    """Converts the pictures, checks the result byte by byte, and returns its path."""
    from fastbyol.data.inspection.verification import verify

    pictures = write_pictures(folder)
    write(pictures, out=folder / name, workers=1)
    if (found := verify(folder / name, workers=1)).num_faults:
        raise Wrong(f"the conversion has {found.num_faults} faults: {found.faults[0]}")
    return folder / name


def same_views(ours: Path, folder: Path, **options: Any) -> str:
    pictures, got = views_of(folder / "pictures"), views_of(ours, **options)
    off = [index for index, views in pictures.items() if not all(map(np.array_equal, views, got[index]))]
    if off:
        raise Wrong(f"the views of {len(off)} of {IMAGES} images differ from those of the image files")
    return f"converted, verified and read {IMAGES} JPEGs; the views equal those of the image files to the bit"


def ffcv_backend(folder: Path) -> str:
    from fastbyol.data.conversion.beton_writer import write_beton

    return same_views(converted(folder, write_beton, "pictures.beton"), folder)


def dali_backend(folder: Path) -> str:
    from fastbyol.data.conversion.tar_writer import write_tar_shards

    return same_views(converted(folder, write_tar_shards, "pictures_tar"), folder)


def dali_on_gpu(folder: Path) -> str:
    from fastbyol.data import build_loader, views_on_device
    from fastbyol.data.conversion.tar_writer import write_tar_shards

    device, worst = torch.device("cuda"), 0.0
    shards = converted(folder, write_tar_shards, "pictures_tar")
    expected = views_of(folder / "pictures")
    config = DataConfig(train=str(shards), workers=1)
    with build_loader(config, views=VIEWS, seed=0, global_batch=IMAGES // 2, device=device, output="uint8") as loader:
        for batch in loader:
            views = views_on_device(batch, VIEWS, device)[0].cpu().double().chunk(2)
            for row, index in enumerate(batch.index.tolist()):
                for view, right in zip(views, expected[index][:2], strict=True):
                    worst = max(worst, float((view[row] - torch.from_numpy(right).double()).abs().mean()))
    # nvJPEG and DALI round differently from the CPU: by one or two of 255 levels, here normalised.
    require_close("a view's mean error", worst, 0.05)
    return f"nvJPEG decoded and DALI cropped {IMAGES} JPEGs, on average at most {worst:.2g} from the CPU's views"


def jpeg_check(folder: Path) -> str:
    from fastbyol.data.conversion.jpeg_scan import is_whole

    files = [path.read_bytes() for path in write_pictures(folder).rglob("*.jpg")]
    cut = [jpeg[: len(jpeg) // 2] + jpeg[-2:] for jpeg in files]
    if not all(map(is_whole, files)) or any(map(is_whole, cut)):
        raise Wrong("whole and cut JPEGs are not told apart")
    return f"{len(files)} whole and {len(cut)} cut JPEGs told apart"


# ---- arithmetic


def require_close(what: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:  # also for nan
        raise Wrong(f"{what} is {error:.3g}, more than {tolerance:g}")


def relative_error(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got.double().cpu() - right.double().cpu()).abs().max() / right.double().abs().max().clamp_min(1e-12).cpu())


def lars_and_target(folder: Path, *, device: str, backend: str) -> str:
    """Three steps of LARS with the target's update, against the rule as it is written, in float64."""
    from fastbyol.optim.ema import TargetUpdate, ema_update_reference
    from fastbyol.optim.lars import LARS, lars_step_reference
    from fastbyol.optim.param_groups import byol_param_groups

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 40, 3), torch.nn.BatchNorm2d(40), torch.nn.Flatten(), torch.nn.Linear(160, 70)).to(
        device
    )
    online = list(module.parameters())
    target = [param.detach() + 0.1 for param in online]
    groups = byol_param_groups(module)
    optimizer = LARS(groups, lr=0.3, weight_decay=1e-2)
    adapted = {id(param): group.get("adapt", True) for group in optimizer.param_groups for param in group["params"]}
    slow = [(param.detach().double().clone(), torch.zeros_like(param, dtype=torch.float64)) for param in online]
    slow_target = [each.double() for each in target]
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(6, 3, 4, 4, device=device)).square().mean().backward()
        for param, (weight, momentum) in zip(online, slow, strict=True):
            options: dict[str, Any] = {
                "lr": 0.3,
                "momentum": 0.9,
                "weight_decay": 1e-2,
                "trust_coefficient": 1e-3,
                "adapt": adapted[id(param)],
            }
            assert param.grad is not None
            lars_step_reference(weight, param.grad.double(), momentum, **options)
        optimizer.step(target_update=TargetUpdate(target, online, 0.9, backend))
        ema_update_reference(slow_target, [weight for weight, _ in slow], 0.9)
    worst = max(
        relative_error(a.detach(), b) for a, b in zip([*online, *target], [*[weight for weight, _ in slow], *slow_target], strict=True)
    )
    require_close("the largest relative error", worst, 1e-4)
    return f"three steps on {device}, at most {worst:.1g} (relative) from the rule in float64"


def batch_norm(folder: Path) -> str:
    """Norm, shortcut and ReLU in one operation, forward and backward, against torch's in float64."""
    from fastbyol.models.norm_relu import norm_relu
    from fastbyol.models.view_batchnorm import ViewBatchNorm

    torch.manual_seed(0)
    norm = ViewBatchNorm(24, views=2)
    exact = copy.deepcopy(norm).double()
    x, shortcut = (torch.randn(6, 24, 9, 9).contiguous(memory_format=torch.channels_last) for _ in range(2))
    ours, theirs = ([each.to(kind).clone().requires_grad_() for each in (x, shortcut)] for kind in (torch.float32, torch.float64))
    output, expected = norm_relu(norm, *ours), F.relu(exact(theirs[0]) + theirs[1])
    gradient = torch.randn_like(output)
    gradient[(expected < 0.02) & ((expected > 0) | (output > 0))] = 0  # rounding decides on which side of ReLU's zero such values are
    output.backward(gradient)
    expected.backward(gradient.double())
    pairs = [(output.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    worst = max(relative_error(a, b) for a, b in pairs if a is not None and b is not None)
    require_close("the largest relative error", worst, 1e-5)
    return f"output and gradients at most {worst:.1g} (relative) from torch's in float64"


def _step_loss(device: str, *, bf16: bool) -> tuple[Any, float]:
    """Returns a small BYOL and its loss on random images after a backward pass."""
    from fastbyol.byol import BYOL
    from fastbyol.models import build_encoder

    torch.manual_seed(0)
    byol = BYOL(build_encoder("resnet8", stem="small2"), hidden_dim=64, projection_dim=32, num_classes=1)
    byol = byol.to(torch.device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    views = torch.rand(2 * 4, 3, SIZE_PX, SIZE_PX, device=device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        loss = byol(views, None, torch.zeros(4, dtype=torch.int64, device=device)).loss
    loss.backward()
    return byol, loss.item()


def bf16_step(folder: Path, *, device: str) -> str:
    _, right = _step_loss(device, bf16=False)
    byol, loss = _step_loss(device, bf16=True)
    if not all(param.grad is None or bool(param.grad.isfinite().all()) for param in byol.parameters()):
        raise Wrong("a gradient is not finite")
    require_close("the loss's distance from float32's", abs(loss - right), 0.05)
    return f"forward and backward of a small BYOL on {device}: loss {loss:.4f}, in float32 {right:.4f}"


def compiled_step(folder: Path, *, device: str) -> str:
    from fastbyol.host.compile_cache import give_inductor_a_cache
    from fastbyol.models.heads import mlp_head
    from fastbyol.run.precision import set_up_inductor

    give_inductor_a_cache()
    set_up_inductor()
    torch.manual_seed(0)
    head = mlp_head(32, hidden_dim=48, out_dim=16).to(device)
    x = torch.randn(24, 32, device=device)
    right = F.normalize(copy.deepcopy(head)(x), dim=1)
    got = torch.compile(lambda images: F.normalize(head(images), dim=1), fullgraph=True, dynamic=False)(x)
    got.sum().backward()
    worst = relative_error(got.detach(), right.detach())
    require_close("the largest relative error", worst, 1e-4)
    return f"a projector compiled for {device}, forward and backward, at most {worst:.1g} (relative) from eager"


def device_augmentation(folder: Path) -> str:
    """The augmentation of uint8 crops, compiled on the GPU, against the same graph, eager, on the CPU."""
    from fastbyol.data import build_loader, views_on_device
    from fastbyol.run.precision import compiles_augmentation

    pictures, worst = write_pictures(folder), 0.0
    config, gpu = DataConfig(train=str(pictures), workers=1), torch.device("cuda")
    with build_loader(config, views=VIEWS, seed=0, global_batch=IMAGES, output="uint8") as loader:
        for batch in loader:
            right = views_on_device(batch, VIEWS, torch.device("cpu"))[0].double().flatten()
            got = views_on_device(batch, VIEWS, gpu, compiled=compiles_augmentation(gpu))[0].cpu().double().flatten()
            off = (got - right).abs().sort().values
            worst = max(worst, float(off[round(len(off) * (1 - THRESHOLD_SHARE)) - 1]))
    require_close("a view's largest error", worst, 1e-3)
    return f"two views of {IMAGES} images on the GPU, at most {worst:.1g} from the CPU's"


def nccl(folder: Path) -> str:
    """NCCL's all_reduce of one process; several GPUs need several processes, which a run starts."""
    import torch.distributed as dist

    dist.init_process_group("nccl", init_method=f"file://{folder}/meeting", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    numbers = torch.arange(4.0, device="cuda")
    dist.all_reduce(numbers)
    right = numbers.tolist() == [0.0, 1.0, 2.0, 3.0]
    dist.destroy_process_group()
    if not right:
        raise Wrong(f"all_reduce gave {numbers.tolist()}")
    return "an all_reduce of one process"


TRIALS: dict[str, Callable[[Path], str]] = {
    "folder backend": folder_backend,
    "ffcv backend": ffcv_backend,
    "dali backend": dali_backend,
    "dali on the GPU": dali_on_gpu,
    "JPEG check": jpeg_check,
    "LARS and target": partial(lars_and_target, device="cpu", backend="auto"),
    "LARS, foreach": partial(lars_and_target, device="cpu", backend="foreach"),
    "LARS on the GPU": partial(lars_and_target, device="cuda", backend="auto"),
    "target by triton": partial(lars_and_target, device="cuda", backend="triton"),
    "target by apex": partial(lars_and_target, device="cuda", backend="apex"),
    "batch norm": batch_norm,
    "bf16 on the CPU": partial(bf16_step, device="cpu"),
    "bf16 on the GPU": partial(bf16_step, device="cuda"),
    "torch.compile, CPU": partial(compiled_step, device="cpu"),
    "torch.compile, GPU": partial(compiled_step, device="cuda"),
    "views on the GPU": device_augmentation,
    "NCCL": nccl,
}


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    for number, name in enumerate(names):
        report(begun=name)
        begin, own = time.monotonic(), Path(folder, f"{os.getpid()}.{number}")
        own.mkdir()
        try:
            report(text=f"{TRIALS[name](own)} ({time.monotonic() - begin:.1f} s)")
        except (UserError, Wrong) as error:
            report(fault=shortened(error, limit=300))
        except Exception as error:
            report(fault=f"{type(error).__name__}: {shortened(error, limit=300)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
