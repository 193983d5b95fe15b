"""Sources to batches: corpus, tokenizer, tokenized corpus, token caches, data order, loader."""
