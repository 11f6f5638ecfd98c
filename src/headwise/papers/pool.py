"""Many claims at once: each by itself in a worker process of one thread, so that what comes out
does not depend on how many workers there are or what ran before."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from headwise.papers.catalog import Entry
from headwise.papers.verdict import LIMIT, ClaimVerdict, Verdict

STOP_AFTER = 10 * LIMIT
"""Seconds on the clock after which a claim is stopped: it hangs."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Work:
    """One claim of one paper."""

    slug: str
    claim: str


@dataclass(frozen=True)
class Checked:
    """Verdicts in the order asked for. `interrupted`: by Ctrl-C; what was not run says so."""

    verdicts: tuple[Verdict, ...]
    interrupted: bool = False


def check_many(
    papers: Sequence[Entry],
    jobs: int = 1,
    threads: int = 1,
    quick: bool = False,
    budget: float | None = None,
    stop_after: float = STOP_AFTER,
    progress: Progress | None = None,
) -> Checked:
    """Check papers in `jobs` worker processes of `threads` threads each.

    `quick`: only the quick half. `budget`: seconds on the clock; when they are spent nothing new
    is started, and what was not started is `not run`. Quick claims go first, so that a budget
    covers as many papers as it can. A claim that runs for `stop_after` seconds is stopped as too
    slow. `progress(done, total, what)`. Ctrl-C ends the workers and keeps what is done.
    """
    chosen = {entry.slug: entry.quick if quick else entry.claims for entry in papers}
    waiting = [Work(entry.slug, name) for entry in papers for name in chosen[entry.slug]]
    fast = {Work(entry.slug, name) for entry in papers for name in entry.quick}
    waiting.sort(key=lambda work: work not in fast)
    total = len(waiting)
    found: dict[Work, ClaimVerdict] = {}
    surroundings: dict[str, Any] = {}
    began, interrupted, reason = time.monotonic(), False, ""
    pool: list[_Worker] = []
    try:
        pool = [_Worker(threads) for _ in range(max(1, min(jobs, total)))] if total else []
        while waiting or any(worker.work for worker in pool):
            if budget is not None and time.monotonic() - began >= budget:
                waiting, reason = [], f"the budget of {budget:g} s was spent"
            for worker in pool:
                if worker.work is None and waiting:
                    worker.give(waiting.pop(0))
            for work, verdict, around in _finished(pool, stop_after):
                found[work] = verdict
                surroundings = around or surroundings
                if progress is not None:
                    progress(len(found), total, f"{work.slug}: {work.claim}")
    except KeyboardInterrupt:
        interrupted, reason = True, "interrupted"
    finally:
        for worker in pool:
            worker.end()
    verdicts = []
    for entry in papers:
        claims = tuple(
            found.get(Work(entry.slug, name)) or _not_run(name, reason)
            for name in chosen[entry.slug]
        )
        verdicts.append(Verdict(entry.slug, entry.family, claims, surroundings))
    return Checked(tuple(verdicts), interrupted)


def _not_run(name: str, reason: str) -> ClaimVerdict:
    return ClaimVerdict(name, "", "", (), missing=reason)


def _finished(
    pool: list[_Worker], stop_after: float
) -> Iterator[tuple[Work, ClaimVerdict, dict[str, Any]]]:
    """What came back within the next moment, with what hangs or died."""
    busy = [worker for worker in pool if worker.work is not None]
    wait([worker.pipe for worker in busy], timeout=0.5)
    for worker in busy:
        work = worker.work
        assert work is not None
        if worker.pipe.poll():
            try:
                verdict, around = worker.pipe.recv()
            except EOFError:
                worker.process.join()
                told = f"its process ended with exit code {worker.process.exitcode}"
                verdict, around = replace(_not_run(work.claim, ""), error=told), {}
                worker.renew()
            worker.work = None
            yield work, verdict, around
        elif time.monotonic() - worker.since > stop_after:
            seconds = time.monotonic() - worker.since
            worker.renew()
            worker.work = None
            verdict = replace(_not_run(work.claim, "stopped"), seconds=max(seconds, LIMIT + 1))
            yield work, verdict, {}


class _Worker:
    """A process that checks one claim after another."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.work: Work | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.threads), daemon=True)
        with _threads_of_children(self.threads):
            self.process.start()
        theirs.close()

    def give(self, work: Work) -> None:
        self.work, self.since = work, time.monotonic()
        try:
            self.pipe.send(work)
        except OSError:  # it died while it had nothing to do
            self.renew()
            self.pipe.send(work)

    def renew(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.pipe.close()


@contextmanager
def _threads_of_children(threads: int) -> Iterator[None]:
    """Libraries read the number of threads when they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    held = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in held.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(pipe: Connection, threads: int) -> None:
    """A worker's life. Ctrl-C is the parent's business, and its output belongs to the parent's
    results: what claims print goes to the standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    os.dup2(2, 1)
    # bars of models that are loaded, and what torchao says when transformers imports it
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from headwise.papers.checking import check

    while True:
        try:
            work: Work = pipe.recv()
        except EOFError:
            return
        try:
            verdict = check(work.slug, [work.claim], threads=threads)
            pipe.send((verdict.claims[0], verdict.environment))
        except Exception as error:  # its file cannot be imported
            told = f"{type(error).__name__}: {error}"
            pipe.send((replace(_not_run(work.claim, ""), error=told), {}))
