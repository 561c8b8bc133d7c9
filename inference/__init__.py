"""A trained network run on images and files, exported and read back.

    from inference import classify, read_network
    checkpoint = read_network("work/digits.bc16/weights.pth")
    probabilities = classify(checkpoint, ["seven.png"])      # (1, 10), in the order of checkpoint["classes"]
"""

from inference.export import read_network
from inference.network import classifier, classify, load_model, preprocess

__all__ = ["classifier", "classify", "load_model", "preprocess", "read_network"]
