"""A device without float64, as Metal is, on the memory of the host; as a program, the command on that device.

It is torch's PrivateUse1 under the name ``metal``: a tensor of it is no tensor of the CPU, and the two meet in no
operation. Every operation is one of the CPU on the same memory, unless it has anything to do with float64, which ends
in Metal's own words, or Metal has no kernel for it by the list that torch's own build is made from. Asynchrony, speed,
and the rounding and the faults of Metal's kernels are not played.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "metal"
OUTSIDE = 12
"""DLPack's number of a device that it does not know (kDLExtDev), which torch takes for PrivateUse1."""
DTYPES = {
    torch.bool: (6, 8),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float32: (2, 32),
}
"""DLPack's code and bits of each number format that the device has."""
VIEWS = ("aten::as_strided", "aten::view", "aten::_reshape_alias", "aten::set_")
"""Operations on the description of a tensor: the CPU's kernels take any device."""
COPIES = ("aten::_copy_from", "aten::_copy_from_and_resize")
MIXED = ("aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put")
"""Operations whose indices may lie on the CPU."""
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Device(ctypes.Structure):
    """DLDevice."""

    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class Format(ctypes.Structure):
    """DLDataType."""

    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class Numbers(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", Format),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", Numbers), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


held: dict[int, Any] = {}
"""What has to live as long as a tensor of the device, by the address of its description."""


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Metal(_DummyBackendModule):
    """The module ``torch.metal``."""

    def synchronize(self) -> None:
        """Do nothing: nothing is queued."""

    def get_rng_state(self, device: object = 0) -> torch.Tensor:
        """Return that of the CPU, by which the device draws."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = 0) -> None:
        """Set that of the CPU."""
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the formats that autocast knows."""
        return [torch.bfloat16]


def install() -> None:
    """Give torch the device; there is no way back."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Metal())
    kernels = torch.library.Library("_", "IMPL")
    kernels.fallback(_compute, "PrivateUse1")
    held[0] = kernels


def take() -> None:
    """Make it the device of this process in place of Metal."""
    from posttrain.engine import arithmetic
    from posttrain.model import device

    install()
    for table in (arithmetic.TOKENS, arithmetic.OPERATIONS):
        table[NAME] = table[device.METAL]
    device.METAL = arithmetic.METAL = NAME
    device.has_metal = lambda: True
    torch.backends.mps.get_name = lambda: "Apple M0"


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of the device on the host."""
    name = op.name()
    args = tuple(
        torch.tensor(given) if isinstance(given, (bool, int, float)) and str(declared.type) == "Tensor" else given
        for given, declared in zip(args, op._schema.arguments, strict=False)
    )  # a number in the place of a tensor
    flat, _ = tree_flatten((args, kwargs))
    tensors = [each for each in flat if isinstance(each, torch.Tensor)]
    if name.split(".")[0] in VIEWS:
        return op.redispatch(CPU, *args, **kwargs)
    _reject(name, flat, tensors)
    known = {id(each): _alias(each) for each in tensors if each.device.type == NAME}
    back = {id(alias): each for each in tensors if (alias := known.get(id(each))) is not None}
    shapes = {key: alias.shape for alias in known.values() if (key := id(alias))}

    def lowered(each: Any) -> Any:
        if isinstance(each, torch.device) and each.type == NAME:
            return torch.device("cpu")
        return known.get(id(each), each) if isinstance(each, torch.Tensor) else each

    def raised(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        if (own := back.get(id(each))) is None:
            return _on_device(each)
        if each.shape != shapes[id(each)]:
            fresh = _on_device(each.clone())
            own.set_(fresh.untyped_storage(), 0, fresh.shape, fresh.stride())
        return own

    args, kwargs = tree_map(lowered, (args, kwargs))
    if name.startswith(COPIES):
        source, target = args[:2]
        target.copy_(source)
        return tensors[1]
    return tree_map(raised, op(*args, **kwargs))


def _reject(name: str, flat: list[Any], tensors: list[torch.Tensor]) -> None:
    here = [each for each in tensors if each.device.type == NAME]
    away = [each for each in tensors if each.device.type != NAME and each.ndim]
    copied = name.startswith(COPIES) and len({each.dtype for each in tensors}) > 1
    precise = here if not copied else tensors  # a copy changes the format on the device
    if any(each is torch.float64 for each in flat) or any(each.dtype is torch.float64 for each in precise):
        raise TypeError(f"{name}: Cannot convert a MPS Tensor to float64 dtype as MPS doesn't support float64")
    if name.startswith(COPIES):
        return
    if away and here and not name.startswith(MIXED):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, found {NAME} and cpu")
    if name not in kernels():
        raise NotImplementedError(f"The operator '{name}' is not currently implemented for the MPS device")


@cache
def kernels() -> frozenset[str]:
    """Return the operations that have a kernel for Metal, by torch's list of them."""
    import torchgen

    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    found: set[str] = set()
    entries = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for entry in entries:
        name = "aten::" + entry["func"].partition("(")[0]
        keys = ", ".join(entry.get("dispatch", {}))
        if "MPS" in keys or "Composite" in keys:
            found.add(name)
    return frozenset(found)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the CPU on the memory of one of the device."""
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size()
    if not size:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=size)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the device on the memory of one of the CPU, which it keeps."""
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"Trying to convert {tensor.dtype} to the MPS backend but it does not have support for that dtype"
        )
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    managed, shape, strides = Managed(), (ctypes.c_int64 * 1)(size), (ctypes.c_int64 * 1)(1)
    managed.tensor = Numbers(
        tensor.untyped_storage().data_ptr(), Device(OUTSIDE, 0), 1, Format(*DTYPES[tensor.dtype], 1), shape, strides, 0
    )
    address = ctypes.addressof(managed)
    held[address] = (managed, shape, strides, tensor)
    flat: torch.Tensor = torch.utils.dlpack.from_dlpack(_capsule(address, b"dltensor", None))
    # not by DLPack's deleter: Python called from there, in the middle of an exception, would lose it
    weakref.finalize(flat.untyped_storage(), held.pop, address).atexit = False
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


if __name__ == "__main__":
    from posttrain import environment
    from posttrain.cli import main

    environment.prepare()
    take()
    sys.exit(main(sys.argv[1:]))
