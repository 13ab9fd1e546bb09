"""Its folder is on the path of the tests below it, which share handmade_cache.py and live_world.py."""
