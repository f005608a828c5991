"""Pallas kernels, one package per operation.

Each operation is a folder that holds a plain-JAX reference, the GPU and TPU implementations, the
dispatch between them, and the shapes that its tests and its benchmark share. A backend without an
implementation falls back to the reference. Nothing here imports jaxpeft, so that a kernel can be
used, tested and timed alone.
"""
