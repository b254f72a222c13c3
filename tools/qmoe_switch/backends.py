"""Expert backends: what computes the feed-forward part of a sparse layer, and on what.

A backend turns the two stacks of a layer into an `ExpertLayer`; the model calls that with tokens and the expert of
each. There are three: `cpu` (compressed experts, Numba), `dense` (plain matrices through torch) and whatever the
entry point group `qmoecodec.backends` names `cuda`. The one that was asked for runs or there is an error.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch

from .checkpoint import ExpertStack
from .errors import BackendError

Activation = Callable[[torch.Tensor], torch.Tensor]

ENTRY_POINTS = "qmoecodec.backends"

#: Tokens from which on an expert is decoded once and multiplied as a matrix, instead of one fused matvec per token: of
#: experts with fewer weights than LARGE_EXPERT_WEIGHTS, and of larger ones (docs/runtime.md has the measurement).
DECODE_ONCE_TOKENS = (4, 8)
LARGE_EXPERT_WEIGHTS = 1 << 22

#: Bytes of dense matrices that `DenseBackend` keeps in compute dtype before it drops the least recently used.
DENSE_CACHE_BYTES = 2 << 30


class ExpertLayer(Protocol):
    """The experts of one sparse layer, ready to run."""

    def __call__(self, states: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """Compute `wo[e] @ activation(wi[e] @ x)` for every token.

        states : float[n, d_model]
        expert : int64[n]    the expert of each token; -1 gives a row of zeros
        Returns float[n, d_model] in the dtype of `states`.
        """


class ExpertBackend(Protocol):
    """Makes expert layers."""

    @property
    def name(self) -> str: ...

    @property
    def is_capturable(self) -> bool:
        """Whether its layers ask the device nothing, so that a CUDA graph can hold them."""

    def layer(self, wi: ExpertStack, wo: ExpertStack, activation: Activation) -> ExpertLayer:
        """Prepare a layer. Reads no weights of an expert until a token comes to it."""


def make_backend(name: str, *, device: torch.device, threads: int | None = None) -> ExpertBackend:
    """Return the backend of that name: `cpu`, `dense` or `cuda`.

    Raises BackendError where it is not installed or does not run on the device.
    """
    if name == "dense":
        return DenseBackend()
    if name == "cpu":
        if device.type != "cpu":
            raise BackendError(f"the backend cpu does not run on {device}")
        return CpuBackend(threads=threads)
    if name == "cuda":
        if device.type != "cuda":
            raise BackendError(f"the backend cuda does not run on {device}")
        return CudaBackend(load_backend("cuda"), device)
    raise BackendError(f"no backend is called {name!r}: there are cpu, dense and cuda")


def load_backend(name: str) -> Any:
    """Load what the entry point group `qmoecodec.backends` has under a name; raises BackendError."""
    found = [point for point in importlib.metadata.entry_points(group=ENTRY_POINTS) if point.name == name]
    if not found:
        raise BackendError(f"the backend {name} is not installed: pip install 'qmoecodec[{name}]' (no other one is used instead)")
    try:
        return found[0].load()()
    except (ImportError, AttributeError, RuntimeError) as error:
        raise BackendError(f"the backend {name} cannot be loaded: {error}") from error


def by_expert(expert: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each expert that has tokens, in order, with the positions of its tokens, in order."""
    order = torch.argsort(expert, stable=True)
    numbers, counts = torch.unique_consecutive(expert[order], return_counts=True)
    begin = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        if number >= 0:
            yield number, order[begin : begin + count]
        begin += count


class DenseBackend:
    """Plain matrices: those of an uncompressed checkpoint, or decoded ones, kept in compute dtype on the device."""

    name = "dense"
    is_capturable = False

    def __init__(self, *, cache_bytes: int = DENSE_CACHE_BYTES) -> None:
        self._cache: OrderedDict[tuple[int, int, torch.dtype, torch.device], torch.Tensor] = OrderedDict()
        self._cache_bytes, self._held = cache_bytes, 0

    def layer(self, wi: ExpertStack, wo: ExpertStack, activation: Activation) -> ExpertLayer:
        """Prepare a layer."""

        def run(states: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(states)
            for number, places in by_expert(expert):
                hidden = activation(states[places] @ self._matrix(wi, number, states).T)
                out[places] = hidden @ self._matrix(wo, number, states).T
            return out

        return run

    def _matrix(self, stack: ExpertStack, expert: int, like: torch.Tensor) -> torch.Tensor:
        key = (id(stack), expert, like.dtype, like.device)
        matrix = self._cache.pop(key, None)
        if matrix is None:
            matrix = stack.dense(expert).to(device=like.device, dtype=like.dtype)
            self._held += matrix.nbytes
        self._cache[key] = matrix
        while self._held > self._cache_bytes and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        return matrix


class CpuBackend:
    """Compressed experts on the CPU: fused decode-matvec for few tokens, decode once and multiply for many.

    Experts are worked on in parallel, one thread each, and a large one that is alone in several pieces; matrices are
    multiplied by torch with its own threads. What is kept between calls is the compressed form alone.
    """

    name = "cpu"
    is_capturable = False

    def __init__(self, *, threads: int | None = None, decode_once_tokens: tuple[int, int] = DECODE_ONCE_TOKENS) -> None:
        self._threads = threads or os.cpu_count() or 1
        self._decode_once_tokens = decode_once_tokens
        self._pool: ThreadPoolExecutor | None = None

    def layer(self, wi: ExpertStack, wo: ExpertStack, activation: Activation) -> ExpertLayer:
        """Prepare a layer."""

        def run(states: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(states)
            work = list(by_expert(expert))
            numbers = [number for number, _ in work]
            inputs = [states[places].to(torch.float32) for _, places in work]
            hidden = [activation(part) for part in self._project(wi, numbers, inputs)]
            for (_, places), part in zip(work, self._project(wo, numbers, hidden), strict=True):
                out[places] = part.to(out.dtype)
            return out

        return run

    def _project(self, stack: ExpertStack, experts: list[int], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Multiply the tokens of each expert with its matrix: float32[n, cols] to float32[n, rows]."""
        _, rows, cols = stack.shape
        is_large = rows * cols >= LARGE_EXPERT_WEIGHTS
        pieces = max(1, self._threads // len(experts)) if experts and is_large else 1
        bounds = [rows * i // pieces for i in range(pieces + 1)]
        outputs = [torch.empty((len(x), rows), dtype=torch.float32) for x in inputs]
        jobs: list[tuple[int, Callable[[], torch.Tensor | None]]] = []
        for i, (expert, x) in enumerate(zip(experts, inputs, strict=True)):
            if len(x) >= self._decode_once_tokens[is_large]:
                jobs.append((i, partial(_matrix, stack, expert)))
            else:
                jobs += [(i, partial(_multiply, stack, expert, x, outputs[i], b, e)) for b, e in pairwise(bounds)]
        for i, matrix in self._run(jobs):
            if matrix is not None:
                torch.mm(inputs[i], matrix.T, out=outputs[i])
        return outputs

    def _run(self, jobs: list[tuple[int, Callable[[], torch.Tensor | None]]]) -> Iterator[tuple[int, torch.Tensor | None]]:
        """Yield the jobs' results in order; no more than one per thread is ahead of what has been taken."""
        if len(jobs) < 2 or self._threads == 1:
            yield from ((i, job()) for i, job in jobs)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="qmoe-expert")
        pending: deque[tuple[int, Future[torch.Tensor | None]]] = deque()
        try:
            for i, job in jobs:
                pending.append((i, self._pool.submit(job)))
                if len(pending) > self._threads:
                    index, future = pending.popleft()
                    yield index, future.result()
            while pending:
                index, future = pending.popleft()
                yield index, future.result()
        finally:
            wait([future for _, future in pending])  # after an error nothing goes on behind the caller's back


def _matrix(stack: ExpertStack, expert: int) -> torch.Tensor:
    """Return an expert's matrix, float32[rows, cols]."""
    packed = stack.packed(expert)
    return stack.dense(expert).to(torch.float32) if packed is None else torch.from_numpy(packed.matrix())


def _multiply(stack: ExpertStack, expert: int, x: torch.Tensor, out: torch.Tensor, begin: int, end: int) -> torch.Tensor | None:
    """Multiply rows begin..end of an expert with each token; returns the matrix instead where it is not compressed."""
    packed = stack.packed(expert)
    if packed is None:
        return _matrix(stack, expert)
    target = out.numpy()
    for i, token in enumerate(x.numpy()):
        target[i, begin:end] = packed.matvec(token, begin, end)
    return None


class CudaBackend:
    """Compressed experts in GPU memory, through the backend that `qmoecodec.backends` names `cuda`.

    It is asked for `experts.load(encoded, levels, dtype=, device=)`, which uploads a stack, and for `ops.moe_mlp` and
    `ops.grouped_matvec`, which multiply tokens with it. They take bfloat16 and float16; tokens in float32 are
    rounded to bfloat16 on the way in.
    """

    name = "cuda"
    is_capturable = True

    def __init__(self, offered: Any, device: torch.device) -> None:
        self._offered, self._device = offered, device

    def layer(self, wi: ExpertStack, wo: ExpertStack, activation: Activation) -> ExpertLayer:
        """Upload both stacks of a layer, whole."""
        ops, first, second = self._offered.ops, self._upload(wi), self._upload(wo)
        is_relu = isinstance(activation, torch.nn.ReLU)

        def run(states: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
            x = states if states.dtype in (torch.bfloat16, torch.float16) else states.to(torch.bfloat16)
            if is_relu:
                out: torch.Tensor = ops.moe_mlp(x, expert, first, second)
            else:
                hidden = activation(ops.grouped_matvec(x, expert, first))
                out = ops.grouped_matvec(hidden.contiguous(), expert, second)
            return out.to(states.dtype)

        return run

    def _upload(self, stack: ExpertStack) -> Any:
        held = stack.compressed()
        if held is None:
            raise BackendError(
                f"the backend cuda runs compressed experts, and those of {stack.name} are not all compressed in one group"
            )
        return self._offered.experts.load(held.encoded, held.levels, dtype=held.dtype, device=self._device)
