"""A device without memory that is as strict as a GPU: PyTorch's meta device, with a check of every operation.

On it models of any size take no memory, and nothing is computed: tensors have shape, dtype and device alone. Unlike a
GPU it lets many operations pass that mix devices or dtypes. Within `StrictDevice` these fail as on a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")

_ops: Any = torch.ops.aten
_COPIES = (_ops._to_copy, _ops.copy_)  # between any devices and dtypes
# Operations whose inputs must have one dtype.
_PRODUCTS = {
    _ops.addmm,
    _ops.baddbmm,
    _ops.bmm,
    _ops.convolution,
    _ops.mm,
    _ops.native_group_norm,
    _ops.native_layer_norm,
}


class StrictDevice(TorchDispatchMode):
    """Within this context, an operation with tensors of the meta device fails if another input is on the CPU, and a
    product if its inputs have several dtypes.

    As on a GPU, a number on the CPU (a tensor without dimensions) may be an input, and so may indices. A copy to the
    CPU holds zeros, also without memory. A number that is read from the device is 1, or True.
    """

    def __enter__(self) -> Any:
        # A module that is moved keeps its parameters, as on a GPU; an optimizer holds them.
        self._swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.__future__.set_swap_module_params_on_conversion(self._swap)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, operation = kwargs or {}, func.overloadpacket
        if operation is _ops._local_scalar_dense and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if operation is _ops._to_copy and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros((), dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
        if operation not in _COPIES:
            check(func, _tensors(args[:1] if operation is _ops.index else (*args, *kwargs.values())))
        return func(*args, **kwargs)


def check(func: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Check that inputs of an operation are on one device, and those of a product of one dtype.

    Raises:
        RuntimeError: they are not.
    """
    devices = {tensor.device.type for tensor in inputs if tensor.is_meta or tensor.dim()}
    if len(devices) > 1:
        raise RuntimeError(f"{func} got tensors on two devices: {_described(inputs)}.")
    if getattr(func, "overloadpacket", None) in _PRODUCTS:
        dtypes = {tensor.dtype for tensor in inputs if tensor.is_floating_point()}
        if len(dtypes) > 1:
            raise RuntimeError(f"{func} got tensors of two dtypes: {_described(inputs)}.")


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _described(inputs: list[Tensor]) -> str:
    return ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}" for tensor in inputs)
