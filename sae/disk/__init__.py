"""Files that are whole or absent, places that can be written, foreign JSON and arrays read with a schema, checksums."""
