"""A UNet's blocks on our own kernels: what torch.compile fuses, without a compiler."""
