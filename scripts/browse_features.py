"""Look at features in the web browser."""

from steering.command_line import browse_features

if __name__ == "__main__":
    browse_features()
