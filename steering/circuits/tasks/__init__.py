"""Tasks whose circuits can be looked for."""
