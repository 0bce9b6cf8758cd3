"""Expert MLPs over rows sorted by expert: Triton kernels, and plain-torch twins with the same signatures."""
