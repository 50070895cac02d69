"""What a run shows: TensorBoard, metrics.jsonl with the same numbers, a progress bar or plain lines. Rank 0 only.

Pictures are imported late: a start does not wait for matplotlib.
"""

import contextlib
import json
import logging
import math
import shutil
import sys
import time

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mtl_dist.config import Config
from mtl_dist.evaluation import Evaluation
from mtl_dist.flow import Flow
from mtl_dist.round import RoundReport
from mtl_dist.run_folder import RunFolder

log = logging.getLogger("mtl_dist")
PLAIN_LINE_SECONDS = 10.0
"""Off a terminal, progress is a line at most this often."""


@contextlib.contextmanager
def not_worth_a_run(what: str):
    """Report a full or lost disk and go on: what is shown of a run must not end it on one rank."""
    try:
        yield
    except OSError as error:
        log.error("%s could not be written (%s); training goes on", what, error)


class Monitor:
    """Writes TensorBoard, metrics.jsonl and progress of a run that starts after round `first_round`."""

    def __init__(
        self, folder: RunFolder, config: Config, first_round: int, rounds: int, per_epoch: float
    ):
        self.folder, self.config, self.rounds, self.per_epoch = folder, config, rounds, per_epoch
        # what was written of rounds that are done again, or of a first start's step 0, does not count
        purge = first_round + 1 if first_round else 0
        self.writer = SummaryWriter(folder.tensorboard, purge_step=purge, flush_secs=10)
        self.lines = open(folder.metrics, "a", encoding="utf-8", buffering=1)
        self.terminal = sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.bar_epoch = -1
        self.last_line = 0.0
        self.validated: dict[str, float] = {}
        self.since, self.flow = time.perf_counter(), Flow()
        self.of_epoch = Flow()
        self.waited: float | None = None
        if first_round == 0:
            self.writer.add_text("configuration", f"```yaml\n{config.text}\n```", 0)

    def round(
        self,
        number: int,
        report: RoundReport,
        rates: dict[str, float],
        times: dict[str, float] | None,
    ) -> None:
        """Take note of round `number` (counted from 1); write an entry if there are `times` since the last one."""
        self.flow.note(report)
        if times is not None:
            self._entry(number, report, rates, times)
        self._progress(number, report)

    def _entry(
        self, number: int, report: RoundReport, rates: dict[str, float], times: dict[str, float]
    ) -> None:
        now = time.perf_counter()
        self.flow.seconds = max(now - self.since, 1e-9)
        scalars = {"loss/total": report.total, "grad_norm": report.grad_norm}
        scalars |= {f"loss/{task}": loss for task, loss in report.losses.items()}
        scalars |= {f"count/{task}": count for task, count in report.counts.items()}
        scalars |= {f"learning_rate/{group}": rate for group, rate in rates.items()}
        scalars |= self.flow.scalars() | times | memory()
        self.waited = scalars["time/data_wait_share"]
        self._write("round", number, scalars)
        self.of_epoch.add(self.flow)
        self.since, self.flow = now, Flow()

    def validation(
        self, number: int, result: Evaluation, classes: dict[str, list[str]], best_metric: str
    ) -> None:
        """Write a validation's numbers and its confusion matrices; show the main task's `best_metric` from now on."""
        main = self.config.train.main_task
        if best_metric in result.metrics[main]:
            self.validated = {best_metric: float(result.metrics[main][best_metric])}
        flat = {f"{task}/{n}": v for task, ms in result.numbers().items() for n, v in ms.items()}
        self._write(
            "validation", number, {f"validation/{name}": value for name, value in flat.items()}
        )
        if result.bad:
            self.note(number, "bad_files_in_validation", result.bad, len(result.bad))
        for task, names in classes.items():
            if "confusion" in result.metrics[task]:
                from mtl_dist import pictures

                title = f"{task}, round {number}"
                figure = pictures.confusion_matrix(result.confusion(task), names, title)
                with not_worth_a_run("the confusion matrix"):
                    self.writer.add_figure(f"confusion/{task}", figure, number)
        numbers = result.numbers()[main].items()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers if name != "clips")
        shown = shown or "no clips"
        self.say(f"round {number}: validation {main}: {shown}")

    def example(
        self, number: int, task: str, place: int, waves: dict[str, torch.Tensor], rate: int
    ) -> None:
        """Write the waves of an example as sound and as spectrograms."""
        from mtl_dist import pictures

        clip = f"{task}/clip {place}"
        with not_worth_a_run(f"the example {clip}"):
            for what, wave in waves.items():
                loudest = wave.abs().max().clamp(min=1.0)
                self.writer.add_audio(f"{clip}/{what}", wave[None] / loudest, number, rate)
            self.writer.add_figure(clip, pictures.spectrograms(waves, rate), number)

    def checkpoint(self, number: int, pause: float) -> None:
        """Write for how many seconds a checkpoint held up the training."""
        self._write("checkpoint", number, {"time/checkpoint_pause_seconds": pause})

    def trouble(self, number: int, kind: str, messages: list[str], total: int) -> None:
        """Write bad files or skipped rounds: names, and how many so far."""
        self.note(number, kind, messages, total)
        for message in messages:
            self.say(f"round {number}: {kind.replace('_', ' ')}: {message}")

    def final(self, results: dict[str, dict[str, dict[str, float]]]) -> None:
        """Write the hyper-parameters with the final metrics.

        They come a step after the last round: a run that goes on, or ends once more, drops them.
        """
        flat = {
            f"final/{s}/{t}/{m}": v
            for s, ts in results.items()
            for t, ms in ts.items()
            for m, v in ms.items()
        }
        simple = {
            k: v if isinstance(v, int | float | str | bool) else json.dumps(v)
            for k, v in self.config.hyper_parameters().items()
        }
        with not_worth_a_run("the hyper-parameters"):
            self.writer.add_hparams(simple, flat, run_name=".", global_step=self.rounds + 1)

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush everything."""
        if self.bar is not None:
            self.bar.close()
        with not_worth_a_run("the end of TensorBoard's file"):
            self.writer.close()
        with not_worth_a_run("the end of metrics.jsonl"):
            self.lines.close()

    def note(self, number: int, kind: str, messages: list[str], total: int) -> None:
        """Write names and a count, without a line on the terminal."""
        with not_worth_a_run(f"data/{kind} for TensorBoard"):
            self.writer.add_scalar(f"data/{kind}", total, number)
            self.writer.add_text(f"data/{kind}", "  \n".join(messages), number)
        self._line(kind, number, {"messages": messages, "total": total})

    def _write(self, kind: str, number: int, scalars: dict[str, float]) -> None:
        with not_worth_a_run(f"the {kind}'s numbers for TensorBoard"):
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, number)
        known = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._line(kind, number, known)

    def _line(self, kind: str, number: int, content: dict) -> None:
        line = {"kind": kind, "round": number, "epoch": number / self.per_epoch} | content
        with not_worth_a_run("metrics.jsonl"):
            self.lines.write(json.dumps(line) + "\n")

    def _progress(self, number: int, report: RoundReport) -> None:
        """Advance the epoch's bar on a terminal; elsewhere print a line now and then."""
        epoch = int((number - 1) / self.per_epoch)
        shown = {name: f"{value:.3f}" for name, value in self.validated.items()}
        shown |= {"loss": f"{report.total:.4g}"}
        shown |= {name: f"{loss:.4g}" for name, loss in report.losses.items()}
        shown |= {} if self.waited is None else {"waiting for data": f"{self.waited:.0%}"}
        if self.terminal:
            if epoch != self.bar_epoch:
                if self.bar is not None:
                    self.bar.close()
                first, last = round(epoch * self.per_epoch), round((epoch + 1) * self.per_epoch)
                self.bar = tqdm(
                    total=min(last, self.rounds) - first,
                    initial=max(0, number - 1 - first),
                    desc=f"epoch {epoch + 1}",
                    unit="round",
                    ncols=shutil.get_terminal_size().columns,
                )
                self.bar_epoch = epoch
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS or number == self.rounds:
            self.last_line = time.monotonic()
            losses = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"epoch {epoch + 1}, round {number}/{self.rounds}: {losses}")
        ends = number == self.rounds or int(number / self.per_epoch) > epoch
        if ends and self.of_epoch.rounds:
            self.say(f"epoch {epoch + 1}: {self.of_epoch.text()}")
            self.of_epoch = Flow()


def memory() -> dict[str, float]:
    """Return memory in GiB of this process, and the peak on its GPU if it has one."""
    figures = {"memory/process_gib": psutil.Process().memory_info().rss / 2**30}
    if torch.cuda.is_available():
        figures["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures
