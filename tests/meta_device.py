"""A device without values, on which nothing works but what a CUDA graph can hold."""

from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinylm.device import Device


class OnDeviceOnly(TorchDispatchMode):
    """Every tensor of every operation is on the meta device, which has no values: whatever reads
    one (``.item()``, ``if tensor``, a mask as an index) raises there, as it does in a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        # What meta tensors lack, and does nothing but write into its arguments.
        out = None if "_fused_adamw_" in name else func(*args, **kwargs)
        self.operations.append(name)
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "meta", f"{name} has a tensor on {tensor.device}"
        return out


class MetaDevice(Device):
    def autocast(self) -> Any:
        return nullcontext()
