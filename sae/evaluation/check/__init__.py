"""Prove a dictionary on a short text, and find the near alternative that fits where the declared one does not.

check.py is the command · recording.py what flows at the sites · alternatives.py what may be mistaken · fit.py how well one fits · search.py
which fits best · promises.py what the source says · verdict.py the rules · corrected.py the dictionary as found · report.py tables and JSON
"""
