"""The parts of `mtl-dist prepare`: what it is given, what goes into which shard, sound to FLAC or WAV, reading back."""
