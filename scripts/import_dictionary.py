"""Copy a dictionary of any format into a folder of SAELens' layout."""

from steering.command_line import main

if __name__ == "__main__":
    main("import-dictionary")
