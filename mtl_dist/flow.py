"""How well data flows into training: what is heard of each corpus, how far the loader is ahead, the share of waiting.

Tested by tests/test_monitor.py.
"""

import dataclasses

from mtl_dist.data.batches import Read
from mtl_dist.round import RoundReport


@dataclasses.dataclass(kw_only=True)
class Flow:
    """Sums over some rounds, over all ranks; `seconds` they took, `waited` of them for data of the rank that came last."""

    rounds: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    ahead: float = 0.0
    clips: float = 0.0
    audio_seconds: float = 0.0
    read: dict[str, Read] = dataclasses.field(default_factory=dict)

    def note(self, report: RoundReport) -> None:
        """Add a round, but for its time."""
        self.rounds += 1
        self.waited += report.waited
        self.ahead += report.ahead
        self.clips += report.clips
        self.audio_seconds += report.audio_seconds
        self._hear(report.read)

    def add(self, other: "Flow") -> None:
        """Add other rounds."""
        for name in ("rounds", "seconds", "waited", "ahead", "clips", "audio_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._hear(other.read)

    def _hear(self, read: dict[str, Read]) -> None:
        for corpus, more in read.items():
            self.read[corpus] = self.read.get(corpus, Read()) + more

    def scalars(self) -> dict[str, float]:
        """Return the numbers of TensorBoard and metrics.jsonl."""
        scalars = {
            "throughput/clips_per_second": self.clips / self.seconds,
            "throughput/audio_seconds_per_second": self.audio_seconds / self.seconds,
            "time/seconds_per_round": self.seconds / self.rounds,
            "time/data_wait_share": self.waited / self.seconds,
            "stream/rounds_ahead": self.ahead / self.rounds,
        }
        for corpus, read in self.read.items():
            scalars[f"stream/{corpus}/clips_per_second"] = read.clips / self.seconds
            scalars[f"stream/{corpus}/bytes_per_second"] = read.stored_bytes / self.seconds
        return scalars

    def text(self) -> str:
        """Return them in words, for the log."""
        words = [f"waiting for data {self.waited / self.seconds:.0%} of {self.seconds:.1f} s"]
        words += [f"{self.ahead / self.rounds:.1f} rounds ready ahead"]
        words += [
            f"{corpus} {read.clips / self.seconds:.4g} clips/s, {read.stored_bytes / self.seconds / 1e6:.3g} MB/s"
            for corpus, read in self.read.items()
        ]
        return "; ".join(words)
