"""The worker processes of a rank's loader: started, waited for, and ended, however the run ends.

Tested by tests/test_lanes.py and tests/test_failures.py.
"""

import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time

import fsspec
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mtl_dist.data.batches import Round

SECONDS_AFTER_SIGTERM = 120
"""A worker that is told to stop ends with its training process, and after this at the latest."""

PARTS_AHEAD = 4
"""How many parts of rounds each worker prepares ahead."""


class Rounds:
    """The whole rounds of one rank, in order; `stream` is the RoundStream of loader.py."""

    def __init__(self, stream: IterableDataset, workers: int, pin_memory: bool):
        self.stream, self.workers, self.pin_memory = stream, workers, pin_memory
        self.taken = 0
        stream.made = multiprocessing.RawArray(
            "q", max(1, workers)
        )  # a killed process holds no lock
        stream.known = pickle.dumps([one.known() for one in stream.streams])
        stream.end_pipe = os.pipe() if workers else None
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PARTS_AHEAD if workers else None,
            worker_init_fn=_start_worker,
        )
        gc.freeze()  # what is there by now is not searched again and again, nor copied by workers
        self.loader = iter(loader)

    def __iter__(self) -> "Rounds":
        return self

    def __next__(self) -> Round:
        """Wait for the next round."""
        ahead, began = self.ahead(), time.perf_counter()
        shares = [next(self.loader) for _ in range(max(1, self.workers))]
        self.taken += len(shares)
        assert len({share.number for share in shares}) == 1, "the loader asks its workers in turns"
        round_ = self.stream.join(shares)
        round_.ahead, round_.waited = ahead, time.perf_counter() - began
        return round_.pin_memory() if self.pin_memory else round_

    def ahead(self) -> float:
        """Return how many rounds the workers have ready."""
        return (sum(self.stream.made) - self.taken) / self.workers if self.workers else 0.0

    def close(self) -> None:
        """End the workers now, also those that wait for data: the process would wait for them at its exit."""
        if self.stream.end_pipe is not None:
            receive, send = self.stream.end_pipe
            os.write(send, bytes(self.workers))
            self.stream.end_pipe = None
            self.loader = None
            os.close(receive)
            os.close(send)


def _start_worker(worker: int) -> None:
    """Let a worker outlive a signal to the whole process group, as the round has to be finished, and end when told so.

    `datasets` resets fsspec's lock after a fork in an iteration that lanes do not use.
    """
    fsspec.asyn.reset_lock()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(SECONDS_AFTER_SIGTERM))
    pickle.loads(get_worker_info().dataset.known)
    receive, send = get_worker_info().dataset.end_pipe
    os.close(send)

    def end() -> None:
        os.read(receive, 1)  # or its end, if the training process is gone
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
