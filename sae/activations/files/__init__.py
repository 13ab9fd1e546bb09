"""What lies in a cache's folder: number_formats.py writes and reads shards, manifest.py says what is there and whether it is whole,
ledger.py remembers what an unfinished harvest has done."""
