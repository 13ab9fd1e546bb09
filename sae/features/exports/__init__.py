"""Exports of features: a folder for file://, Neuronpedia, SAEDashboard, circuit-tracer."""
