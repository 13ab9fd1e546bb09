"""The files of a cache: number_formats.py writes and reads shards, manifest.py lists and checks all files,
ledger.py remembers what an unfinished harvest has done."""
