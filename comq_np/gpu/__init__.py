"""The steps of a solve on a GPU, by the kernels of `cuda`."""
