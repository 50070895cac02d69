"""mtl_dist: a distributed trainer of a multitask WaveNet for audio. Start with the README."""

__version__ = "0.1.0"
