"""The Triton layer: under Triton's interpreter, as a compiler for a GPU sees it, and on a GPU where there is one."""

import importlib.util

import pytest
import tiny
import torch

from mtl_dist.models.layer import LayerWeights, eager
from mtl_dist.models.triton_layer import (
    LAUNCHES,
    SHARED,
    Precision,
    can_run,
    settings,
    triton_layer,
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
BF16 = Precision(torch.bfloat16, "tf32")
FP32 = Precision(torch.float32, "tf32")


@needs_triton
def test_the_laws_under_the_interpreter():
    words = ["-m", "pytest", "-p", "no:xdist", "tests/interpreted_triton.py"]
    done = tiny.run_process(words, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


@needs_triton
def test_without_interpreter_and_gpu_it_says_why_not():
    cpu = torch.device("cpu")
    assert can_run(cpu, 64, torch.float32) == "the device is cpu, not an NVIDIA GPU"
    assert can_run(cpu, 65, torch.float32) == "65 channels are more than 64"
    assert can_run(cpu, 64, torch.float64) == "the precision is torch.float64"


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr("mtl_dist.models.triton_layer._installed", lambda: False)
    assert can_run(torch.device("cpu"), 64, torch.float32) == "triton is not installed"


def compiled_for_h100(kernel: str, precision: Precision, **flags):
    """Compile a kernel for compute capability 9.0, with aligned pointers and a clip of a multiple of 16 samples."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mtl_dist.models import triton_kernels

    function = getattr(triton_kernels, kernel)
    constants = settings(kernel, 64, precision) | flags
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    elements = "*bf16" if precision.dtype == torch.bfloat16 else "*fp32"
    kinds = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    pointers = [name for name in kinds if name.endswith("_ptr")]
    kinds |= dict.fromkeys(pointers, elements)
    kinds |= {name: "*fp32" for name in pointers if name.startswith(("weight", "bias"))}
    aligned = [*pointers, "samples"]
    hints = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=function, signature=kinds, constexprs=constants, attrs=hints)
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("precision", [BF16, FP32], ids=["bf16", "fp32"])
def test_kernels_compile_for_an_h100_to_tensor_core_products_and_take_the_stated_shared_memory(
    precision,
):
    wanted = {"OUT": True, "HIDDEN": False}
    compiled = [compiled_for_h100("forward_kernel", precision, **wanted)]
    for of_x, of_weights in LAUNCHES:
        flags = wanted | {"OF_X": of_x, "OF_WEIGHTS": of_weights}
        compiled.append(compiled_for_h100("backward_kernel", precision, **flags))
    assert max(kernel.metadata.shared for kernel in compiled) == SHARED[precision.dtype]
    assert all("wgmma" in kernel.asm["ptx"] for kernel in compiled)


@needs_triton
@needs_gpu
def test_the_laws_on_a_gpu():
    """The same file, compiled; fp32 products in it are TF32's, which no law of fp32 holds for: they are left out."""
    words = [
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "tests/interpreted_triton.py",
        "-k",
        "half or bit_for_bit",
    ]
    done = tiny.run_process(words)
    assert done.returncode == 0, done.stdout


@needs_triton
@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float32, 5e-3)], ids=["bf16", "tf32"]
)
@pytest.mark.parametrize("dilation", [1, 8, 32])
@pytest.mark.parametrize("samples", [32_000, 32_001])
def test_the_papers_layer_on_a_gpu(dtype, bound, dilation, samples):
    torch.manual_seed(0)
    made = [torch.randn(8, 64, samples), torch.randn(128, 64, 2) / 8, torch.randn(128)]
    made = [m.to("cuda", dtype).double() for m in made]
    upstream = torch.randn(8, 64, samples, device="cuda").to(dtype)
    results = []
    for layer, number in ((triton_layer, dtype), (eager, torch.float64)):
        tensors = [m.to(number).requires_grad_() for m in made]
        total, _ = layer(tensors[0], LayerWeights(*tensors[1:], None, None, dilation))
        results.append([total, *torch.autograd.grad(total, tensors, upstream.to(number))])
    for one, other in zip(*results, strict=True):
        assert (one.double() - other).abs().max() <= bound * other.abs().max()


@needs_triton
@needs_gpu
def test_a_batch_of_more_than_two_to_the_31_elements_on_a_gpu():
    """The last clip's numbers are those that it has alone."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of GPU memory")
    x = torch.empty(36, 64, 960_000, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x.normal_().requires_grad_()
    weight = (torch.randn(128, 64, 2, device="cuda") / 8).bfloat16()
    weights = LayerWeights(weight, torch.zeros(128, device="cuda").bfloat16(), None, None, 32)
    total, _ = triton_layer(x, weights, with_hidden=False)
    alone = x[-1:].detach().requires_grad_()
    total_alone, _ = triton_layer(alone, weights, with_hidden=False)
    assert torch.equal(total[-1:], total_alone)
    total.backward(x.detach())
    total_alone.backward(alone.detach())
    assert torch.equal(x.grad[-1:], alone.grad)
