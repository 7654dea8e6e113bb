"""Models whose weights stay in their file: built without storage, and given the file's own pages as tensors.

Both safetensors and `torch.load(mmap=True)` give tensors that are pages of the file, read when touched. A
model built inside `leave_in_files` takes those tensors as its parameters instead of copying them, so loading
costs no memory; an engine that shards then reads the rows it keeps. Values, names and conversions are those
of an ordinary load. Knows nothing of architectures, masks or process groups.
"""

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_RELEASE_EVERY = 64 * 2**20  # bytes


@contextmanager
def leave_in_files() -> Iterator[None]:
    """Let modules that are made in here take the tensors they are given as their parameters.

    Their parameters are on the meta device until the first `load_state_dict`, which takes the given tensors
    (made contiguous) as they are, and copies buffers only. While the block runs, `nn.Module.load_state_dict`
    is replaced for the whole process.
    """
    load, is_building = nn.Module.load_state_dict, True

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not is_building or parameter.is_meta:  # a tied one stays tied
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    def load_assigning(
        module: nn.Module, state: Mapping[str, Any], strict: bool = True, assign: bool = True
    ) -> Any:
        nonlocal is_building
        is_building = False
        result = load(module, {name: t.contiguous() for name, t in state.items()}, strict, assign=True)
        for child in module.modules():
            for name, buffer in child.named_buffers(recurse=False):  # running statistics are written to
                child._buffers[name] = (buffer.float() if buffer.is_floating_point() else buffer).clone()
        return result

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    nn.Module.load_state_dict = load_assigning  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
        hook.remove()


def tensors_in_files(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module that still lie in their file, by name."""
    pages = FilePages()
    named = ((name, parameter.detach()) for name, parameter in module.named_parameters())
    return {name: tensor for name, tensor in named if pages.holds(tensor)}


class FilePages:
    """The parts of this process's memory that are files, mapped and never written to.

    Linux only: elsewhere there are none, and the system takes pages back by itself when memory is short.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []
        with suppress(OSError), open("/proc/self/smaps") as lines:
            span, is_file = (0, 0), False
            for line in lines:
                first, *rest = line.split()
                if not first.endswith(":"):  # "7f22-7f23 rw-p 00000000 fe:00 2146596 /path"
                    start, _, stop = first.partition("-")
                    span = (int(start, 16), int(stop, 16))
                    is_file = rest[0].endswith("p") and rest[3] != "0"
                elif first == "Anonymous:" and rest[0] == "0" and is_file:  # no page was written to
                    self._spans.append(span)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's values are such pages: to keep it then costs no memory."""
        start = tensor.data_ptr()
        return any(low <= start and start + tensor.nbytes <= high for low, high in self._spans)

    def one_by_one(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor by sorted name, read once: pages of files are given back on the way."""
        held: list[Tensor] = []
        for name in sorted(state):
            yield name, state[name]
            held.append(state[name])
            if sum(tensor.nbytes for tensor in held) >= _RELEASE_EVERY:
                self._release(held)
                held = []
        self._release(held)

    def _release(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if self.holds(tensor):
                start = tensor.data_ptr()
                stop = start + tensor.nbytes
                start -= start % mmap.PAGESIZE
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED
                )
