"""Several resolutions in one pass through each block: what sharded engines put around an encoder.

    features = encoder([large, small])        # a list in, a list out; a tensor goes its usual way

A forward for each resolution is 2 passes through each block, and where weights are sharded that costs twice
the gathers. It also costs memory: autograd hands a parameter's gradient on when the last of its uses is
through, so between the backward of one resolution and that of the other every layer's gradient lies whole on
every rank. Here the forwards advance together. Each runs in a thread of its own, one at a time, until it
calls a block; there they meet, and the block is called once with the inputs of all. So it is gathered once,
and in backward it is done with before the block below begins: one block's gradient is whole at a time.

Any model is served whose blocks are modules that it calls, as they are found by `find_blocks`; DINOv2 has the
same as lists of tensors in code of its own (arXiv 2304.07193, section 5). Nothing changes in what is computed
for an image. Only the order of random draws changes (dropout), and of the terms of a sum of gradients.
"""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

_seat = threading.local()  # .own: the forward that this thread computes, if it is one of several
_classes: dict[type[nn.Module], type[nn.Module]] = {}


def take_several(
    encoder: nn.Module,
    blocks: Sequence[str],
    *,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Let `encoder` take a list of tensors, in place: before it is sharded, after blocks are compiled.

    It gets the attribute `takes_several`, by which `objectives.parts.encode_views` knows.

    Args:
        around: entered around a block's work on all resolutions.
    """
    for name in blocks:
        block = encoder.get_submodule(name)
        block.forward = _mapped(block.forward, around)
        # the class, as forward hooks (by which engines gather) run inside of `__call__`
        block.__class__ = _meeting_class(type(block))
    encoder.forward = _advancing(encoder.forward)
    encoder.takes_several = True  # type: ignore[assignment]


def _mapped(
    forward: Callable[..., Any], around: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """Return a block's forward that also takes `several` calls at once, as a list of (args, kwargs)."""

    def mapped_forward(*args: Any, several: Sequence[tuple[Any, Any]] | None = None, **kwargs: Any) -> Any:
        if several is None:
            return forward(*args, **kwargs)
        with around():
            return [forward(*own_args, **own_kwargs) for own_args, own_kwargs in several]

    return mapped_forward


def _advancing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return an encoder's forward that also takes a list, and then returns one."""

    def advancing_forward(images: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(images, list):
            return forward(images, *args, **kwargs)
        return _Table([_Seat(partial(forward, own, *args, **kwargs)) for own in images]).run()

    return advancing_forward


def _meeting_class(of: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose instances hand calls from one of several forwards to all of them."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seat: _Seat | None = getattr(_seat, "own", None)
        return of.__call__(self, *args, **kwargs) if seat is None else seat.ask(self, args, kwargs)

    if of not in _classes:
        _classes[of] = type(of.__name__, (of,), {"__call__": call, "__module__": of.__module__})
    return _classes[of]


class _Left(BaseException):
    """Unwinds a forward that nobody waits for any more. No `Exception`, so that no model catches it."""


class _Seat:
    """One of several forwards: a thread that runs only while `advance` waits for it."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None  # what it waits for
        self.output: Any = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._is_left = False
        self._turn, self._pause = threading.Semaphore(0), threading.Semaphore(0)
        state, context = _ThreadState(), contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run, forward, state), name="one of several forwards", daemon=True
        )
        self._thread.start()

    def advance(self, answer: Any = None) -> None:
        """Go on with what the block returned, until the next block or the end."""
        self._answer, self.call = answer, None
        self._turn.release()
        self._pause.acquire()
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """End the thread, if it has not ended."""
        self._is_left = True
        self._turn.release()

    def ask(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a block returns; called in the thread."""
        self.call = (block, args, kwargs)
        self._pause.release()
        self._wait()
        answer, self._answer = self._answer, None
        return answer

    def _wait(self) -> None:
        self._turn.acquire()
        if self._is_left:
            raise _Left

    def _run(self, forward: Callable[[], Any], state: "_ThreadState") -> None:
        _seat.own = self
        try:
            self._wait()
            with state.restored():
                self.output = forward()
        except _Left:
            return
        except BaseException as error:
            self._error = error
        self._pause.release()


class _Table:
    """The forwards that advance together. Blocks are called in the thread of whoever called the encoder."""

    def __init__(self, seats: Sequence[_Seat]) -> None:
        self._seats = seats

    def run(self) -> list[Any]:
        """Return the outputs in order."""
        try:
            for seat in self._seats:
                seat.advance()
            while waiting := [seat for seat in self._seats if seat.call is not None]:
                self._meet(waiting)
            return [seat.output for seat in self._seats]
        finally:
            for seat in self._seats:
                seat.leave()

    def _meet(self, waiting: Sequence[_Seat]) -> None:
        """Call the first one's block for all that wait for it: all, but where a size takes another way."""
        calls = [(seat, seat.call) for seat in waiting if seat.call is not None]
        block = calls[0][1][0]
        there = [(seat, call[1:]) for seat, call in calls if call[0] is block]
        for seat, answer in zip(
            [seat for seat, _ in there],
            block(several=_joined([arguments for _, arguments in there])),
            strict=True,
        ):
            seat.advance(answer)


def _joined(calls: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return the calls' arguments, tied together: in backward, gradients leave for the block below when
    those of all calls are there. Until then the block below has not begun.
    """
    values, structure = _pytree.tree_flatten(calls)
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    if torch.is_grad_enabled() and places:
        for place, tensor in zip(places, _Join.apply(*[values[i] for i in places]), strict=True):
            values[place] = tensor
    joined: list[tuple[Any, Any]] = _pytree.tree_unflatten(values, structure)
    return joined


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # copies, as in-place operations are not allowed on views that a function returns
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients


class _ThreadState:
    """What torch keeps for each thread, as it is where this is made; `torch.nn.parallel` carries the same."""

    def __init__(self) -> None:
        self._has_grad, self._is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocasts = [
            torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
        ]
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._stream.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            stack.enter_context(torch.inference_mode(self._is_inference))
            stack.enter_context(torch.set_grad_enabled(self._has_grad))
            for autocast in self._autocasts:
                stack.enter_context(autocast)
            yield
