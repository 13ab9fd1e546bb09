"""Measurements that answer one question each: principal directions, effects, strengths, TruthfulQA."""
