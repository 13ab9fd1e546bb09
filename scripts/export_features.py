"""Export features: a folder of pages that opens from file://, or the formats of Neuronpedia, SAEDashboard and circuit-tracer."""

from steering.command_line import main

if __name__ == "__main__":
    main("export")
