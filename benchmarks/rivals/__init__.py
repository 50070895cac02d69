"""The contenders of benchmarks/loading.py, one a file.

Each has NAME, write(work), which makes its own copy of the corpus if it needs one, and batches(work, workers), which yields
(noisy, held, clean) without end: float32 tensors (common.BATCH, common.SAMPLES).
"""
