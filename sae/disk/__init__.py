"""Files that are complete or absent, checks of output paths, foreign JSON and arrays read with a schema, checksums."""
