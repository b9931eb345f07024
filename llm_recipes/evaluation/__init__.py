"""Evaluation: scoring, extraction, statistics, results."""
