"""The shared trunk, the heads' building blocks, and the one module that holds them all."""
