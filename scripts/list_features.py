"""List and search features in the terminal, and write their pages."""

from sae.command_line import list_features

if __name__ == "__main__":
    list_features()
