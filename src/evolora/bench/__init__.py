"""`evolora bench`: what the experts cost, measured side by side in one process.

Each bench is one module with ``measure(session)``. Machinery: ``timing`` (interleaved rounds),
``memory``, ``environment``, ``goals`` (what the numbers are held against), ``references`` (naive
loops in the cost shape of published code), ``session`` (collects what was measured).
"""

from __future__ import annotations

BENCHES = {
    "tower": "whole vision tower: adapters against the frozen base, full fine-tuning, PEFT, loops",
    "layer": "one Linear: every formulation over experts, rank, k, tokens and kinds of route",
    "train": "adapters in the top layers with cached activations below; cached class prompts",
    "serve": "a batch of many adapters, a batch of one route, and what recognising the task costs",
    "pairs": "image and text: DeLo's step over the floor, and predictions without the task told",
    "growth": "per-task experts of a model that writes: step time and memory over tasks learned",
    "resora": "what keeping the ranks of a LoRA apart adds to a training step, by measure",
    "route": "the formulation the dispatcher picks against the fastest; --fit fits its thresholds",
    "data": "images read, resized and normalised per second",
}
"""Name and summary of each bench, in the order in which `evolora bench all` runs them."""
