"""Join feature indexes of one dictionary that were built on different text."""

from sae.command_line import merge_feature_indexes

if __name__ == "__main__":
    merge_feature_indexes()
