"""Groups of worker processes, on this machine or on several, that do together what a bench tells them.

On every machine runs one `serve`, which connects to the bench, says what the machine has, and starts workers there;
each worker connects too, is told its rank, joins its group and takes orders. All groups stay alive, so that groups of
different sizes can take turns; a group that is not having its turn waits without using a core. When the bench ends, or
dies, its connections close, and everything it started ends.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge, wait
from typing import Any

import torch
import torch.distributed as td

from tldist import dist
from tldist.config import TrainingFailed
from tldist.train.worker import keep_freed_memory

Start = Callable[[str], AbstractContextManager[int]]
"""Starts `serve` with the string it is given on some machines, and says on how many; ends what it started."""

START_S = 300.0
"""How long machines and workers may take to connect: importing torch from a cold network file system takes a while."""


@dataclass(frozen=True)
class Machine:
    """What `serve` found where it runs."""

    host: str
    gpus: int
    cores: int


@dataclass(frozen=True)
class Place:
    """A worker's place in its group."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    threads: int


Make = Callable[[Place, Any], Any]
"""Builds, in a worker that has joined its group, what takes the orders; must be importable by name."""


# In the bench


class Group:
    """Workers of one process group. An order is a method's name; all do it at once, and answer in order of rank."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self.pipes = list(pipes)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Raises TrainingFailed with the reason when a worker fails or is lost."""
        for pipe in self.pipes:
            pipe.send((method, arguments))
        return self.answers()

    def answers(self) -> list[Any]:
        """One from each, whichever comes first."""
        found: dict[int, Any] = {}
        while len(found) < len(self.pipes):
            waited_for = [pipe for rank, pipe in enumerate(self.pipes) if rank not in found]
            for pipe in wait(waited_for):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                found[rank] = self.answer_of(rank)
        return [found[rank] for rank in range(len(self.pipes))]

    def answer_of(self, rank: int) -> Any:
        """Waits for it."""
        whose = f"worker {rank} of {len(self.pipes)} of the bench"
        try:
            found, failure = self.pipes[rank].recv()
        except (EOFError, OSError) as error:
            raise TrainingFailed(f"{whose} is lost") from error
        if failure:
            print(failure, file=sys.stderr)
            raise TrainingFailed(f"{whose} failed: {_last(failure)}")
        return found


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


class Machines:
    """Where workers can be started. Opened by `machines`."""

    def __init__(self, arrivals: queue.Queue[tuple[Any, Connection]], count: int) -> None:
        self.arrivals, self.serving = arrivals, []
        found = [self._next("a machine") for _ in range(count)]
        for machine, pipe in sorted(found, key=lambda one: one[0].host):
            self.serving.append((machine, pipe))
        self._started = 0

    @property
    def found(self) -> list[Machine]:
        """By name."""
        return [machine for machine, _ in self.serving]

    def _next(self, what: str) -> tuple[Any, Connection]:
        try:
            return self.arrivals.get(timeout=START_S)
        except queue.Empty:
            raise TrainingFailed(f"{what} of the bench did not connect within {START_S:.0f} s") from None

    def group(self, per_machine: Sequence[int], threads: int, make: Make, settings: Any) -> Group:
        """So many workers on the first machine, on the second, and so on."""
        places = [
            (machine, Place(0, sum(per_machine), local_rank, local_world, threads))
            for machine, local_world in enumerate(per_machine)
            for local_rank in range(local_world)
        ]
        tickets = range(self._started, self._started + len(places))
        self._started = tickets.stop
        for ticket, (machine, _) in zip(tickets, places, strict=True):
            self.serving[machine][1].send(ticket)
        arrived = dict(self._next("a worker") for _ in places)
        pipes = [arrived[ticket] for ticket in tickets]
        for rank, (pipe, (_, place)) in enumerate(zip(pipes, places, strict=True)):
            pipe.send((replace(place, rank=rank), make, settings))
        group = Group(pipes)
        store = group.answer_of(0)
        for pipe in pipes[1:]:
            pipe.send(store)
        group.answers()
        return group


@contextmanager
def machines(start: Start | None = None) -> Iterator[Machines]:
    """This machine, those of the Slurm allocation around it, or where `start` says; at the end all workers end."""
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    start, alone = start or (_on_slurm if nodes > 1 else _here), start is None and nodes == 1
    key, arrivals, connections = secrets.token_hex(32), queue.Queue(), []
    with Listener(("127.0.0.1" if alone else "0.0.0.0", 0), backlog=256) as listener:
        accepting = (listener, bytes.fromhex(key), arrivals, connections)
        threading.Thread(target=_accept, args=accepting, daemon=True).start()
        host, port = "127.0.0.1" if alone else _own_address(), listener.address[1]  # type: ignore[misc]
        with start(f"{host}:{port}:{key}") as count:
            try:
                yield Machines(arrivals, count)
            finally:
                for pipe in connections:
                    pipe.close()


def _accept(
    listener: Listener, key: bytes, arrivals: queue.Queue[tuple[Any, Connection]], connections: list[Connection]
) -> None:
    """Until the listener closes. Each caller is heard apart: one that says nothing holds up nobody."""
    with suppress(OSError):
        while True:
            connections.append(pipe := listener.accept())
            threading.Thread(target=_hear, args=(pipe, key, arrivals), daemon=True).start()


def _hear(pipe: Connection, key: bytes, arrivals: queue.Queue[tuple[Any, Connection]]) -> None:
    """Nothing is unpickled before the caller has shown that it knows the key."""
    with suppress(AuthenticationError, EOFError, OSError):
        deliver_challenge(pipe, key)
        answer_challenge(pipe, key)
        arrivals.put((pipe.recv(), pipe))


def _own_address() -> str:
    """Of the interface on the way out: many machines know their own name as a loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent, suppress(OSError):
        unsent.connect(("10.255.255.255", 1))
        return unsent.getsockname()[0]
    return socket.gethostname()


@contextmanager
def _here(join: str) -> Iterator[int]:
    with _process(COMMAND, join):
        yield 1


@contextmanager
def _on_slurm(join: str) -> Iterator[int]:
    """One task on each node of the allocation, free to use all that the job has there."""
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--cpu-bind=none", "--mem=0"]
    with _process(["srun", *tasks, *COMMAND], join):
        yield nodes


@contextmanager
def _process(command: Sequence[str], join: str) -> Iterator[None]:
    # Ctrl-C in the terminal is the bench's alone to handle.
    environment = os.environ | {JOIN: join}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        _end([process], wait_s=15)


def _end(processes: Sequence[subprocess.Popen[bytes]], wait_s: float = 5) -> None:
    """They end by themselves when their connection closes; one that is stuck is ended."""
    deadline = time.monotonic() + wait_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# On a machine


COMMAND = [sys.executable, "-c", "from tldist_benchmarks.workers import main; main()"]
"""Not `-m`: what is sent would be of a module called __main__, which the other side does not have."""
JOIN = "TLDIST_BENCH_JOIN"
"""HOST:PORT:KEY of the bench; in the environment, which only the user can read."""


def serve(join: str) -> None:
    """Say what this machine has, then start workers until the bench ends."""
    workers: list[subprocess.Popen[bytes]] = []
    with _connect(join) as pipe, suppress(EOFError, ConnectionError):
        pipe.send(Machine(socket.gethostname(), torch.cuda.device_count(), dist.cores()))
        try:
            while True:
                command = [*COMMAND, str(pipe.recv())]
                workers.append(subprocess.Popen(command, env=os.environ | {JOIN: join}, stdin=subprocess.DEVNULL))
        finally:
            for worker in workers:
                worker.terminate()
            _end(workers)


def _connect(join: str) -> Connection:
    host, port, key = join.split(":")
    return Client((host, int(port)), authkey=bytes.fromhex(key))


# In a worker


def work(join: str, ticket: int) -> None:
    """Join the group that the bench names, build what takes the orders, and obey until the bench ends."""
    with _connect(join) as pipe, suppress(EOFError, ConnectionError):
        pipe.send(ticket)
        place, make, settings = pipe.recv()
        os.environ |= {"LOCAL_RANK": str(place.local_rank), "LOCAL_WORLD_SIZE": str(place.local_world)}
        torch.set_num_threads(place.threads)
        device = dist.local_device()
        if device.type == "cpu":
            keep_freed_memory()  # as a run's worker does
        _join_group(pipe, place, device)
        worker = _answered(pipe, lambda: make(place, settings), tell=False)
        while worker is not None:
            method, arguments = pipe.recv()
            _answered(pipe, lambda: getattr(worker, method)(*arguments))  # noqa: B023 - called at once


def _join_group(pipe: Connection, place: Place, device: torch.device) -> None:
    """Over a store of the first worker's, on a port that is free there."""
    if place.world == 1:
        pipe.send((None, ""))
        return
    if place.rank == 0:
        with socket.socket(fileno=os.dup(pipe.fileno())) as ours:
            host = ours.getsockname()[0]  # by which the bench reaches this machine, and others will
        store = _store(host, 0, place.world, True)
        pipe.send(((host, store.port), ""))
    else:
        host, port = pipe.recv()
        store = _store(host, port, place.world, False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    td.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=dist.TIMEOUT)


def _store(host: str, port: int, world: int, is_main: bool) -> Any:
    return td.TCPStore(host, port, world, is_main, wait_for_workers=False)  # type: ignore[attr-defined]


def _answered(pipe: Connection, order: Callable[[], Any], tell: bool = True) -> Any:
    """Send what `order` returns (`tell`), or that it is done; or the traceback of what it raised."""
    try:
        found = order()
    except Exception:
        pipe.send((None, traceback.format_exc()))
        return None
    pipe.send((found if tell else None, ""))
    return found


def main() -> None:
    """`serve`, or, with a ticket, `work`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if len(sys.argv) > 1:
        work(os.environ[JOIN], int(sys.argv[1]))
    else:
        serve(os.environ[JOIN])
