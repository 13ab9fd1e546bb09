"""Make the attribution graph of a prompt: which transcoder features make the next token likely, and through which others."""

from steering.command_line import main

if __name__ == "__main__":
    main("attribute")
