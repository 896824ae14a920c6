"""The configuration of a run: frozen dataclasses, one per concern, checked when they are built.

Every default is that of the paper's 300-epoch ResNet-50 run (Grill et al., section 3.3 and appendix F; official configs/byol.py). The
text below a field is its --help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastbyol.config.arguments import expand_home
from fastbyol.config.errors import (
    UserError,
    public_argument,
    require,
    require_at_least,
    require_between,
    require_choice,
    require_positive,
    require_probability,
)
from fastbyol.config.plain import flatten, to_plain
from fastbyol.config.urls import is_url
from fastbyol.config.views import ViewPair

BACKENDS = ("auto", "ffcv", "dali", "folder")
TRAVERSALS = ("random", "local", "sharded")
DALI_OPS = ("auto", "decode", "crop")
UPDATES = ("auto", "foreach", "triton", "apex")
MOST_EPOCHS = 1e9
"""Largest number of epochs that is accepted; a number such as 1e308 would overflow when it is multiplied by the images."""
RESUME_MODES = ("auto", "must", "never")


@dataclass(frozen=True)
class DataConfig:
    """Location of the images and how they are read."""

    train: str = ""
    """A .beton file, a folder of tar shards made by `convert --to dali`, or images that were not converted: a folder, tars, a list or Parquet files
    (docs/data.md lists them); 'a::b' joins several. Each may be at a URL: s3://, gs://, hf://, https:// (pip install 'fastbyol[remote]').
    """
    labels: str = "auto"
    """Source of the labels of images that were not converted; only the probe uses them, training does not. auto: the labels that the data
    have; folders: the names of the top-level folders; none; or a file of labels.
    """
    path_column: str = ""
    """Column of image paths where `train` or `labels` is a table; empty: recognised by its header."""
    label_column: str = ""
    """Column of labels where `train` or `labels` is a table; empty: recognised by its header in `labels`, and no labels in `train`."""
    backend: str = "auto"
    """auto, ffcv, dali or folder; auto chooses the one that reads the format of `train`."""
    workers: int = 0
    """Decoding and augmentation threads per process; 0: one per core, or per core of the process's share where several share them."""
    prefetch: int = 3
    """Number of batches prepared ahead of the training step."""
    traversal: str = "random"
    """random: shuffle over all images. local: for converted data larger than memory on storage with slow seeks; reads blocks of 8 MiB and shuffles
    within windows of many blocks. sharded: the same where each node (machine of ranks) owns a part of the blocks for an epoch and mixes
    within it, so that N nodes read each byte once and not N times; it changes the shuffle, which then depends on the number of nodes.
    """
    window_mib: int = 2048
    """Size of the windows within which the traversals local and sharded shuffle. Two windows should fit in memory, or for a URL in the cache."""
    cache: str = ""
    """Folder on local disk for parts of data at a URL, which all ranks and runs of a machine may share; empty: fastbyol/data in
    $XDG_CACHE_HOME, usually ~/.cache.
    """
    cache_gib: float = 64.0
    """Largest size of that folder. The traversals local and sharded need space for two windows only; random needs space for all the data."""
    dali_ops: str = "auto"
    """Operations that the dali backend leaves to DALI. decode: decoding, on the CPU; crop: decoding and cropping, on the GPU if there is one;
    auto: crop if there is a GPU (we have not run this yet), else decode.
    """
    val: str = ""
    """Labelled images of the same classes for monitors.knn_every_epochs; training does not use them."""

    def __post_init__(self) -> None:
        _expand_home(self, "data.train", "data.val", "data.labels", "data.cache")
        require_choice("data.backend", self.backend, BACKENDS)
        require_choice("data.traversal", self.traversal, TRAVERSALS)
        require_choice("data.dali_ops", self.dali_ops, DALI_OPS)
        require_at_least("data.window_mib", self.window_mib, 1)
        require_positive("data.cache_gib", self.cache_gib)
        require_between("data.workers", self.workers, 0, 1024)
        require_between("data.prefetch", self.prefetch, 1, 1024)


@dataclass(frozen=True)
class ModelConfig:
    """Encoder, projector and predictor (section 3.3)."""

    encoder: str = "resnet50"
    """resnet8 to resnet200, or any of timm's: timm/convnext_tiny, ..."""
    width: int = 1
    """Multiplies the width of every convolution, unlike torchvision's wide_resnet."""
    stem: str = "imagenet"
    """imagenet: 7x7 stride 2 and max-pool; small: 3x3 stride 1; small2: 3x3 stride 2 (images of 32 to 64 px)."""
    padding: str = "symmetric"
    """symmetric, as in PyTorch; same, as in TensorFlow (the official checkpoints need it)."""
    zero_init_last_gamma: bool = False
    """Initialise the last batch-norm scale of each residual branch to zero. Off in the paper's results."""
    initialisation: str = "kaiming"
    """kaiming, as torchvision; truncated_normal, as the official code (no difference in accuracy, section 5)."""
    projector_layers: int = 2
    """Linear layers of the projector."""
    predictor_layers: int = 2
    """Linear layers of the predictor. 0: no predictor (an ablation; the run collapses without a negative term)."""
    head_bias: bool = False
    """Give the last linear layer of projector and predictor a bias, as in the paper's pseudo-code (appendix J.2); the official code has none."""
    hidden_dim: int = 4096
    """Width of the hidden layers of projector and predictor."""
    projection_dim: int = 256
    """Dimensions of the projection, and of its prediction."""

    def __post_init__(self) -> None:
        require_choice("model.stem", self.stem, ("imagenet", "small", "small2"))
        require_choice("model.padding", self.padding, ("symmetric", "same"))
        require_choice("model.initialisation", self.initialisation, ("kaiming", "truncated_normal"))
        require_between("model.width", self.width, 1, 64)
        require_between("model.projector_layers", self.projector_layers, 1, 16)
        require_between("model.predictor_layers", self.predictor_layers, 0, 16)
        for name in ("hidden_dim", "projection_dim"):
            require_between(f"model.{name}", getattr(self, name), 1, 2**17)


WEIGHTS_OPTIONS = (
    *("model.encoder", "model.width", "model.stem", "model.padding"),
    *("views.size_px", "views.interpolation", "views.antialias", "views.mean", "views.std"),
)
"""Options that another program's weights may need and their file cannot tell."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """BYOL's regression, or another member of the InfoNCE-beta family (section 5, equations 6 to 9).

    SimCLR: beta 1, target online, and model.predictor_layers 0.
    """

    beta: float = 0.0
    """Weight of the negative term."""
    alpha: float = 0.1
    """Temperature of the negative term; no effect if beta is 0."""
    target: str = "ema"
    """Projections that are predicted. ema: the target network's; online: the online network's, with gradient; stop_gradient: the online
    network's, without gradient.
    """
    normalization: str = "l2"
    """Normalisation of predictions and targets before their distance is taken: l2; layer_norm; batch_norm, over all ranks; none
    (appendix F.6).
    """
    predictor: str = "network"
    """network: an MLP of model.predictor_layers layers; least_squares: no network, the best linear map of each batch in closed form
    (appendix I.2).
    """

    def __post_init__(self) -> None:
        require_choice("objective.normalization", self.normalization, ("l2", "layer_norm", "batch_norm", "none"))
        require_choice("objective.predictor", self.predictor, ("network", "least_squares"))
        contrasts = self.beta > 0 and self.normalization != "l2"
        require(not contrasts, "objective.normalization", self.normalization, "'l2' where objective.beta is above 0")
        require_at_least("objective.beta", self.beta, 0.0)
        require_positive("objective.alpha", self.alpha)
        require_choice("objective.target", self.target, ("ema", "online", "stop_gradient"))


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer of the online network and update of the target."""

    name: str = "lars"
    """lars (the paper's), sgd, adamw, torch_optimizer_lars, or any of timm's: timm_lamb, timm_lars, ..."""
    base_lr: float = 0.3
    """Learning rate per 256 images: the peak is base_lr * global_batch / 256."""
    warmup_epochs: float = 10.0
    """Passes over the images in which the learning rate rises from 0 to its peak."""
    warmup_steps: int = 0
    """Length of the warm-up in optimizer steps; 0: it is set by warmup_epochs."""
    momentum: float = 0.9
    """Momentum of lars and sgd."""
    weight_decay: float = 1e-6
    """Weight decay; lars leaves out biases and batch norms."""
    trust_coefficient: float = 1e-3
    """LARS's trust coefficient eta, a factor of its trust ratio."""
    update: str = "auto"
    """Implementation of the target's update, for every optimizer. auto: with lars on a CPU, our own kernel, which does the step and
    the update in one pass; else foreach. foreach: torch's operations over lists of tensors, also for the step of lars. triton: a single
    kernel launch (GPU). apex: NVIDIA's amp_C (GPU; PyPI's apex is another package). We have never run triton and apex on a GPU;
    `python -m fastbyol tune` measures them on yours and writes the fastest.
    """
    tau_base: float = 0.99
    """Target decay rate at step 0; it rises to 1 along a cosine."""
    projector_lr_factor: float = 1.0
    """Multiplies the projector's learning rate (appendix I.1)."""
    predictor_lr_factor: float = 1.0
    """Multiplies the predictor's learning rate; 0 keeps its initial weights."""

    def __post_init__(self) -> None:
        if not self.name.startswith("timm_"):
            require_choice("optim.name", self.name, ("lars", "sgd", "adamw", "torch_optimizer_lars", "timm_NAME (any of timm's)"))
        require_choice("optim.update", self.update, UPDATES)
        require_positive("optim.base_lr", self.base_lr)
        require_between("optim.warmup_epochs", self.warmup_epochs, 0.0, MOST_EPOCHS)
        require_at_least("optim.weight_decay", self.weight_decay, 0.0)
        require_positive("optim.trust_coefficient", self.trust_coefficient)
        require(0.0 <= self.momentum < 1.0, "optim.momentum", self.momentum, "in [0, 1)")
        require_between("optim.warmup_steps", self.warmup_steps, 0, 10**9)
        require_probability("optim.tau_base", self.tau_base)
        for name in ("projector_lr_factor", "predictor_lr_factor"):
            require_between(f"optim.{name}", getattr(self, name), 0.0, 1e4)


_YES_NO = {"true": "yes", "on": "yes", "false": "no", "off": "no"}


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats and memory layout of the training step."""

    autocast: str = "bf16"
    """bf16 (a CPU uses it only where it is faster than float32: on x86 with AVX-512); fp16 (GPU, with a gradient scaler); tf32 (GPU: float32
    with matrix products on tensor cores); off: float32.
    """
    channels_last: bool = True
    """Store activations with the channels last (NHWC), because convolutions are faster with this layout."""
    compile: str = "auto"
    """Use torch.compile for the whole forward pass and loss: yes; no; auto: only on a GPU. The first step then takes a minute or more. The
    augmentation on a GPU is always compiled.
    """
    compile_mode: str = "default"
    """default; reduce-overhead: CUDA graphs (GPU); max-autotune: tries several kernels, so the first step takes longer
    (unlike torch's mode of that name, it does not use CUDA graphs).
    """
    compile_cache: str = ""
    """Folder for compiled code, which later runs reuse; empty: torch's own folder, which a reboot may clear."""
    cross_replica_bn: bool = True
    """Compute batch-norm statistics over all devices, as the official code does. No effect on one device."""
    bn_ranks: int = 0
    """Number of neighbouring ranks that share batch-norm statistics. It must divide the number of ranks; 0: all ranks share them. Fewer ranks
    wait for each other in every layer, but it changes the method: batch norm then sees bn_ranks / ranks of the batch at a time (in the
    paper's ablation 72.5 % top-1 with 4096 images, 71.8 with 256, 69.6 with 128, 59.7 with 64), and a checkpoint has the running
    statistics of rank 0's group.
    """
    gradient_messages: str = "float32"
    """Data type in which ranks exchange gradients; bf16 halves the traffic. No effect on one device."""
    cudnn_benchmark: bool = False
    """Let cuDNN try its algorithms on the first batch and keep the fastest (GPU). Not measured by us; `python -m fastbyol tune` measures it
    on your card. Runs are then not repeatable to the bit.
    """
    pad_stem: bool = False
    """Give the first convolution a fourth input channel of zeros, so that tensor cores can read pixels whole. Results, weights and files stay
    the same. Not measured by us on a GPU; `python -m fastbyol tune` measures it on your card.
    """
    freed_memory: str = "keep"
    """Treatment of the memory that a step frees, on a CPU. keep: the process keeps it for the next step, which is faster; return: the process
    returns it to the operating system, so the process uses less (docs/performance.md has both figures).
    """

    def __post_init__(self) -> None:
        _expand_home(self, "precision.compile_cache")
        require_choice("precision.autocast", self.autocast, ("bf16", "fp16", "tf32", "off"))
        require_choice("precision.compile_mode", self.compile_mode, ("default", "reduce-overhead", "max-autotune"))
        require_choice("precision.gradient_messages", self.gradient_messages, ("float32", "bf16"))
        require_choice("precision.freed_memory", self.freed_memory, ("keep", "return"))
        require_between("precision.bn_ranks", self.bn_ranks, 0, 2**20)
        require(
            self.cross_replica_bn or not self.bn_ranks, "precision.bn_ranks", self.bn_ranks, "0 where precision.cross_replica_bn is false"
        )
        # Earlier versions wrote true and false, and YAML takes a plain yes for true.
        object.__setattr__(self, "compile", _YES_NO.get(str(self.compile).lower(), self.compile))
        require_choice("precision.compile", self.compile, ("auto", "yes", "no"))


@dataclass(frozen=True)
class MonitorsConfig:
    """Monitoring options; none of them changes what is learnt."""

    stop_on_collapse: bool = True
    """End a run whose projections have collapsed to one point and stay there (docs/monitors.md); false: only report it."""
    collapse_patience: int = 1000
    """Optimizer steps that a collapse must last before the run is ended; a run is never ended during warm-up."""
    knn_every_epochs: float = 0.0
    """Epochs between two kNN evaluations on data.val during training; 0: none."""
    knn_images: int = 20_000
    """Largest number of images per split in that evaluation; a fixed random choice."""
    wandb_project: str = ""
    """Weights & Biases project to log to; empty: none. Needs pip install 'fastbyol[wandb]'."""

    def __post_init__(self) -> None:
        require_at_least("monitors.collapse_patience", self.collapse_patience, 1)
        require_at_least("monitors.knn_every_epochs", self.knn_every_epochs, 0.0)
        require_at_least("monitors.knn_images", self.knn_images, 1)


@dataclass(frozen=True)
class TrainConfig:
    """All options of one pre-training run."""

    out: str = ""
    """Run folder."""
    epochs: float = 300.0
    """Passes over the training images; the run ends after int(epochs * images) // global_batch optimizer steps. Must be 0 where steps is given."""
    steps: int = 0
    """Length of the run in optimizer steps, whatever the number of images: the usual way for a small set. 0: it is set by epochs."""
    global_batch: int = 4096
    """Images per optimizer step, over all devices and accumulated micro-batches."""
    rank_batch: int = 0
    """Images per device in one forward pass; 0: global_batch / devices. A smaller value accumulates gradients, and batch norm then sees
    fewer images.
    """
    seed: int = 0
    """Random seed of the initial weights, the order of the images, and their views."""
    log_every: int = 10
    """Optimizer steps between two log lines."""
    checkpoint_every: int = 500
    """Optimizer steps between two checkpoints; the end of the run always writes one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_every_epochs: float = 0.0
    """Epochs between two additional checkpoints, which are never deleted and do not depend on checkpoint_every; 0: none."""
    resume: str = "auto"
    """auto: continue the run in `out` if there is one, else start it; must: fail if there is none; never: fail if there is one."""
    mirror: str = ""
    """URL (s3://, gs://, file:// and others that can be written to) to which each checkpoint is copied in the background; a run whose folder
    is new or behind continues from the newest copy. Empty: none.
    """
    init_from: str = ""
    """Start from the weights of this run folder, checkpoint, or encoder state dict, with a new schedule. No effect when the run is
    resumed.
    """
    timeout_s: float = 600.0
    """Seconds after which the run is ended if a rank, a data source or a device does not respond. A first step that compiles may take an
    hour, but no rank may take timeout_s longer to compile than another.
    """
    grace_s: float = 60.0
    """Seconds to finish and save the current step after SIGTERM, SIGINT, SIGHUP or SIGUSR1; then the process exits without saving it."""
    profile_steps: int = 0
    """Number of steps to profile, from the sixth on; the trace and a table go to RUN/profile. 0: none."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewPair = field(default_factory=ViewPair)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)

    def __post_init__(self) -> None:
        _expand_home(self, "out", "init_from", "mirror")
        for name in ("out", "init_from"):
            if is_url(getattr(self, name)):
                raise UserError(
                    f"{name} = {getattr(self, name)}: is a URL, and a run reads and writes its files on this machine; give a path"
                )
        for name, passes, steps in (
            ("epochs", self.epochs, self.steps),
            ("optim.warmup_epochs", self.optim.warmup_epochs, self.optim.warmup_steps),
        ):
            counted = name.replace("epochs", "steps")
            if passes and steps:
                raise UserError(f"{name} = {passes:g}: has no effect where {counted} is {steps}; give one of them, and 0 for the other")
        require_between("steps", self.steps, 0, 10**9)
        if not self.steps:
            require_positive("epochs", self.epochs)
        require_between("epochs", self.epochs, 0.0, MOST_EPOCHS)
        for name in ("global_batch", "log_every", "checkpoint_every"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("rank_batch", self.rank_batch, 0)
        require_between("profile_steps", self.profile_steps, 0, 1000)
        require_at_least("keep_checkpoints", self.keep_checkpoints, 2)
        require_at_least("keep_every_epochs", self.keep_every_epochs, 0.0)
        require_choice("resume", self.resume, RESUME_MODES)
        for name in ("timeout_s", "grace_s"):
            require_between(name, getattr(self, name), 1.0, 7 * 24 * 3600.0)
        require(0 <= self.seed < 2**63, "seed", self.seed, "an integer in [0, 2^63)")
        self._check_predictor()
        if self.data.val and not self.monitors.knn_every_epochs:
            raise UserError(f"data.val = {self.data.val!r}: has no effect without monitors.knn_every_epochs; set that, for example to 1")
        if self.monitors.knn_every_epochs and not self.data.val:
            raise UserError(f"monitors.knn_every_epochs = {self.monitors.knn_every_epochs:g}: needs data.val, the labelled images to score")

    def _check_predictor(self) -> None:
        layers, factor = self.model.predictor_layers, self.optim.predictor_lr_factor
        if self.objective.predictor == "least_squares":
            require(layers == 0, "model.predictor_layers", layers, "0 where objective.predictor is 'least_squares'")
        if layers == 0:
            require(factor == 1, "optim.predictor_lr_factor", factor, "1 where model.predictor_layers is 0")


def _expand_home(config: object, *paths: str) -> None:
    """Expands a leading '~' in the named fields (dotted names), since shells do not in --out=~/runs and YAML files never do.

    Takes the secrets out of URLs too: the config is written to config.yaml.
    """
    for path in paths:
        name = path.rpartition(".")[2]
        text = public_argument(expand_home(getattr(config, name), name=path))
        object.__setattr__(config, name, text)  # the only way to set a field of a frozen dataclass


def accumulation_of(config: TrainConfig, *, world_size: int) -> int:
    """Number of micro-batches per optimizer step on each of world_size ranks.

    Raises:
        UserError: the global batch does not split evenly.
    """
    unit = world_size * (config.rank_batch or 1)
    if config.global_batch % unit:
        shares = f"{world_size} ranks" + (f" x rank_batch {config.rank_batch}" if config.rank_batch else "")
        raise UserError(f"global_batch = {config.global_batch}: not divisible by {shares}; choose a multiple of {unit}")
    return config.global_batch // unit if config.rank_batch else 1


RUN_DEFAULTS = flatten(to_plain(TrainConfig()))
"""Default of every option of a run, by dotted name."""
RUN_GROUPS = {name.rpartition(".")[0] for name in RUN_DEFAULTS} - {""}
"""Names of the groups of a run's options, such as 'optim'."""
RUN_OPTIONS = frozenset(f"--{name}" for name in ("help", "preset", "config", "print_config", *RUN_DEFAULTS, *RUN_GROUPS))
"""Every option that `train` takes, and each group of options, as they are spelled in help and files."""

PAPER_RANKS = 8
"""Number of ranks in the commands of the paper's presets."""


@dataclass(frozen=True)
class Preset:
    """A named run. `expected` is a published figure and `source` where it stands; `run_here` is what we measured ourselves, or 'not yet
    run'.
    """

    what: str
    config: TrainConfig
    expected: str
    source: str
    run_here: str = "not yet run"
    first: str = ""
    """The first settings to change for images other than the source's; empty for a preset that reproduces a figure."""

    def command(self, name: str) -> str:
        if name in ("own_tiny", "own_small"):
            return f"python -m fastbyol train --preset {name} --data.train IMAGES --out runs/mine"
        if name.startswith("cpu_demo"):
            kind = "scenes" if "scenes" in name else "fashion"
            return f"python -m fastbyol train --preset {name} --data.train demo/{kind}/train.beton --out runs/demo"
        return f"torchrun --nproc-per-node {PAPER_RANKS} -m fastbyol train --preset {name} --data.train train.beton --out runs/{name}"
