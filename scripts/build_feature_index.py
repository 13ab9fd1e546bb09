"""Index every feature of a dictionary in one pass over a cache."""

from sae.command_line import build_feature_index

if __name__ == "__main__":
    build_feature_index()
