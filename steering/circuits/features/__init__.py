"""Circuits whose nodes are features of dictionaries: scores, edges, curves against other bases, a page."""
