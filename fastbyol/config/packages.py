"""The Python packages that fastbyol is built on: which are needed, what each optional one is for, and the command that installs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A package. module: its import name; extra: the extra of fastbyol that installs it ('' for the core); without: what its absence costs."""

    package: str
    module: str
    extra: str
    without: str

    @property
    def command(self) -> str:
        return f"pip install 'fastbyol[{self.extra}]'" if self.extra else f"pip install {self.package}"


CORE = tuple(
    Part(package, module, "", "nothing works")
    for package, module in (
        ("torch", "torch"),
        ("torchvision", "torchvision"),
        ("numpy", "numpy"),
        ("numba", "numba"),
        ("pillow", "PIL"),
        ("jsonargparse", "jsonargparse"),
        ("pyyaml", "yaml"),
        ("packaging", "packaging"),
        ("rich", "rich"),
        ("scikit-learn", "sklearn"),
        ("threadpoolctl", "threadpoolctl"),
        ("matplotlib", "matplotlib"),
    )
)
OPTIONAL = (
    Part(
        "ffcv",
        "ffcv",
        "ffcv",
        "no .beton files: train from tar shards (dali) or from the images themselves (a quarter more CPU time per image)",
    ),
    Part("nvidia-dali-cuda130", "nvidia.dali", "dali", "no tar shards, and no decoding on the GPU: train from a .beton or from the images"),
    Part("timm", "timm", "timm", "no encoders of timm, no optimizers but LARS, SGD and AdamW, no export to timm"),
    Part("tensorboard", "tensorboard", "tensorboard", "no TensorBoard files; metrics.jsonl and the report have the same figures"),
    Part("wandb", "wandb", "wandb", "no logging to Weights & Biases"),
    Part("torchmetrics", "torchmetrics", "eval", "no evaluate detection"),
    Part("pycocotools", "pycocotools", "eval", "no evaluate detection"),
    Part("h5py", "h5py", "eval", "evaluate depth cannot read the labelled file of NYU v2"),
    Part("pyarrow", "pyarrow", "parquet", "no data sets and no embeddings in Parquet files; embeddings can be .npz or .npy"),
    Part("safetensors", "safetensors", "export", ".safetensors files can be neither read nor written"),
    Part("onnx", "onnx", "export", "no export to ONNX"),
    Part("onnxscript", "onnxscript", "export", "no export to ONNX"),
    Part("onnxruntime", "onnxruntime", "export", "no export to ONNX, because it could not be compared with the encoder"),
    Part("fsspec", "fsspec", "remote", "no data and no outputs at URLs: s3://, gs://, hf://, https://"),
    Part("s3fs", "s3fs", "remote", "no s3://"),
    Part("aiohttp", "aiohttp", "remote", "no https://"),
    Part("ray", "ray", "ray", "no --engine ray in convert and embed: they run on this machine, or in parts that you start yourself"),
    Part("umap-learn", "umap", "umap", "the report's map of the images is by PCA only"),
    Part(
        "torch-optimizer",
        "torch_optimizer",
        "torch-optimizer",
        "no optim.name torch_optimizer_lars, with which our LARS can be cross-checked",
    ),
)


def part_of(module: str) -> Part | None:
    """Returns the package that is imported by this name, or None if there is none; only whole import names match, not modules inside a package."""
    return next((part for part in (*CORE, *OPTIONAL) if part.module == module), None)
