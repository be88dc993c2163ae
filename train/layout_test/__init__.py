"""Trains every layout that fits this machine and compares it with one process: python -m train.layout_test."""
