"""Named configurations: demo (the default), sample (real audio, small), paper (Table 3)."""
