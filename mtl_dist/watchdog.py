"""A thread on every rank that names the rank for which the others wait, and ends the process when waiting is over.

Every rank posts its last sign of life to the store by which the ranks found each other: a collective that waits for a
rank says nothing, and no rank can be asked while it hangs. Tested by tests/test_watchdog.py.
"""

import dataclasses
import faulthandler
import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping

from torch.distributed import Store

from mtl_dist.phases import Phases, Sign
from mtl_dist.runtime import World

log = logging.getLogger("mtl_dist")
GRACE_SECONDS = 5.0
"""After the collectives' time limit a rank has so long to end by itself; then its thread ends it."""
SECONDS_TO_EXIT = 15.0
"""After an error the interpreter has so long to end."""
NAMED = 8
"""So many ranks are named; of more, their number."""


@dataclasses.dataclass(frozen=True)
class Posted:
    """What a rank has posted."""

    sign: Sign
    host: str
    pid: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Who is `behind`, for how long the others have `waited` for them in seconds (0 if nobody is), and a `text`."""

    behind: tuple[int, ...]
    waited: float
    text: str


def judge(posted: Mapping[int, Posted], now: float) -> Verdict:
    """Compare the ranks' signs of life at the Unix time `now`. Clocks of nodes are taken to agree to a second or so."""
    least = min(p.sign.place for p in posted.values())
    behind = tuple(r for r, p in sorted(posted.items()) if p.sign.place == least)
    ahead = [p.sign for p in posted.values() if p.sign.place > least]
    slow = posted[behind[0]].sign
    where = f"{slow.phase} of round {slow.round}, for {now - slow.since:.0f} s"
    if not ahead:
        text = f"all ranks are in {where}; none waits for another"
        return Verdict(behind=(), waited=0.0, text=text)
    first = min(ahead, key=lambda sign: sign.since)
    names = [f"rank {r} (host {posted[r].host}, pid {posted[r].pid})" for r in behind[:NAMED]]
    if len(behind) > NAMED:
        names.append(f"{len(behind) - NAMED} more")
    text = (
        f"{', '.join(names)} hang{'s' if len(behind) == 1 else ''} in {where}; the others wait in {first.phase} of round "
        f"{first.round}, for {now - first.since:.0f} s"
    )
    return Verdict(behind=behind, waited=now - first.since, text=text)


class Watchdog:
    """Watches from its creation until `close`; nothing where one process is alone.

    Args:
        phases: what the main thread of this rank is doing.
        timeout: seconds after which a collective ends a rank. After half of it those who hang are named.
        connect: makes a client of the store that all ranks share; the thread needs one of its own.
    """

    def __init__(self, phases: Phases, world: World, timeout: float, connect: Callable[[], Store]):
        self.phases, self.world, self.timeout = phases, world, timeout
        self.me, self.told_stack = f"rank {world.rank}", False
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, args=(connect,), daemon=True)
        if world.size > 1:
            self.thread.start()

    def close(self) -> None:
        """Stop watching. On the way out of an error, make sure that this process ends, whatever its exit waits for."""
        self.over.set()
        if self.world.size > 1:
            self.thread.join(timeout=2.0)
            if sys.exc_info()[0] is not None:
                faulthandler.dump_traceback_later(SECONDS_TO_EXIT, exit=True)

    def _watch(self, connect: Callable[[], Store]) -> None:
        pause = min(1.0, self.timeout / 40)
        seen, since = None, time.monotonic()
        try:
            store = connect()
            while not self.over.is_set():
                if self.phases.sign != seen:
                    seen, since = self.phases.sign, time.monotonic()
                    store.set(self._key(self.world.rank), self._posted(seen))
                still = time.monotonic() - since
                if still >= self.timeout / 2:
                    self._look(store, still)
                self.over.wait(pause)
        except RuntimeError as error:
            if not self.over.is_set():
                log.warning("%s: hanging ranks cannot be named any more: %s", self.me, error)

    def _look(self, store: Store, still: float) -> None:
        """Say once who hangs, and end this process if its main thread has not ended in time."""
        keys = [self._key(rank) for rank in range(self.world.size)]
        if not store.check(keys):
            return
        posted = {}
        for rank, text in enumerate(store.multi_get(keys)):
            sign, host, pid = json.loads(text)
            posted[rank] = Posted(sign=Sign(*sign), host=host, pid=pid)
        verdict = judge(posted, time.time())
        place = min(p.sign.place for p in posted.values())
        if not verdict.behind:
            if store.add(f"watchdog/together_{place}", 1) == 1:
                log.warning("%s", verdict.text)
            return
        if verdict.waited < self.timeout / 2:
            return
        if store.add(f"watchdog/behind_{place}", 1) == 1:  # the first to see it has the word
            log.error("%s. After %.0f s the run ends", verdict.text, self.timeout)
        if self.world.rank in verdict.behind and not self.told_stack:
            self.told_stack = True
            faulthandler.dump_traceback(file=sys.__stderr__)
        limit = self.timeout + GRACE_SECONDS
        # both clocks: one goes on while a laptop sleeps, the other knows of this rank only
        if min(verdict.waited, still) >= limit:
            log.error("%s: still in %s; it is ended", self.me, self.phases.sign.phase)
            os._exit(1)

    def _key(self, rank: int) -> str:
        return f"watchdog/sign_{rank}"

    def _posted(self, sign: Sign) -> str:
        return json.dumps([sign, platform.node(), os.getpid()])
