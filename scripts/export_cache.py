"""Write a cache's activations with their tokens as a folder of the datasets library."""

from steering.command_line import main

if __name__ == "__main__":
    main("export-cache")
