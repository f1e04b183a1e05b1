"""From sources to shards to batches; synthetic pairs."""
