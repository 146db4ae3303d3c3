"""Share a run's work among the processes that a launcher such as `accelerate launch` started.

Every process runs the same code and makes the same calls of `Processes` in the same order. At each call all of them
meet: what one of them found, or the error that one of them met, is then known to all. So no process waits for another
that has failed, and no result depends on the number of processes.
"""

import atexit
import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

__all__ = ["ALONE", "ProcessError", "Processes", "join_launch"]

Item = TypeVar("Item")
Found = TypeVar("Found")

_WAIT = timedelta(days=30)  # for a process with a long piece of work; the end of a process is noticed at once
# Variables with the number of processes: those that Accelerate reads, of torchrun and of MPI.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Variables with the number of a process on its machine. Only launchers set them; WORLD_SIZE and even RANK are also set
# for whole containers and jobs, in whose shells no other process would ever connect.
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


class ProcessError(OSError):
    """Another process of the run has ended, so the run cannot go on."""


class _Part(NamedTuple):
    found: Any


class _Failure(NamedTuple):
    number: int  # of the item or the process that failed
    make: Callable[[], BaseException]  # the error, which cannot always be sent itself


class _End(NamedTuple):
    code: int
    rank: int
    everywhere: bool = False


class Processes:
    """The processes of a run, as seen by one of them: a single one unless created by `join_launch`.

    Args:
        rank: number of this process, from 0
        count: number of processes
        local_rank: number of this process on its machine
        group: their `torch.distributed` group, with the gloo backend
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, group: Any = None) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._group = group
        self._apart = False
        self._own: BaseException | None = None  # the latest error of `join` in this process
        self._told: BaseException | None = None

    def first(self, work: Callable[[], Found]) -> Found:
        """Call `work` in process 0 only, and return its value, which can be pickled, in all."""
        if self.count == 1:
            return work()
        return self._meet(None, None, lambda _: work())

    def in_turn(self, work: Callable[[], Found]) -> Found:
        """Call `work` in process 0, then in the others, which find what it has downloaded; return its value in each."""
        if self.count == 1:
            return work()
        values: list[Found] = []
        self.first(lambda: values.append(work()))
        return self.together(lambda: work() if self.rank else values[0])

    def together(self, work: Callable[[], Found]) -> Found:
        """Call `work` in all processes and return its value in each; an error that one of them meets is raised in all.

        `work` may share. So an error may be caught, and all go on, even if a single process met it between two calls.
        """
        if self.count == 1:
            return work()
        values: list[Found] = []
        failure = None
        try:
            values.append(work())
        except Exception as error:
            if self.told(error) or isinstance(error, ProcessError):
                raise
            failure = (self.rank, error)
        self._meet(None, failure, lambda _: None)  # others may still be at an earlier call: it raises the error there
        return values[0]

    def share(
        self,
        items: Sequence[Item],
        work: Callable[[Item], Found],
        *,
        join: Callable[[list[Found]], Any] = list,
        bar: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> Any:
        """Call `work` for every item: for item k in process k modulo their number.

        If it raises errors, that of the first item with one is raised in all processes, as a single process would.

        Args:
            items: the same in all processes
            work: its value can be pickled
            join: called in process 0 with the values of `work` in the order of the items; returned in all processes is
                what it returns, which can be pickled
            bar: wraps the numbers of this process's items in a progress bar
        """
        if self.count == 1:
            return join([work(items[number]) for number in bar(range(len(items)))])
        found: dict[int, Found] = {}
        failure = None
        for number in bar(range(self.rank, len(items), self.count)):
            try:
                found[number] = work(items[number])
            except Exception as error:
                failure = (number, error)
                break

        def joined(parts: list[dict[int, Found]]) -> Any:
            return join([parts[number % self.count][number] for number in range(len(items))])

        return self._meet(found, failure, joined)

    @contextlib.contextmanager
    def held_by_first(self, context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
        """Context manager that enters `context` in process 0 only, such as the lock of the run's output folder."""
        with contextlib.ExitStack() as stack:
            self.first(lambda: stack.enter_context(context) and None)
            yield

    def end(self, code: int) -> int:
        """Wait until all processes end; return the first exit code of theirs that is not 0, else 0.

        So what another process prints is complete: a launcher kills all when one of them ends with an error.
        """
        with contextlib.suppress(ProcessError, KeyboardInterrupt):
            while self.count > 1 and not self._apart:  # others may still share work; they are told, and end as well
                answer = self._exchange(_End(code, self.rank), lambda _: None)
                if isinstance(answer, _End) and answer.everywhere:
                    return answer.code
        return code

    def leave(self) -> None:
        """Close the connection. A thread of gloo that frees a message while Python shuts down aborts the process."""
        group, self._group = self._group, None
        if group is not None and not self._apart:  # apart, it would wait for a message that may never come
            import torch.distributed as dist

            with contextlib.suppress(ValueError):  # Accelerate has closed all connections
                dist.destroy_process_group(group)

    def told(self, error: BaseException) -> bool:
        """Return True if an error was raised in all processes, so that one of them is enough to print it."""
        return error is self._told

    def say(self, words: str) -> None:
        """Print what only this process knows, also if the output of other processes than the first is not shown."""
        print(f"process {self.rank} of {self.count}: {words}", file=sys.__stdout__, flush=True)

    def _meet(self, found: Any, failure: tuple[int, BaseException] | None, join: Callable[[list[Any]], Found]) -> Found:
        """Return in all processes what `join` makes in process 0 of what each found, or raise the first failure."""
        mine = _Part(found) if failure is None else _Failure(failure[0], _portable(failure[1]))
        answer = self._exchange(mine, join)
        if isinstance(answer, _Part):
            return answer.found
        if isinstance(answer, _End):
            raise ProcessError(f"process {answer.rank} of {self.count} has ended before the others: see its message")
        error = failure[1] if failure is not None and failure[0] == answer.number else self._own
        error, self._own = error or answer.make(), None  # in the process where it was raised, it has its traceback
        self._told = error
        raise error

    def _exchange(self, mine: Any, join: Callable[[list[Any]], Any]) -> Any:
        """Send a message to process 0, and return its answer to those of all processes."""
        import torch.distributed as dist

        self._apart = True  # until all have the answer: an interrupt leaves the processes at different calls
        messages: list[Any] | None = [None] * self.count if self.rank == 0 else None
        with _noticing_ends():
            dist.gather_object(mine, messages, dst=0, group=self._group)
        box = [None if messages is None else self._answer(messages, join)]
        with _noticing_ends():
            dist.broadcast_object_list(box, src=0, group=self._group)
        self._apart = False
        return box[0]

    def _answer(self, messages: list[Any], join: Callable[[list[Any]], Any]) -> Any:
        ends = [message for message in messages if isinstance(message, _End)]
        if ends:
            first = next((end for end in ends if end.code), ends[0])
            return first._replace(everywhere=len(ends) == len(messages))
        failures = [message for message in messages if isinstance(message, _Failure)]
        if failures:
            return min(failures, key=lambda failure: failure.number)
        try:
            return _Part(join([message.found for message in messages]))
        except (Exception, SystemExit) as error:
            self._own = error
            return _Failure(-1, _portable(error))


ALONE = Processes()
"""A process that shares nothing."""


def join_launch() -> Processes:
    """Return the processes that a launcher started together with this one; `ALONE` if there is no launcher.

    Accelerate connects them; all of them must call this function.

    Raises:
        ProcessError: another one has ended.
    """
    counts = {name: os.environ[name] for name in _COUNTS if os.environ.get(name, "1") not in ("", "1")}
    if not counts:
        return ALONE
    if not any(os.environ.get(name) for name in _LOCAL_RANKS):
        name, count = counts.popitem()
        print(f"note: {name}={count}, but no launcher has set LOCAL_RANK: this is a single process", file=sys.stderr)
        return ALONE
    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=True)  # messages are small, and not on GPUs
    if state.num_processes == 1:
        return ALONE
    with _noticing_ends():
        group = dist.new_group(backend="gloo", timeout=_WAIT)
    processes = Processes(state.process_index, state.num_processes, state.local_process_index, group)
    atexit.register(processes.leave)
    return processes


@contextlib.contextmanager
def _noticing_ends() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # its connection is closed
        raise ProcessError("another process of this run has ended: see its message") from error


def _portable(error: BaseException) -> Callable[[], BaseException]:
    """Return a function that can be sent to another process and returns the error there."""
    try:
        sent = pickle.dumps(error)
        pickle.loads(sent)
    except Exception:  # such as a class whose arguments are not its message
        return partial(_imitation, type(error).__name__, str(error))
    return partial(pickle.loads, sent)


def _imitation(name: str, words: str) -> Exception:
    return type(name, (RuntimeError,), {})(words)
