"""Explaining on several devices and machines, by Ray Data.

`batch.run(source, model, out, sinks, options, engine=cluster)` inside `with Cluster() as cluster:`.

The driver lists the source, skips what is done, and writes; its chunks go one by one through a Ray
Data set to the workers, and come back explained in the order of the source. On GPUs tasks on the
cores decode and encode; on CPUs the actors do:

    driver -> feed -> read (one task)
           -> decode (tasks) -> explain (an actor a device) -> encode (tasks) -> driver

`ExplainBatch` explains in a Ray Data pipeline of one's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import pickle
import platform
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradcampp_ext import models
from gradcampp_ext.batch.decode import DecodeError
from gradcampp_ext.batch.engine import Engine, EngineError, Options
from gradcampp_ext.batch.explaining import Done, Explain, Job
from gradcampp_ext.batch.items import LABEL_COLUMNS, Item
from gradcampp_ext.batch.memory import keep_freed_memory
from gradcampp_ext.batch.sinks import encode
from gradcampp_ext.capture import CaptureError
from gradcampp_ext.explainer import Explainer
from gradcampp_ext.imaging import ImageError, read

try:
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask
    from ray.data.exceptions import SystemException
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise ImportError(
        f"Ray Data cannot be imported ({error}): pip install 'gradcampp_ext[ray]'"
    ) from error

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image

    from gradcampp_ext.batch.decode import Batch, Chunk
    from gradcampp_ext.batch.items import Read
    from gradcampp_ext.batch.sinks import Rendered, Sink
    from gradcampp_ext.models import LoadedModel

_TRIES = 4  # of a batch whose worker dies, which Ray would try for ever
_ANSWER = 10  # seconds that a cluster has for its first answer
_AHEAD = 4  # batches on their way, for each process that works on them


class Cluster:
    """A Ray cluster, for `run(engine=)`; a context.

    Unless this process is connected to one already, without an address one is started on this
    machine, and ended with the context.

    With GPUs (`Options.device`), an actor explains on each GPU of the cluster, and tasks decode on
    its cores. Without, an actor a core decodes and explains. `Options.workers` is the number of
    tasks that decode, or of actors.

    Args:
        address: HOST:PORT of a running cluster, "auto" for the one that this machine belongs to;
            None for the environment's RAY_ADDRESS, if there is one.

    Raises:
        EngineError: on entering, there is no such cluster.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._connected = False

    def __enter__(self) -> Cluster:
        if not ray.is_initialized():
            _connect(self._address)
            self._connected = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._connected:
            ray.shutdown()

    @property
    def device(self) -> torch.device:
        """Where it explains: "cuda" if the cluster has GPUs."""
        return torch.device("cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu")

    def __call__(self, job: Job) -> _Remote:
        return _Remote(job)


class ExplainBatch:
    """Explains the pictures of a Ray Data set, for its `map_batches`; loads its model once.

    ```python
    data = ray.data.read_binary_files("photos", include_paths=True)
    data = data.map_batches(
        ExplainBatch,
        fn_constructor_kwargs={"model": "demo", "method": "layercam"},
        batch_size=32,
        concurrency=2,
    )
    ```

    Batches have a column "bytes" (encoded pictures), "image" (uint8 [H, W, 3]) or "path" (files
    that the worker can read), the first of these that there is, and for target="label" one of
    "class_index", "label", "class_name" and "wordnet_id". Columns are added, for N pictures with
    K maps (classes times layers):

        map: float32 [N, K, H, W] in [0, 1].
        target: int64 [N, K], what is explained.
        score, probability: float32 [N, K], of the targets.
        layer: [N, K], names.
        predicted: int64 [N], class of the largest output.
        predicted_name, predicted_probability: [N].
        error: why a picture has no explanation (its numbers are NaN and -1), else None.

    Args:
        model: see `models.load`; or a loaded model.
        weights: for `models.load`.
        maps: "image", as large as the network's input (or `size`), or "feature", as the layer's.
        options: as of `Options`. The default device is the GPU that Ray gives the worker by
            num_gpus=1, or else the CPU.

    Raises:
        ValueError: as `Options` and `models.load` raise it; a batch without pictures.
        EngineError, CaptureError: the model cannot be explained.
    """

    def __init__(
        self,
        model: str | LoadedModel,
        *,
        weights: str | None = None,
        maps: str = "image",
        **options: Any,
    ) -> None:
        if maps not in ("image", "feature"):
            raise ValueError(f"maps must be 'image' or 'feature', got {maps!r}")
        keep_freed_memory()
        options.setdefault("device", _device_of_worker())
        loaded = models.load(model, weights=weights) if isinstance(model, str) else model
        job = Job(_opened, loaded, [], Options(**options), None, {})
        self._decoder, self._engine = job.decoder(), Engine(loaded, job.options)
        self._maps, self._input = job.options.maps, loaded.recipe.size
        self._whole = maps == "image"
        size = job.options.size or self._input
        self._size: Sequence[int] | None = size if self._whole else None

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        pictures = next((batch[name] for name in ("bytes", "image", "path") if name in batch), None)
        if pictures is None:
            raise ValueError(
                "ExplainBatch needs a column 'bytes', 'image' or 'path', "
                f"the batch has {', '.join(batch) or 'none'}"
            )
        labels = next((batch[name] for name in LABEL_COLUMNS if name in batch), None)
        chunk = [
            (Item(str(n), "", picture, None if labels is None else labels[n]), "")
            for n, picture in enumerate(pictures)
        ]
        decoded = self._decoder[chunk]
        rows, parts = self._engine(decoded, self._drawn)
        places = [int(item.path) for item in decoded.items]
        if self._size is None:  # the layer's; all batches, failed ones too, must have one shape
            black = Item("", "", np.zeros((*self._input, 3), np.uint8), 0)
            tried = parts or self._engine(self._decoder[[(black, "")]], self._drawn)[1]
            self._size = tried[0].shape[2:]
        n, k = len(chunk), self._maps
        columns: dict[str, Any] = {
            "map": np.full((n, k, *self._size), np.nan, np.float32),
            "target": np.full((n, k), -1),
            "score": np.full((n, k), np.nan, np.float32),
            "probability": np.full((n, k), np.nan, np.float32),
            "layer": np.full((n, k), "", object),
            "predicted": np.full(n, -1),
            "predicted_name": np.full(n, None),
            "predicted_probability": np.full(n, np.nan, np.float32),
            "error": np.full(n, None),
        }
        if parts:
            columns["map"][places] = np.concatenate(parts)
        for place, own in zip(places, rows, strict=True):
            for name in ("target", "score", "probability", "layer") if own else ():
                columns[name][place] = [row[name] for row in own]
            for name in ("predicted", "predicted_name", "predicted_probability") if own else ():
                columns[name][place] = own[0][name]
        for path, reason in decoded.failures:
            columns["error"][int(path)] = reason
            columns["map"][int(path)] = np.nan
        return {**batch, **columns}

    def _drawn(self, rendered: Rendered) -> npt.NDArray[Any]:
        return (rendered.maps if self._whole else rendered.feature_maps).cpu().numpy()


class _Remote:
    """Explains chunks by the workers of the cluster that this process is connected to."""

    threads = 1  # of a worker, which Ray gives one core

    def __init__(self, job: Job) -> None:
        options = job.options
        Explainer(job.model.model, options.layers or job.model.target_layer, options.method)
        if options.workers == 0:
            raise ValueError("with Ray, workers must be at least 1: the driver decodes nothing")
        resources = ray.cluster_resources()
        self._gpus: int = int(resources.get("GPU", 0)) if options.device.type == "cuda" else 0
        if options.device.index is not None:
            raise ValueError(f"Ray gives each worker its own GPU: cuda, got {options.device}")
        if options.device.type == "cuda" and not self._gpus:
            raise EngineError("the cluster has no GPU, and device is cuda; try cpu")
        cores = int(resources.get("CPU", 0)) or 1
        self._decoders: int = options.workers or cores if self._gpus else 0
        size = self._gpus or options.workers or cores
        self._actors: int = size if job.batches is None else max(1, min(size, job.batches))
        sent = replace(job, read=_Reader(job.read, ray.get_runtime_context().get_node_id()))
        self._job: Any = ray.put(
            (_versions(), sys.path, str(Path.cwd()), ray.cloudpickle.dumps(sent))
        )

    @contextlib.contextmanager
    def start(self, chunks: Iterator[Chunk]) -> Iterator[Iterator[Done]]:
        first = next(chunks, None)
        if first is None:
            yield iter(())
            return
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        feed = ray.remote(_Feed).options(num_cpus=0, scheduling_strategy=here).remote(_TRIES)
        with _told(), contextlib.closing(self._results(feed)) as results:
            yield self._done(itertools.chain([first], chunks), feed, results)

    def _results(self, feed: Any) -> Any:
        """What the workers send, a batch at a time."""
        data = ray.data.read_datasource(_Chunks(feed), override_num_blocks=1, num_cpus=0)
        context = data.context
        context.target_max_block_size = 1  # a row, which is a chunk, is a block and so a task
        context.execution_options.preserve_order = True
        context.execution_no_progress_timeout_s = -1  # a source may be slow
        context.enable_progress_bars = context.print_on_execution_start = False
        if self._decoders:
            data = data.map_batches(
                functools.partial(_decode, job=self._job, feed=feed),
                batch_size=1,
                num_cpus=1,
                concurrency=self._decoders,
            )
        data = data.map_batches(
            _Worker,
            fn_constructor_kwargs={"job": self._job, "feed": feed},
            batch_size=1,
            compute=ActorPoolStrategy(
                min_size=1,
                initial_size=self._actors,
                max_size=self._actors,
                max_tasks_in_flight_per_actor=2,
            ),
            num_cpus=0 if self._gpus else 1,
            num_gpus=1 if self._gpus else 0,
        )
        if self._decoders:
            data = data.map_batches(
                functools.partial(_encode, job=self._job),
                batch_size=1,
                num_cpus=1,
                concurrency=self._decoders,
            )
        return iter(data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))

    def _done(self, chunks: Iterator[Chunk], feed: Any, results: Any) -> Iterator[Done]:
        ahead = _AHEAD * (self._actors + self._decoders)
        sent, more = 0, True
        for received in itertools.count():
            while more and sent < received + ahead:
                chunk = next(chunks, None)
                more = chunk is not None
                feed.put.remote(sent, pickle.dumps((sent, chunk)) if more else None, received)
                sent += 1
            batch = next(results, None)
            if batch is None:
                return
            done = pickle.loads(batch["done"][0])
            if isinstance(done, Exception):
                raise done
            yield done


class _Feed:
    """Chunks on their way from the driver to the read task; an actor on the driver's machine.

    They are kept until their results have come back: a read task that dies is run again by Ray,
    from the first chunk on, and must give the same ones.
    """

    def __init__(self, tries: int) -> None:
        self._most = tries
        self._chunks: dict[int, bytes | None] = {}
        self._received = 0
        self._tries: dict[int, int] = {}
        self._changed = asyncio.Condition()

    async def put(self, number: int, chunk: bytes | None, received: int) -> None:
        """None after the last one. Results of those before `received` have come back."""
        async with self._changed:
            for old in range(self._received, received):
                self._chunks.pop(old, None)
                self._tries.pop(old, None)
            self._received = received
            self._chunks[number] = chunk
            self._changed.notify_all()

    async def get(self, number: int) -> bytes | None:
        """Waits for a chunk. Of one whose result has come back, nothing is left but its place."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._chunks or number < self._received)
            return self._chunks.get(number, b"")

    async def begin(self, number: int) -> int:
        """A worker begins with a chunk; how many have died of it, if they are enough, or else 0."""
        died = self._tries.get(number, 0)
        self._tries[number] = died + 1
        return died if died >= self._most else 0


class _Chunks(Datasource):
    """The feed's chunks, a row each, read by one task on the driver's machine."""

    supports_distributed_reads = False

    def __init__(self, feed: Any) -> None:
        super().__init__()
        self._feed = feed

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        feed = self._feed

        def rows() -> Iterator[pa.Table]:
            for number in itertools.count():
                chunk = ray.get(feed.get.remote(number))
                if chunk is None:
                    return
                yield pa.table({"chunk": pa.array([chunk], pa.large_binary())})

        return [ReadTask(rows, BlockMetadata(None, None, None, None))]


class _Worker:
    """The actor of a device. It loads the model with its first batch."""

    def __init__(self, job: Any, feed: Any) -> None:
        keep_freed_memory()
        self._ref, self._feed = job, feed
        self._explain: Explain | None = None
        self._idle = time.perf_counter()

    def __call__(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
        alone = "chunk" in batch
        if alone:
            batch = _decode(batch, self._ref, self._feed)
        done = pickle.loads(batch["decoded"][0])
        if not isinstance(done, Exception):
            done = self._explained(done)
        if alone:
            done = _encoded(done, self._ref)
        self._idle = time.perf_counter()
        return {"done": [pickle.dumps(done, pickle.HIGHEST_PROTOCOL)]}

    def _explained(self, decoded: Batch) -> Done | Exception:
        try:
            if self._explain is None:
                self._explain = Explain(_job(self._ref))
            begin = time.perf_counter()
            done = self._explain(decoded)
            waited, explaining = begin - self._idle, time.perf_counter() - begin
            return done._replace(seconds={"decode": waited, "explain": explaining})
        except _EXPECTED as error:
            return error


def _decode(batch: Mapping[str, npt.NDArray[Any]], job: Any, feed: Any) -> dict[str, Any]:
    number, chunk = pickle.loads(batch["chunk"][0])
    decoded: Batch | Exception
    try:
        if died := ray.get(feed.begin.remote(number)):
            raise DecodeError(
                f"{died} workers of Ray have died at the pictures from {chunk[0][0].path} "
                f"to {chunk[-1][0].path}; if for want of memory, try fewer workers or a smaller "
                "batch. The same command goes on from what is written"
            )
        decoded = _decoder(job)[chunk]
    except _EXPECTED as error:
        decoded = error
    return {"decoded": [pickle.dumps(decoded, pickle.HIGHEST_PROTOCOL)]}


def _encode(batch: Mapping[str, Any], job: Any) -> dict[str, Any]:
    done = _encoded(pickle.loads(batch["done"][0]), job)
    return {"done": [pickle.dumps(done, pickle.HIGHEST_PROTOCOL)]}


def _encoded(done: Done | Exception, job: Any) -> Done | Exception:
    """With the contents of files, which are smaller than pixels; the driver only writes them."""
    if isinstance(done, Exception) or done.drawn is None:
        return done
    try:
        sinks, about = _sinks(job)
        return done._replace(drawn=encode(sinks, done.rows, done.drawn, about))
    except _EXPECTED as error:
        return error


@functools.lru_cache(1)
def _sinks(job: Any) -> tuple[Sequence[Sink], Mapping[str, Any]]:
    loaded = _job(job)
    return loaded.sinks, loaded.about


@functools.lru_cache(1)
def _decoder(job: Any) -> Any:
    return _job(job).decoder()


class _Reader:
    """A source's `read` where it may not see the driver's files."""

    def __init__(self, source: Read, node: str) -> None:
        self._read, self._node = source, node

    def __call__(self, item: Item) -> Any:
        try:
            return self._read(item)
        except ImageError as error:
            here = ray.get_runtime_context().get_node_id()
            if not isinstance(error.__cause__, FileNotFoundError) or here == self._node:
                raise
            raise ImageError(
                f"{error} on {platform.node()}; Ray's workers there need the same files under the "
                "same path: put them on storage that all machines share"
            ) from error


_EXPECTED = (EngineError, CaptureError, DecodeError, ValueError, ImportError)


def _job(ref: Any) -> Job:
    """What the driver sent, if the worker has what it takes."""
    theirs, path, folder, content = ray.get(ref)
    ours = _versions()
    if ours != theirs:
        differ = ", ".join(
            f"{name} {theirs[name]} here and {ours[name]} on {platform.node()}"
            for name in theirs
            if theirs[name] != ours[name]
        )
        raise EngineError(f"the driver and a worker of Ray have different versions: {differ}")
    with contextlib.suppress(OSError):  # relative paths mean the driver's
        os.chdir(folder)
    sys.path += [entry for entry in path if entry not in sys.path]
    try:
        job: Job = pickle.loads(content)
    except Exception as error:  # of whatever the source and the model are made
        raise EngineError(
            f"a worker of Ray on {platform.node()} cannot load model and source "
            f"({type(error).__name__}: {error}); the same packages and modules must be there"
        ) from error
    return job


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("gradcampp_ext", "torch", "pillow")}


def _connect(address: str | None) -> None:
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    os.environ |= {name: value for name, value in quiet.items() if name not in os.environ}
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)
    started = {} if address else {"include_dashboard": False}
    try:
        host, _, port = (address or "").rpartition(":")
        if host and "/" not in host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=_ANSWER).close()
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **started)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError by version and cause
        if address:
            raise EngineError(
                f"no Ray cluster can be reached at {address} ({error}); is it running, and is this "
                "machine part of it?"
            ) from error
        raise EngineError(f"Ray cannot be started on this machine: {error}") from error


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What Ray raises, as what a user can act on."""
    try:
        yield
    except (ray.exceptions.RayError, SystemException) as error:
        missing = re.search(r"No module named '([^']+)'", str(error))
        if missing:
            raise EngineError(
                f"a worker of Ray has no module {missing[1]}: install the same packages on all "
                "machines of the cluster"
            ) from error
        raise DecodeError(
            f"Ray gave up: {error}; the same command goes on from what is written"
        ) from error


def _device_of_worker() -> torch.device:
    return torch.device("cuda" if ray.get_gpu_ids() else "cpu")


def _opened(item: Item) -> Image.Image:
    return read(item.image)
