"""Counting ahead what a layout costs (memory, traffic), and counting while it runs."""
