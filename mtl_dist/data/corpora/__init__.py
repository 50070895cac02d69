"""Where clips come from, one file per kind. Importing this package registers the kinds."""

from mtl_dist.data.corpora import chime3, folder, fsdkaggle2018, librispeech
from mtl_dist.data.corpora.base import CORPORA, Corpus, register_corpus

__all__ = [
    "CORPORA",
    "Corpus",
    "chime3",
    "folder",
    "fsdkaggle2018",
    "librispeech",
    "register_corpus",
]
