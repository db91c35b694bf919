"""Compares methods on held-out tasks; writes reports and TensorBoard events."""
