"""Spark curation: LAION-shaped metadata in, WebDataset shards with a manifest and a ledger out."""
