"""What several kernels share: specifications, CPU features, vector arithmetic, register tiles."""
