"""The policy as named tensors, its bundle on disk, and controllers."""
