"""Faults that strike on a GPU only, brought about here by stand-ins for torch.cuda's calls: where they are made, and with what."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.cuda._utils import _get_device_index

from benchmarks.gpu.syncs import PINNED
from fastbyol.augment.torch_graph import augment_batch
from fastbyol.config.errors import LOST_EXIT, Lost, UserError
from fastbyol.config.plain import from_plain, to_plain
from fastbyol.config.schema import DataConfig, ModelConfig, PrecisionConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_loader, dali_renderer
from fastbyol.data.batch import views_on_device
from fastbyol.host import cores
from fastbyol.monitors.compute import largest_activation
from fastbyol.ranks.process_group import Process, join_process_group, leave_process_group, lost_ranks_named
from fastbyol.run import precision
from fastbyol.run.command_line import parse_train_config
from fastbyol.run.log import close_logging, configure_logging
from fastbyol.run.precision import check_compile, compiles_augmentation, is_compiled, resolved, set_up_inductor
from fastbyol.run.profiling import profile_table, spans_of
from fastbyol.tuning.candidates import most_images, rank_batches
from fastbyol.tuning.stepper import Stepper
from tests.commands import run_python
from tests.forked import run_forked, run_ranks

VIEWS = ViewPair(size_px=32)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Pretends that there is a GPU for the loader, and returns the list of tensors that are put into pinned memory."""
    made: list[torch.Tensor] = []
    empty = torch.empty

    def pinned_empty(*shape, pin_memory=False, **options):
        tensor = empty(*shape, **options)
        made.extend([tensor] if pin_memory else [])
        return tensor

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        made.append(tensor)
        return tensor

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.empty", pinned_empty)
    monkeypatch.setattr("torch.Tensor.pin_memory", pin)
    return made


def test_all_that_travels_to_the_gpu_is_pinned(image_folder: Path, pinned: list[torch.Tensor]) -> None:
    config = DataConfig(train=str(image_folder), workers=1, prefetch=1)
    with build_loader(config, views=VIEWS, seed=0, global_batch=4, output="uint8") as loader:
        batch = next(iter(loader))
    places = {tensor.data_ptr() for tensor in pinned}
    own = {name: getattr(batch, name).untyped_storage().data_ptr() in places for name in batch._fields}
    assert own == {name: name in PINNED for name in batch._fields}


@pytest.mark.parametrize("gpu", [torch.device("cuda", 3), torch.device("cuda")])
def test_dalis_thread_works_on_the_ranks_own_gpu(
    gpu: torch.device, tar_folder: Path, pinned: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's current device is a property of each thread: on GPU 0, the events did not wait for the copies from DALI's buffers."""
    current = threading.local()
    recorded_on = []
    event = SimpleNamespace(record=lambda: recorded_on.append(getattr(current, "device", torch.device("cuda", 0))), query=lambda: True)

    def set_device(device: torch.device) -> None:  # torch's own asks this function too, which refuses a device without a number
        current.device = torch.device("cuda", _get_device_index(device))

    monkeypatch.setattr("torch.cuda.set_device", set_device)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.Event", lambda: event)

    def run(jpeg, **boxes):
        crops = np.zeros((len(jpeg), 32, 32, 3), np.uint8)
        return [SimpleNamespace(as_tensor=lambda: torch.from_numpy(crops))] * 2

    built: list[int] = []
    monkeypatch.setattr(
        dali_renderer, "built_pipeline", lambda graph, *, device_id, **_: built.append(device_id) or SimpleNamespace(run=run)
    )
    with build_loader(
        DataConfig(train=str(tar_folder), workers=1), views=VIEWS, seed=0, global_batch=4, device=gpu, output="uint8"
    ) as loader:
        assert len(list(loader)) == len(recorded_on)
    assert set(recorded_on) == {torch.device("cuda", 3)}
    assert built == [3]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (dist.DistBackendError, "NCCL error in: ProcessGroupNCCL.cpp:77, ncclRemoteError: A call failed possibly due to a network error"),
        (dist.DistBackendError, "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)"),
        (dist.DistBackendError, "NCCL communicator was aborted on rank 3."),
        (RuntimeError, "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.4]:3921"),
        (RuntimeError, "[gloo/transport/tcp/pair.cc:547] Read error [10.0.0.4]:3921: Connection reset by peer"),
        (RuntimeError, "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete"),
        (dist.DistNetworkError, "failed to recv, got 0 bytes"),
        (dist.DistStoreError, "wait timeout after 600000ms, keys: /0"),
    ],
)
def test_a_peer_that_is_gone_is_a_lost_rank(kind: type[Exception], text: str) -> None:
    with pytest.raises(Lost, match="continues from the last checkpoint"), lost_ranks_named(Process(0, 2, torch.device("cpu"))):
        raise kind(text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            dist.DistBackendError,
            "NCCL error in: NCCLUtils.cpp:93, invalid usage, NCCL version 2.27.5. Duplicate GPU detected: rank 0 and rank 1",
        ),
        (dist.DistBackendError, "NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details). Cuda failure 'out of memory'"),
        (RuntimeError, "ProcessGroupNCCL is only supported with GPUs, no GPUs found!"),
        (RuntimeError, "[enforce fail at ../third_party/gloo/gloo/allreduce.cc:21] op.preamble.length <= op.nbytes. 8 vs 4"),
        (RuntimeError, "CUDA error: the launch timed out and was terminated"),
    ],
)
def test_an_error_of_the_settings_is_not_a_lost_rank_which_launchers_would_start_again_for_ever(kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text[:20].replace("[", r"\[")), lost_ranks_named(Process(0, 2, torch.device("cpu"))):
        raise kind(text)


def test_a_process_alone_has_no_peer_to_lose() -> None:
    with pytest.raises(RuntimeError, match="connection reset by peer"), lost_ranks_named(Process(0, 1, torch.device("cpu"))):
        raise RuntimeError("reading https://host/train.tar: connection reset by peer")


@pytest.mark.parametrize(("failed", "calls"), [(True, ["abort", "destroy"]), (False, ["destroy"])])
def test_after_a_failure_nccl_is_aborted_instead_of_waited_for(failed: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(abort=lambda: made.append("abort"))))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append("destroy"))
    leave_process_group(failed=failed)
    assert made == calls


def test_a_group_that_cannot_be_left_after_a_failure_does_not_hold_the_process(tmp_path: Path) -> None:
    """The hang watch is on until the group is left: here destroying it hangs, as NCCL's does where a peer is dead."""
    code = (
        "import time, torch.distributed as dist; import fastbyol.train as train, fastbyol.run.hang_watch as watch\n"
        "from fastbyol.config.errors import Lost\n"
        "def lost(*_): raise Lost('a peer is gone')\n"
        "train.train, train.leave_process_group, watch.MARGIN_S = lost, lambda **_: time.sleep(1000), 0.2\n"
        f"train.main(['--preset', 'cpu_demo', '--data.train', 'x', '--timeout_s', '1', '--out', {str(tmp_path / 'run')!r}])\n"
    )
    done = run_forked("-c", code)
    assert done.returncode == LOST_EXIT
    assert "no step for 1 s (timeout_s)" in done.stderr


def test_a_first_step_that_compiles_may_take_longer_than_the_others() -> None:
    code = (
        "import time, fastbyol.run.hang_watch as watch\n"
        "watch.MARGIN_S = 0.1\n"
        "with watch.HangWatch(0.5, first_s=30) as watching:\n"
        "    time.sleep(1.5)\n"
        "    watching.beat()\n"
        "    print('compiled', flush=True)\n"
        "    time.sleep(30)\n"
    )
    done = run_python("-c", code, timeout=25)
    assert (done.returncode, done.stdout) == (LOST_EXIT, "compiled\n")
    assert "no step for 0.5 s" in done.stderr


@pytest.mark.parametrize(
    ("of_all", "workers"),
    [
        ([("a", range(16))] * 4, 4),  # torchrun: all ranks may use all cores
        ([("a", range(16)), *(("a", range(16 * n, 16 * n + 16)) for n in range(1, 4))], 16),  # srun --cpus-per-task 16: bound to their own
        ([("a", range(16)), ("a", range(16)), ("b", range(16)), ("b", range(16))], 8),  # two machines whose cores have the same numbers
        ([("a", range(16)), ("a", range(8, 24))], 8),  # they share half of them
    ],
)
def test_cores_are_divided_by_the_ranks_that_share_them(of_all: list, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(cores, "_sharing", None)
    everyone = [(machine, frozenset(numbers)) for machine, numbers in of_all]
    cores.share_cores(everyone[0], everyone)
    assert cores.default_workers() == workers


@pytest.mark.distributed
def test_ranks_bound_to_one_core_each_have_one_thread_each_and_ranks_on_two_share_them() -> None:
    code = (
        "import os; from fastbyol.host.cores import default_workers; from fastbyol.ranks.process_group import *\n"
        "bound = os.environ['BOUND'] == '1'\n"
        "os.sched_getaffinity = lambda pid: {int(os.environ['RANK']) + 2 * core for core in range(4)} if bound else set(range(8))\n"
        "join_process_group(timeout_s=60); print(f'{default_workers()}\\n', end='', flush=True); leave_process_group()\n"
    )
    for bound in ("1", "0"):
        for done in run_ranks("-c", code, env={"BOUND": bound}):
            assert done.stdout == "4\n", done.stderr


def test_kernel_times_are_counted_once() -> None:
    """torch.profiler gives a kernel's time to its own event, to the operation that launched it, and to annotations around both."""

    def event(key: str, device: DeviceType, time: float, *, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=device, self_device_time_total=time, self_cpu_time_total=9.0, count=2, is_user_annotation=annotation
        )

    events = [
        event("aten::add", DeviceType.CPU, 300.0),
        event("add_kernel", DeviceType.CUDA, 300.0),
        event("encoder", DeviceType.CUDA, 300.0, annotation=True),
        event("cudaStreamSynchronize", DeviceType.CPU, 0.0),
    ]
    spans = spans_of(events, on_gpu=True)
    assert sum(span.self_us for span in spans) == 300.0
    table = profile_table(spans, steps=2, span_us=600.0, device="GPU")
    assert "GPU is busy 50% of the time" in table
    assert "host waits for the device: 1.0 times a step" in table
    assert table.splitlines()[1].split() == ["add_kernel", "0.150", "100.0%", "1.0"]


def test_a_quiet_rank_repeats_no_warning(capfd: pytest.CaptureFixture[str]) -> None:
    said = logging.getLogger("fastbyol")
    with warnings.catch_warnings():
        configure_logging(quiet=True)
        said.warning("seen by all ranks")
        warnings.warn("torch's, on all ranks", stacklevel=1)
        said.error("an error of this rank")
    configure_logging(quiet=False)
    said.warning("rank 0 says it")
    close_logging()
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["an error of this rank", "rank 0 says it"]


GPU = torch.device("cuda", 1)


def test_cuda_graphs_with_micro_batches_are_refused() -> None:
    graphs = PrecisionConfig(compile_mode="reduce-overhead")
    check_compile(graphs, device=GPU)
    with pytest.raises(
        UserError, match="'reduce-overhead': CUDA graphs keep the outputs of one forward pass, and rank_batch makes 2 a step"
    ):
        check_compile(graphs, device=GPU, accumulate=2)


def test_a_gpu_compiles_unless_told_not_to_and_a_cpu_only_if_told() -> None:
    for device, compiled in ((GPU, ["yes", "yes", "no"]), (torch.device("cpu"), ["no", "yes", "no"])):
        assert [resolved(PrecisionConfig(compile=how), device=device).compile for how in ("auto", "yes", "no")] == compiled


class _Everywhere(torch.nn.Linear):
    """A layer that stays where it is, for there is no GPU."""

    def to(self, *args: Any, **options: Any) -> Any:
        return self


@pytest.mark.parametrize("reason", [None, "no ptxas"])
def test_the_augmentation_is_compiled_on_every_gpu_that_can_whatever_the_step_is(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "why_nothing_compiles", lambda device: reason)
    monkeypatch.setattr(precision, "set_up_inductor", lambda: None)
    precision._nothing_compiles.cache_clear()  # other tests' answers
    try:
        assert compiles_augmentation(GPU) is (reason is None)
        assert not compiles_augmentation(torch.device("cpu"))
    finally:
        precision._nothing_compiles.cache_clear()
    said = {}
    for how in ("no", "auto", "yes"):
        layer = _Everywhere(1, 1)
        with caplog.at_level(logging.INFO, logger="fastbyol"):
            precision.prepare_model(layer, PrecisionConfig(compile=how), device=GPU)
        said[how] = caplog.messages.copy()
        caplog.clear()
        assert is_compiled(layer) is (reason is None and how != "no")
    if reason is None:
        rest = "takes a minute or more; later starts find the code in its cache"
        step = [f"the first step compiles the step and {rest}"]
        assert said == {"no": [f"the first step compiles the augmentation and {rest}"], "auto": step, "yes": step}
    else:
        warning = ["precision.compile: nothing compiles on this machine (no ptxas); the run goes on in eager mode"]
        assert said == dict.fromkeys(said, warning)


@pytest.mark.parametrize(("old", "new"), [(True, "yes"), (False, "no")])
def test_configs_of_earlier_versions_with_true_and_false_still_load(old: bool, new: str, tmp_path: Path) -> None:
    plain = to_plain(TrainConfig())
    plain["precision"]["compile"] = old
    assert from_plain(TrainConfig, plain).precision.compile == new
    (tmp_path / "config.yaml").write_text(f"precision:\n  compile: {str(old).lower()}\n")
    (tmp_path / "yaml.yaml").write_text(f"precision:\n  compile: {new}\n")
    for typed in (
        ["--config", str(tmp_path / "config.yaml")],
        ["--config", str(tmp_path / "yaml.yaml")],
        ["--precision.compile", str(old).lower()],
        ["--precision.compile", new],
    ):
        assert parse_train_config(typed, usage="").precision.compile == new


@pytest.mark.distributed
def test_where_one_rank_cannot_compile_no_rank_does_and_rank_0_names_it() -> None:
    code = (
        "import logging, torch; from fastbyol.config.schema import PrecisionConfig; from fastbyol.run import precision\n"
        "from fastbyol.ranks.process_group import *\n"
        "logging.basicConfig(); process = join_process_group(timeout_s=60)\n"
        "precision.why_nothing_compiles = lambda device: 'no ptxas' if process.rank == 1 else None\n"
        "model = precision.prepare_model(torch.nn.Linear(1, 1), PrecisionConfig(compile='yes'), device=torch.device('cpu'))\n"
        "print(precision.is_compiled(model), flush=True); leave_process_group()\n"
    )
    first, second = run_ranks("-c", code)
    assert (first.stdout, second.stdout) == ("False\n", "False\n"), first.stderr + second.stderr
    assert "nothing compiles on 1 of 2 ranks (rank 1: no ptxas); the run goes on in eager mode" in first.stderr


def test_each_ranks_compile_workers_are_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(96)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(cores, "_sharing", None)
    # Inductor's own patch: this module keeps its options outside __dict__, so monkeypatch would delete the option when it undoes its change.
    with inductor.patch(compile_threads=32):
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "32")
        set_up_inductor()
        assert inductor.compile_threads == 32, "the user's own"
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
        set_up_inductor()
        assert inductor.compile_threads == 12


def test_kernels_are_launched_without_the_interpreter_lock_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The static launcher holds it while a launch waits, so that neither decoding threads nor the hang watch run."""
    import torch._inductor.config as inductor

    with inductor.patch(use_static_cuda_launcher=True):
        monkeypatch.setenv("TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER", "1")
        set_up_inductor()
        assert inductor.use_static_cuda_launcher
        monkeypatch.delenv("TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER")
        set_up_inductor()
        assert not inductor.use_static_cuda_launcher


def test_max_autotune_means_no_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fail where a step has several forward passes (pytorch issue 169545), which this mode is not refused for."""
    module, modes = torch.nn.Linear(2, 2), []
    monkeypatch.setattr(module, "compile", lambda **options: modes.append(options["mode"]))
    for mode in ("max-autotune", "default"):
        precision._compile(module, PrecisionConfig(compile="yes", compile_mode=mode), device=torch.device("cpu"))
    assert modes == ["max-autotune-no-cudagraphs", "default"]

    def graphs(mode: str) -> bool:
        return bool(torch._inductor.list_mode_options(mode).get("triton.cudagraphs"))

    assert (graphs("max-autotune"), graphs(modes[0])) == (True, False), "torch's own mode of the name has them"


@pytest.fixture
def float32_format() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_each_of_the_tuners_rounds_has_the_number_format_of_its_own_candidate(
    float32_format: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switches are the process's, and were set when a candidate's networks were built: by the time of its rounds they were another's."""
    seen = []
    for config in (TrainConfig(precision=PrecisionConfig(autocast=name)) for name in ("tf32", "off")):
        stepper = Stepper(config, Process(0, 1, torch.device("cpu")), networks=lambda: cast(Any, None))
        monkeypatch.setattr(
            stepper, "step", lambda batches: seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        )
        seen.append(stepper)
    tf32, off = seen
    seen.clear()
    for stepper in (tf32, off, tf32):
        stepper._steps(iter(()), 0.0)
    assert seen == [("high", True), ("highest", False), ("high", True)]


def test_the_search_for_a_batch_ends_where_a_tensor_would_have_two_to_the_31_numbers() -> None:
    largest = largest_activation(ModelConfig(encoder="resnet50"), size_px=224)
    assert largest == 256 * 56 * 56 == 64 * 112 * 112
    most = most_images(largest)
    assert 2 * most * largest < 2**31 <= 2 * (most + 1) * largest
    assert rank_batches(4096, most=most) == [16, 32, 64, 128, 256, 512, 1024]
    assert rank_batches(512, most=most)[-1] == 512
    assert rank_batches(2 * 1399, most=most) == [2], "1399 is prime"


@pytest.mark.parametrize(
    ("user", "kept"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "mine"}, {"PYTORCH_ALLOC_CONF": "mine"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "mine"}, {"PYTORCH_CUDA_ALLOC_CONF": "mine"}),  # the older name, of lower priority
    ],
    ids=str,
)
def test_training_on_a_gpu_asks_for_expandable_segments_before_cuda_starts_unless_the_user_asks_for_something(
    user: dict[str, str], kept: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", dict(user))
    asked = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: asked.append(dict(os.environ)))
    join_process_group()
    assert asked == [kept]


@pytest.mark.parametrize("output", ["uint8", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_views_reach_the_network_as_one_batch_in_its_number_format(image_folder: Path, output: str, dtype: torch.dtype) -> None:
    """The reference: each view augmented on its own, put together and converted."""
    with build_loader(DataConfig(train=str(image_folder), workers=1), views=VIEWS, seed=0, global_batch=4, output=output) as loader:
        batch = next(iter(loader))
    both, label = views_on_device(batch, VIEWS, torch.device("cpu"), dtype=dtype)
    singles = [batch.view1, batch.view2]
    if output == "uint8":
        how = {"blur_taps": VIEWS.blur_taps, "mean": VIEWS.mean, "std": VIEWS.std}
        singles = [augment_batch(view, batch.parameters[:, v], **how) for v, view in enumerate(singles)]
    assert torch.equal(both, torch.cat(singles).to(dtype))
    assert both.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(label, batch.label)
