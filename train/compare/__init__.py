"""Compares layouts with one process: the loss and the gradient of every parameter."""
