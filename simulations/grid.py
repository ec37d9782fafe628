"""Flower's Grid without a server: pretend devices answer in this process, or in worker processes beside it.

The ServerApp loop and the ClientApp are the very ones that run in production. A message runs when its answer is pulled,
so at most a window of answers exists at a time; answers come in the order in which messages were pushed, so a run gives
the same bytes whatever the number of workers.

The one file that touches Flower's internals (TaskIdentity, message ids): its API moves monthly.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

AppFactory = Callable[..., ClientApp]

_worker_app: ClientApp | None = None


def pretend_nodes(count: int) -> list[Context]:
    """Contexts of `count` nodes, numbered from 1, with the partition ids that Flower's own simulation gives."""
    return [
        Context(
            run_id=1,
            node_id=index + 1,
            node_config={"partition-id": index, "num-partitions": count},
            state=RecordDict(),
            run_config={},
        )
        for index in range(count)
    ]


class InProcessGrid(Grid):
    """A Grid over pretend nodes.

    Args:
        nodes: their contexts.
        factory, arguments: `factory(*arguments)` makes the ClientApp, once in each process that runs devices; both
            must pickle when there are workers.
        workers: processes beside this one; 0 runs everything here.
        threads: numeric threads in each worker.
    """

    def __init__(
        self,
        nodes: Sequence[Context],
        factory: AppFactory,
        arguments: tuple[Any, ...] = (),
        *,
        workers: int = 0,
        threads: int = 1,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._nodes = {node.node_id: node for node in nodes}
        self._make = (factory, arguments)
        self._app: ClientApp | None = None
        self._window = max(1, 2 * workers)
        self._queue: deque[Message] = deque()
        self._running: deque[tuple[str, Future[Message] | Message]] = deque()
        self._count = 0
        self._pool = _start_pool(workers, threads, factory, arguments) if workers else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """A pretend run needs no registration."""

    @property
    def run(self) -> Run:
        return Run.create_empty(run_id=1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._count += 1
            message.metadata.__dict__["_message_id"] = str(self._count)
            self._queue.append(message)
            ids.append(str(self._count))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answer to the oldest unfinished message of those asked for, alone, once it is there."""
        asked = set(message_ids)
        self._fill()
        job = self._take(asked)
        if job is None:
            return []
        answer = self._perform(job) if isinstance(job, Message) else _result(job)
        self._fill()
        return [answer]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        ids = set(self.push_messages(messages))
        replies: list[Message] = []
        while ids:
            for reply in self.pull_messages(ids):
                ids.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    def _take(self, asked: Collection[str]) -> Future[Message] | Message | None:
        """The oldest message asked for, from those under way or, where others fill the window, from the queue."""
        for position, (id_, job) in enumerate(self._running):
            if id_ in asked:
                del self._running[position]
                return job
        for position, message in enumerate(self._queue):
            if message.metadata.message_id in asked:
                del self._queue[position]
                return self._start(message)
        return None

    def _start(self, message: Message) -> Future[Message] | Message:
        node = self._nodes[message.metadata.dst_node_id]
        return self._pool.submit(_serve, message, node) if self._pool else message

    def _fill(self) -> None:
        """Keep a window of messages under way."""
        while self._queue and len(self._running) < self._window:
            message = self._queue.popleft()
            self._running.append((message.metadata.message_id, self._start(message)))

    def _perform(self, message: Message) -> Message:
        if self._app is None:
            factory, arguments = self._make
            self._app = factory(*arguments)
        return self._app(message, self._nodes[message.metadata.dst_node_id])


def _start_pool(workers: int, threads: int, factory: AppFactory, arguments: tuple[Any, ...]) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([factory.__module__])
    return ProcessPoolExecutor(workers, context, _start_worker, (threads, factory, arguments))


def _start_worker(threads: int, factory: AppFactory, arguments: tuple[Any, ...]) -> None:
    global _worker_app
    os.environ["OMP_NUM_THREADS"] = str(threads)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    _worker_app = factory(*arguments)


def _serve(message: Message, node: Context) -> Message:
    if _worker_app is None:
        raise RuntimeError("a worker must be started before it serves")
    return _worker_app(message, node)


def _result(job: Future[Message]) -> Message:
    try:
        return job.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a simulation worker died: most often the machine ran out of memory; lower simulation.workers, "
            "train.batch_size or the ranks"
        ) from error
