"""Turn text into token shards: read documents, drop duplicates, encode."""
