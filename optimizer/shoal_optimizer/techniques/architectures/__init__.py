"""What the technique `architecture` is made of: blocks, kernels, resolution, inheritance, the space."""
