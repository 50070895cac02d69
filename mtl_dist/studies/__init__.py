"""Studies by name: mtl-dist study NAME."""
