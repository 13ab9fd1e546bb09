"""Steering at a circuit's nodes."""
