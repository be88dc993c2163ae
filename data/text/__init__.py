"""From text to token shards: reading documents, removing duplicates, encoding."""
