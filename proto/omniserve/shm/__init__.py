"""Shared memory between a worker and its attention servers: layout.h and its Python mirror."""
