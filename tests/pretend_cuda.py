"""A GPU for machines without one: tensors that claim to be on cuda:0, whose values are on the CPU.

    with PretendCuda():
        x = torch.zeros(3, device="cuda")   # works
        x + torch.zeros(3), x.numpy()       # raise, as they would on a GPU

After torch's own FakeTensorMode, which has no values: code that asks for one (`if mask.all()`) cannot run in it.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
MOVES = (aten.copy_.default, aten._to_copy.default)  # may have tensors of two devices
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


def without_lists(index):
    """Lists in an index as tensors: torch would make them on the meta device, without a value."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)


class OnCuda(torch.Tensor):
    """To autograd a tensor on the meta device with the shape of `values`; `PretendCuda` computes with these."""

    @staticmethod
    def __new__(cls, values):
        layout = dict(dtype=values.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, torch.empty_strided(values.shape, values.stride(), **layout))

    def __init__(self, values):
        self.values_on_cpu = values

    @property
    def device(self):
        return CUDA

    def __deepcopy__(self, memo):
        return OnCuda(self.values_on_cpu.clone()).requires_grad_(self.requires_grad)

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data):
        return torch.tensor(data, dtype=self.dtype).to(CUDA)

    def __getitem__(self, index):
        return super().__getitem__(without_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(without_lists(index), value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of PretendCuda")


class PretendCuda(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # then torch does not look for a driver

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU, and moved
        self.attention = sdpa_kernel(SDPBackend.MATH)  # a GPU's own kernels cannot be pretended
        self.attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        self.attention.__exit__(*error)
        return super().__exit__(*error)

    @classmethod
    def is_infra_mode(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_cuda = any(isinstance(x, OnCuda) for x in tensors)
        operands = tensors[:1] if func in INDEXING else tensors  # indices may be on the CPU
        mixed = on_cuda and any(not isinstance(x, OnCuda) and x.ndim for x in operands)
        if func in INDEXING and not isinstance(tensors[0], OnCuda):
            mixed = on_cuda
        if mixed and func not in MOVES:
            raise RuntimeError(f"{func}: tensors on cuda:0 and on cpu")
        if kwargs.get("device") is not None:
            on_cuda = kwargs["device"].type != "cpu"  # for torch's C++, what claims to be on cuda is on meta
            kwargs["device"] = torch.device("cpu") if on_cuda else kwargs["device"]
        if func is aten.copy_.default:
            on_cuda = isinstance(args[0], OnCuda)
        real_args, real_kwargs = tree_map(lambda x: x.values_on_cpu if isinstance(x, OnCuda) else x, (args, kwargs))
        result = func(*real_args, **real_kwargs)
        if func._schema.is_mutable:  # in place, or into `out`
            return result if result is None else kwargs.get("out", args[0])

        def claim(x):
            return OnCuda(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnCuda) and on_cuda else x

        return tree_map(claim, result)
