"""The shared core: one loop, one config system, one checkpointer."""
