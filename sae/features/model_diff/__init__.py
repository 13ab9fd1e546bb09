"""What a crosscoder of two models says about their differences: features of one model alone, shared ones, artefacts; `sae diff-models`."""
