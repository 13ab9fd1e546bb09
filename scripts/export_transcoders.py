"""Write per-layer transcoders as the folder that circuit-tracer opens."""

from steering.command_line import main

if __name__ == "__main__":
    main("export-transcoders")
