"""Fetch a dataset's files: the address schemes, the transports, and the cache on the local disk."""
