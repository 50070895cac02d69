"""Data: what a path means (sources), corpora, the order of clips (lanes), the steps of a run (loader), `mtl-dist prepare`.

A corpus is a stream of Hugging Face `datasets`, read by its public API alone. Arrays are waves of (T,) samples, float32.
"""
