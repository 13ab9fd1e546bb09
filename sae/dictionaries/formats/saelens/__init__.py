"""SAELens' folders, read and written."""
