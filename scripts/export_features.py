"""Export features: a folder of pages that opens from file://, or the formats of Neuronpedia, SAEDashboard and circuit-tracer."""

from sae.command_line import export_features

if __name__ == "__main__":
    export_features()
