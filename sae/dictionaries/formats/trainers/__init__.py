"""What programs that train dictionaries write."""
