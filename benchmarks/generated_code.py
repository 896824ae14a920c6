"""Lets Inductor write its code for an H100 without one: kernels, the bytes that they move, what is saved for the backward, and cubins.

The device's properties are made up, inputs are fake, and nothing is run. Bytes are Inductor's own count of what each kernel reads and writes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fastbyol.augment.parameters import NUM_COLUMNS
from fastbyol.augment.torch_graph import augment_batch
from fastbyol.config.views import ViewPair

CUDA = torch.device("cuda", 0)
_SM = {
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}
_MEMORY = {
    "total_memory": 80 << 30,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 50 << 20,
}
H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, gcnArchName="", **_SM, **_MEMORY)


@dataclass
class Code:
    """Inductor's code of one graph. saved: bytes kept for the backward by number format; empty for a graph without one."""

    source: str = ""
    num_bytes: int = 0
    launches: int = 0
    saved: Counter[str] = field(default_factory=Counter)


@contextmanager
def pretend_h100() -> Iterator[None]:
    """Makes torch's compiler see an H100 inside the block."""
    properties = DeviceProperties(type="cuda", index=0, cc=90, major=9, **_SM)
    replaced = {
        "torch.cuda.get_device_properties": lambda *a, **k: H100,
        "torch.cuda.get_device_capability": lambda *a, **k: (9, 0),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.is_available": lambda: False,
        "torch.utils._triton.has_triton": lambda: True,
        "torch.utils._triton.triton_hash_with_backend": lambda: "made-up",
        "torch.utils._triton.triton_backend": lambda: None,
    }
    with ExitStack() as patched:
        for name, stand_in in replaced.items():
            patched.enter_context(mock.patch(name, stand_in))
        for name in ("torch._C._cuda_getCurrentRawStream", "torch._inductor.utils.has_triton", "torch._inductor.scheduler.has_triton"):
            patched.enter_context(mock.patch(name, create=True, return_value=1))
        patched.enter_context(mock.patch.object(DeviceProperties, "create", new=staticmethod(lambda device: properties)))
        patched.enter_context(mock.patch.object(CudaInterface.Worker, "get_device_properties", staticmethod(lambda *a, **k: H100)))
        patched.enter_context(mock.patch.object(CudaInterface, "get_compute_capability", staticmethod(lambda *a, **k: 90)))
        # Without a GPU torch would choose NCHW for its convolutions, with a copy before and after each.
        patched.enter_context(mock.patch("torch._C._conv_determine_backend_memory_format", return_value=torch.channels_last))
        yield


def _code(graph: Any, inputs: Sequence[Any], mode: FakeTensorMode, *, inference: bool) -> Code:
    with V.set_fake_mode(mode), DebugContext(), V.set_debug_handler(DebugContext()):
        post_grad_passes(graph, is_inference=inference)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=inference, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            written: Any = lowering.codegen()[0]
            _, by_kernel, _ = lowering.count_bytes()
    source = getattr(written, "value", str(written))
    # Inductor counts elements of four bytes in the total, and bytes over four for each kernel.
    num_bytes = sum(4 * count for _, count in by_kernel)
    return Code(source, int(num_bytes), len(re.findall(r"^ *(?!#).*(?:\.run\(|extern_kernels\.)", source, re.MULTILINE)))


def augmentation_code(views: ViewPair, *, images: int, dtype: torch.dtype = torch.bfloat16) -> Code:
    """Returns the code of the augmentation of both views of so many images, from uint8 crops to the network's batch."""
    mode = FakeTensorMode()
    num, size = 2 * images, views.size_px
    with mode:
        crops = torch.empty(num, size, size, 3, dtype=torch.uint8, device=CUDA).permute(0, 3, 1, 2)
        parameters = torch.empty(num, NUM_COLUMNS, device=CUDA)
    options = {"blur_taps": views.blur_taps, "mean": views.mean, "std": views.std, "semantics": views.semantics, "dtype": dtype}
    with pretend_h100(), torch.no_grad():
        with mode:
            graph = make_fx(lambda c, p: augment_batch(c, p, **options), decomposition_table=select_decomp_table())(crops, parameters)
        return _code(graph, [crops, parameters], mode, inference=True)


def training_code(module: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Code, Code]:
    """Returns the code of the forward and of the backward of `call(module's functional form, *inputs)`, a scalar.

    The module and its inputs are on the meta device, 4-dimensional ones in channels-last memory. Weights are taken as 16-bit ones, as
    autocast makes them.
    """
    names, parameters = zip(*module.named_parameters(), strict=True)
    buffer_names, buffers = zip(*module.named_buffers(), strict=True)
    codes: list[Code] = []

    def work(given: Any, held: Any, *args: Tensor) -> tuple[Tensor, ...]:
        half = [p.to(torch.bfloat16) if p.dim() > 1 else p for p in given]
        state = dict(zip(names, half, strict=True)) | dict(zip(buffer_names, held, strict=True))
        return (call(lambda *a: functional_call(module, state, a), *args),)

    def compiler(graph: Any, example_inputs: Sequence[Any]) -> Callable[..., list[Any]]:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        saved: Counter[str] = Counter()
        if not codes:
            kept = [node.meta["val"] for node in outputs if isinstance(node, torch.fx.Node) and node.op != "placeholder"]
            for value in kept:
                if isinstance(value, Tensor) and value.dim() >= 4:  # activations, by view too
                    saved[str(value.dtype).removeprefix("torch.")] += value.numel() * value.element_size()
        with pretend_h100():
            on_gpu, fake, mode = _moved(graph, example_inputs)
            code = _code(on_gpu, fake, mode, inference=False)
        code.saved = saved
        codes.append(code)
        return lambda *_: [_empty_like(node) for node in outputs]

    # Its types describe other versions of torch's compiler interface than its callers use.
    take: Any = compiler
    partition: Any = min_cut_rematerialization_partition
    compiled = aot_function(
        work,
        fw_compiler=take,
        bw_compiler=take,
        partition_fn=lambda graph, joint, **options: partition(graph, joint, **{"compiler": "inductor"} | options),
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    with mock.patch("torch._C._conv_determine_backend_memory_format", return_value=torch.channels_last):
        loss = compiled(list(parameters), list(buffers), *inputs)[0]
        if len(codes) == 1:
            loss.backward()
    forward, backward = codes
    return forward, backward


def _moved(graph: Any, inputs: Sequence[Any]) -> tuple[Any, list[Tensor], FakeTensorMode]:
    """Returns the graph of meta tensors as one of fake tensors on a GPU."""
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}
        node.args = tuple(CUDA if isinstance(argument, torch.device) else argument for argument in node.args)
    mode = detect_fake_mode(inputs) or FakeTensorMode()
    with mode:
        fake = [torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device=CUDA) for i in inputs]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fake)
    graph.recompile()
    return graph, fake, mode


def _empty_like(node: Any) -> Any:
    if not isinstance(node, torch.fx.Node):
        return node
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def assembled(source: str, *, capability: int) -> dict[str, str]:
    """Compiles every Triton kernel of the source to a cubin of this compute capability; returns '' or the error, by kernel.

    NVIDIA's assembler does not optimise here: that takes it minutes for the largest kernel of the augmentation, and finds no other errors.
    """
    import triton
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    defined: list[tuple[Any, Any, Any]] = []

    def decorator(*_: Any, triton_meta: Any = None, size_hints: Any = None, **__: Any) -> Callable[[Any], Any]:
        return lambda function: defined.append((function, triton_meta, size_hints)) or function

    kinds = dict.fromkeys(("pointwise", "reduction", "persistent_reduction"), decorator)
    results = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        mock.patch.multiple(triton_heuristics, **kinds),
        mock.patch.dict(os.environ, DISABLE_PTXAS_OPT="1"),
    ):
        for number, found in enumerate(re.finditer(r"async_compile\.triton\('(\w+)', '''(.*?)'''", source, re.DOTALL)):
            # Triton reads a kernel's source from its file.
            path = Path(folder, f"kernel{number}.py")
            path.write_text(found[2])
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            function, meta, hints = defined[-1]
            names = list(meta["signature"])
            blocks = {"XBLOCK": 64, "YBLOCK": 64 if "y" in (hints or {}) else 1, "R0_BLOCK": 64}
            constants = {(names.index(block),): size for block, size in blocks.items() if block in names}
            attributes = meta["configs"][0] if isinstance(meta["configs"][0], dict) else {}
            try:
                triton.compile(ASTSource(function, meta["signature"], constants, attributes), target=GPUTarget("cuda", capability, 32))
                results[found[1]] = ""
            except Exception as error:  # ptxas and each of Triton's passes have their own
                results[found[1]] = f"{type(error).__name__}: {str(error)[:200]}"
    return results
