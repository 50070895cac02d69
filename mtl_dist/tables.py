"""Results as text: the final table, the per-class table."""

import torch

DIRECTION = {"loss": "lower is better", "lsd_output": "dB, to beat lsd_input", "lsd_input": "dB"}
UNITS = {
    "si_sdr_noisy": "dB",
    "si_sdr_denoised": "dB",
    "si_sdr_improvement": "dB",
    "prediction_gain": "dB",
}


def results_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a table of {split: {task: {metric: number}}}: a row per task and metric, a column per split."""
    splits = list(results)
    rows = [("task", "metric", *splits, "")]
    tasks = dict.fromkeys(task for split in results.values() for task in split)
    for task in tasks:
        metrics = dict.fromkeys(m for split in results.values() for m in split.get(task, {}))
        for metric in metrics:
            numbers = [results[split].get(task, {}).get(metric) for split in splits]
            texts = [
                "" if n is None else f"{n:.0f}" if metric == "clips" else f"{n:.4g}"
                for n in numbers
            ]
            rows.append((task, metric, *texts, UNITS.get(metric) or DIRECTION.get(metric, "")))
    return format_rows(rows)


def per_class_rows(
    confusion: torch.Tensor, map_at_3: torch.Tensor, classes: list[str]
) -> list[tuple]:
    """Return (class, clips, accuracy, MAP@3, most frequent wrong guess) per class, with a header.

    `confusion` (K, K) counts truth by guess, `map_at_3` (K,) is the mean over each class' clips.
    """
    rows: list[tuple] = [("class", "clips", "accuracy", "map@3", "most often taken for")]
    for i, name in enumerate(classes):
        clips = int(confusion[i].sum())
        wrong = confusion[i].clone()
        wrong[i] = 0
        other = f"{classes[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.max() > 0 else ""
        accuracy = float(confusion[i, i]) / clips if clips else 0.0
        precision = float(map_at_3[i])
        rows.append((name, str(clips), f"{accuracy:.3f}", f"{precision:.3f}", other))
    return rows


def format_rows(rows: list[tuple]) -> str:
    """Align the columns of rows of text; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
