"""Referring segmentation and visual grounding: an image and a sentence in, the mask (and box) of what is named out."""
