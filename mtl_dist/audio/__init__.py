"""Pure functions on audio: read a stretch, resample, find silence, normalise, mix at an SNR."""
