"""Triton kernels for what a UNet does between its matrix products: one a file, each usable alone.

They need a CUDA GPU. On a CPU Triton's interpreter runs them, slowly, to look at what they compute: set
TRITON_INTERPRET=1 before Python starts.
"""
