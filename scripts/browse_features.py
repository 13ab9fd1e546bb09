"""List and search features in the terminal, and write pages that open without a network."""

from sae.command_line import browse_features

if __name__ == "__main__":
    browse_features()
