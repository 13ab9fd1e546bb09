"""Show what an activation cache holds: text, norms, outlier dimensions, massive activations."""

from steering.command_line import main

if __name__ == "__main__":
    main("describe")
