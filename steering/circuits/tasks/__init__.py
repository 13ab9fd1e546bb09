"""Tasks for finding circuits."""
