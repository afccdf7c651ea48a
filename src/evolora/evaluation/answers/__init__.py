"""Metrics of generated answers: what a model wrote against what people wrote.

`contract.py` says what a metric is; each other file holds one family. By name:
``evolora.registry.ANSWER_METRICS.get("cider-d").score(predictions, references)``.
"""
