"""Features for elsewhere: a folder for file://, Neuronpedia, SAEDashboard, circuit-tracer."""
